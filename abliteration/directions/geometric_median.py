"""The difference in geometric medians: half of the prompts must be outliers before it follows them."""

import torch
from torch import Tensor

from abliteration.activations import Activations

NEEDS_SAMPLES = True
MAX_ITERATIONS = 500
TOLERANCE = 1e-9


def estimate(harmful: Activations, harmless: Activations, _settings: object) -> Tensor:
    """The candidate refusal direction of every layer and position.

    Args:
        harmful: resid_pre of harmful prompts, with samples.
        harmless: the same of harmless prompts.

    Returns:
        [layers, positions, 1, d_model] in float64.
    """
    medians = [
        torch.stack([geometric_median(part.samples_at(layer)) for layer in range(len(part.mean))])
        for part in (harmful, harmless)
    ]
    return (medians[0] - medians[1]).unsqueeze(-2)


def geometric_median(points: Tensor) -> Tensor:
    """The point with the smallest sum of distances to the given ones.

    Args:
        points: [points, ..., d_model]; medians are taken over the first axis.

    Returns:
        [..., d_model]

    Source: Weiszfeld 1937; where an iterate meets a point: Vardi and Zhang 2000, PNAS 97(4), equation 2.6.
    """
    # Among equal points this start is that point to the last bit, so that equal sets give a difference of zero.
    median = points.median(dim=0).values
    for _ in range(MAX_ITERATIONS):
        offsets = points - median
        distances = offsets.norm(dim=-1, keepdim=True)
        met = distances == 0
        weights = torch.where(met, 0.0, 1 / distances)
        total = weights.sum(dim=0)
        pull = (weights * offsets).sum(dim=0)
        # Points that the iterate stands on hold it with a force of one each; a weaker pull does not move it.
        strength = pull.norm(dim=-1, keepdim=True)
        free = (1 - met.sum(dim=0) / strength).clamp_min(0.0)
        step = torch.where(strength > 0, free * pull / total, 0.0)
        median = median + step
        if not (step.norm(dim=-1) > TOLERANCE * median.norm(dim=-1)).any():
            break
    return median
