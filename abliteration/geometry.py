"""The geometry of candidate directions, for the report: how they resemble each other, how they part the prompts.

Tensors in, plain lists out: what a file or a picture can hold. Where something is not defined (a direction of
length 0) there is nan.
"""

import torch
from torch import Tensor

Grid = list[list[float]]


def cosine_between_layers(directions: Tensor) -> list[Grid]:
    """The cosine of every pair of layers' directions, at each position.

    Args:
        directions: [layers, positions, d_model].

    Returns:
        [positions, layers, layers].
    """
    units = directions.to(torch.float64).movedim(1, 0)
    units = units / units.norm(dim=-1, keepdim=True)
    cosines: list[Grid] = (units @ units.mT).tolist()
    return cosines


def relative_difference(harmful_mean: Tensor, harmless_mean: Tensor) -> Grid:
    """The distance between two means, relative to their own mean length.

    The residual stream grows from layer to layer, and any difference in it does too; this ratio does not.

    Args:
        harmful_mean: mean resid_pre over one set of prompts [layers, positions, d_model].
        harmless_mean: over the other.

    Returns:
        [layers, positions].
    """
    one, other = harmful_mean.to(torch.float64), harmless_mean.to(torch.float64)
    lengths = (one.norm(dim=-1) + other.norm(dim=-1)) / 2
    differences: Grid = ((one - other).norm(dim=-1) / lengths).tolist()
    return differences


def separation(harmful: Tensor, harmless: Tensor, directions: Tensor) -> list[float]:
    """How far apart the prompt sets lie along each layer's direction: d', in standard deviations.

    The distance of the two means of the projections over the root of the mean of their variances.

    Args:
        harmful: resid_pre of each prompt [prompts, layers, d_model]; at least two prompts.
        harmless: of the other set.
        directions: [layers, d_model].

    Returns:
        [layers]. The direction is found on these prompts or on others like them: with fewer prompts than
        d_model even sets that do not differ are apart along their difference.

    Source: the sensitivity index of signal detection (Green and Swets 1966).
    """
    along, other = projections(harmful, directions), projections(harmless, directions)
    spread = ((along.var(dim=0) + other.var(dim=0)) / 2).sqrt()
    separations: list[float] = ((along.mean(dim=0) - other.mean(dim=0)).abs() / spread).tolist()
    return separations


def projections(streams: Tensor, directions: Tensor) -> Tensor:
    """The component of each prompt's resid_pre along each layer's direction.

    Args:
        streams: [prompts, layers, d_model].
        directions: [layers, d_model], of any length.

    Returns:
        [prompts, layers] in float64, in units of the residual stream.
    """
    units = directions.to(torch.float64)
    units = units / units.norm(dim=-1, keepdim=True)
    return torch.einsum("pld,ld->pl", streams.to(torch.float64), units)
