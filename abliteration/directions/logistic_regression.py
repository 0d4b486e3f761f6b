"""The weights of a linear probe that tells harmful from harmless prompts."""

from typing import Protocol

import torch
from torch import Tensor

from abliteration.activations import Activations

NEEDS_SAMPLES = True
MAX_ITERATIONS = 100
TOLERANCE = 1e-10


class Settings(Protocol):
    """What the recipe sets."""

    @property
    def l2(self) -> float:
        """Penalty on half the squared length of the weights, for activations whose components have unit rms."""


def estimate(harmful: Activations, harmless: Activations, settings: Settings) -> Tensor:
    """The candidate refusal direction of every layer and position.

    Where activations vary much more along some axes than along others, the difference in means leans towards those
    axes; the probe does not. Its length is set to the distance of the two means along it.

    Args:
        harmful: resid_pre of harmful prompts, with samples.
        harmless: the same of harmless prompts.
        settings: the penalty.

    Returns:
        [layers, positions, 1, d_model] in float64.
    """
    difference = harmful.mean - harmless.mean
    directions = torch.zeros_like(difference)
    labels = torch.cat([torch.ones(harmful.count), torch.zeros(harmless.count)]).to(difference)
    for layer, gaps in enumerate(difference):
        middle = (harmful.mean[layer] + harmless.mean[layer]) / 2
        rows = torch.cat([part.samples_at(layer) for part in (harmful, harmless)]) - middle
        for position, gap in enumerate(gaps):
            if gap.norm() > 0:
                cell = rows[:, position]
                weights = probe(cell / cell.square().mean().sqrt(), labels, settings.l2)
                axis = weights / weights.norm()
                directions[layer, position] = (axis @ gap) * axis
    return directions.unsqueeze(-2)


def probe(rows: Tensor, labels: Tensor, l2: float) -> Tensor:
    """L2-regularised logistic regression, solved in the span of the samples: they are fewer than the components.

    Minimizes sum_i log(1 + exp(-s_i f_i)) + l2/2 (|w|^2 + b^2) with f = rows @ w + b and signs s. Newton steps on the
    coefficients a of w = rows^T a / l2; each is halved until the loss falls.

    Args:
        rows: samples [n, d].
        labels: 1 or 0 for each [n].
        l2: the penalty, above 0.

    Returns:
        The weights w [d].

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithm 3.1 (the same optimum).
    """
    gram = (rows @ rows.T + 1) / l2  # the 1 is the intercept: a component that is 1 in every sample
    identity = torch.eye(len(rows), dtype=rows.dtype)
    coefficients = torch.zeros_like(labels)
    loss = _loss(coefficients, gram, labels)
    for _ in range(MAX_ITERATIONS):
        scores = gram @ coefficients
        probability = scores.sigmoid()
        root = (probability * (1 - probability)).sqrt()
        target = root.square() * scores + labels - probability
        factor = torch.linalg.cholesky(identity + root[:, None] * gram * root)
        solved = torch.cholesky_solve((root * (gram @ target))[:, None], factor)[:, 0]
        step = target - root * solved - coefficients
        size = 1.0
        while (new := _loss(coefficients + size * step, gram, labels)) > loss and size > 1e-6:
            size /= 2
        if not new < loss - TOLERANCE * loss:
            break
        coefficients, loss = coefficients + size * step, new
    return rows.T @ coefficients / l2


def _loss(coefficients: Tensor, gram: Tensor, labels: Tensor) -> Tensor:
    scores = gram @ coefficients
    fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
    return fit + coefficients @ scores / 2
