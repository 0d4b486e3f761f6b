"""The difference in means, and the directions in which the differences of prompt pairs vary most around it."""

from typing import Protocol

import torch
from torch import Tensor

from abliteration.activations import Activations

NEEDS_SAMPLES = True
# Variation below this share of the largest is rounding, and its direction noise.
NEGLIGIBLE = 1e-6


class Settings(Protocol):
    """What the recipe sets."""

    @property
    def num_directions(self) -> int:
        """How many directions, the difference in means included."""


def estimate(harmful: Activations, harmless: Activations, settings: Settings) -> Tensor:
    """The candidate directions of every layer and position.

    The matrix of differences is not centred: its mean is the refusal direction itself, and is kept as the first
    vector exactly. The others are the top right singular vectors of what the differences hold beside it.

    Args:
        harmful: resid_pre of harmful prompts, with samples.
        harmless: the same of harmless prompts; the i-th of each make a pair, and what is left over joins no pair.
        settings: how many directions.

    Returns:
        [layers, positions, num_directions, d_model] in float64: the difference in means, then orthonormal vectors,
        zero where the prompts do not vary in as many ways.

    Source: Gabliteration, arXiv:2512.18901, whose singular vectors are not centred either.
    """
    mean_difference = harmful.mean - harmless.mean
    num_pairs = min(harmful.count, harmless.count)
    directions = mean_difference.new_zeros(
        *mean_difference.shape[:2], settings.num_directions, mean_difference.shape[-1]
    )
    directions[:, :, 0] = mean_difference
    for layer, means in enumerate(mean_difference):
        rows = [part.samples_at(layer)[:num_pairs] for part in (harmful, harmless)]
        for position, first in enumerate(means):
            differences = rows[0][:, position] - rows[1][:, position]
            others = beside(differences, first, settings.num_directions - 1)
            directions[layer, position, 1 : 1 + len(others)] = others
    return directions


def beside(differences: Tensor, first: Tensor, count: int) -> Tensor:
    """The top right singular vectors of differences with one direction taken out.

    Args:
        differences: [pairs, d_model]
        first: the direction that is taken out [d_model].
        count: how many vectors at most.

    Returns:
        [at most count, d_model], orthonormal and orthogonal to `first`; each one's largest component is positive.
    """
    length = first.norm()
    if count == 0 or not length > 0:
        return differences[:0]
    axis = first / length
    rest = differences - torch.outer(differences @ axis, axis)
    lengths, vectors = _right_singular_vectors(rest, count)
    vectors = vectors[lengths > NEGLIGIBLE * torch.linalg.matrix_norm(differences)]
    peaks = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    oriented: Tensor = vectors * peaks.sign()
    return oriented


def _right_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and their right vectors as rows.

    Pairs are far fewer than components, so the small Gram matrix is decomposed: several times faster than an SVD.
    """
    if matrix.shape[0] > matrix.shape[1]:
        squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
        vectors = vectors.T.flip(0)[:count]
    else:
        squares, left = torch.linalg.eigh(matrix @ matrix.T)
        vectors = torch.nn.functional.normalize(left.T.flip(0)[:count] @ matrix, dim=-1)
    return squares.flip(0)[:count].clamp_min(0).sqrt(), vectors
