"""What the two kinds of prompts differ in: candidate directions at every layer and position."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliteration.activations import Activations
from abliteration.placement import Direction, at_layer, orthonormal, unit, without
from abliteration.prompt_sets import PromptSet
from common.errors import StageError

# What is left below this share of what it was made from is rounding: a direction behind a projection, and a difference
# of means at a fixed token of the template, which is the same for all prompts.
NEGLIGIBLE = 1e-9

# From sets of prompts, a quantile to winsorize at, and files for samples to the sets' activations.
Collect = Callable[
    [Sequence[Sequence[str]], float | None, Sequence[Path] | None], Sequence[Activations]
]


@dataclass(frozen=True)
class Findings:
    """Candidate directions, and the harmless means that some edits keep.

    Attributes:
        directions: [layers, positions, k, d_model]; the first of the k has the length it was measured with.
        harmless: mean resid_pre over harmless prompts [layers, positions, d_model].
        target: the same over the prompts whose refusal is to go.
    """

    directions: Tensor
    harmless: Tensor
    target: Tensor

    def at(self, layer: float, position: int) -> Direction:
        """The direction of a layer and position; between two layers their unit vectors are mixed.

        Raises:
            StageError: if the prompt sets do not differ there.
        """
        directions, harmless = self.directions[:, position], self.harmless[:, position]
        lower, share = int(layer), layer - int(layer)
        around = directions[lower : lower + (2 if share else 1)]
        lengths = around.norm(dim=-1)
        if not bool((lengths[:, 0] > 0).all()):
            raise StageError(
                f"abliteration: harmful and harmless prompts do not differ at layer {layer:g}, position "
                f"{position} (a fixed token of the template); choose a later layer or another position"
            )
        # The prompts may vary in fewer ways than were asked for.
        around = around[:, (lengths > 0).all(dim=0)]
        if share == 0:
            return Direction(around[0], layer, harmless)
        units = torch.stack([orthonormal(vectors) for vectors in around])
        length = at_layer(lengths[:, 0], share)
        return Direction(unit(at_layer(units, share)) * length, layer, harmless)


def find(
    estimator: Any,  # noqa: ANN401  # each kind has settings of its own
    prompts: PromptSet,
    collect: Collect,
    work: Path,
) -> Findings:
    """Estimate candidate directions.

    Where there are falsely refused prompts, their direction is made orthogonal to that of the truly refused ones
    at the same layer and position, so that removing it leaves true refusal alone (the idea of Wang et al. 2024,
    arXiv:2410.03415).

    Args:
        estimator: the recipe's `abliteration.direction`.
        prompts: what to estimate from.
        collect: reads the residual stream.
        work: a folder for what estimators need of every single prompt.
    """
    module = importlib.import_module(f"abliteration.directions.{estimator.name}")
    sets = {"harmless": prompts.harmless, "target": prompts.target}
    if prompts.kept:
        sets["kept"] = prompts.kept
    files = [work / f"{name}.npy" for name in sets] if module.NEEDS_SAMPLES else None
    read = collect(list(sets.values()), getattr(estimator, "quantile", None), files)
    harmless, target, *kept = read
    directions: Tensor = module.estimate(target, harmless, estimator)
    directions = directions * _differs(directions, target.mean).unsqueeze(-1)
    if kept:
        true = module.estimate(kept[0], harmless, estimator)
        directions = keep_true_refusal(directions, true)
    return Findings(directions, harmless.mean, target.mean)


def _differs(directions: Tensor, mean: Tensor) -> Tensor:
    """Where a direction is more than the rounding of equal means: 1 or 0 [layers, positions, 1]."""
    length = directions[:, :, 0].norm(dim=-1, keepdim=True)
    differs: Tensor = length > NEGLIGIBLE * mean.norm(dim=-1, keepdim=True)
    return differs.to(directions)


def keep_true_refusal(false: Tensor, true: Tensor) -> Tensor:
    """Take out of the directions of false refusal what they share with those of true refusal.

    Args:
        false: [layers, positions, k, d_model].
        true: the same shape.

    Returns:
        [layers, positions, k, d_model]: every vector orthogonal to all k of `true` at its layer and position, and
        zero where it lies among them.
    """
    kept = false.clone()
    for layer, position in torch.cartesian_prod(*map(torch.arange, false.shape[:2])).tolist():
        there = true[layer, position]
        for axis in orthonormal(there[there.norm(dim=-1) > 0]) if there.any() else []:
            kept[layer, position] = without(kept[layer, position], axis)
    lengths = [vectors.norm(dim=-1, keepdim=True) for vectors in (kept, false)]
    return torch.where(lengths[0] > NEGLIGIBLE * lengths[1], kept, 0.0)
