"""Edits of tiny models, for the tests."""

import importlib

import torch
from torch import Tensor

from abliteration.placement import Direction
from common.architecture import find_writers
from common.edits import Edit, Removal
from common.recipe import COMPONENTS

WIDTH = 32


def vector(seed: int = 7) -> Tensor:
    """A random vector of the tiny models' width."""
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direction_of(*vectors: Tensor, layer: float = 1, num_layers: int = 3) -> Direction:
    """A direction with random harmless means around it."""
    harmless = torch.stack([vector(100 + index) for index in range(num_layers)])
    return Direction(torch.stack(vectors or (vector(),)), layer, harmless)


def edit_of(model, kind="orthogonalize", *vectors: Tensor, about=None, **settings) -> Edit:
    """An edit of a model, of any kind, with the settings of a recipe."""
    settings = COMPONENTS["abliteration.edit"][kind](name=kind, **settings)
    builder = importlib.import_module(f"abliteration.edits.{kind}")
    return builder.build(direction_of(*vectors), find_writers(model), settings, about or {})


def mixed_edit(model, keep_norm="none", **fields) -> Edit:
    """One vector out of half of the writers, two out of the others, at different strengths."""
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(WIDTH, 2, generator=generator, dtype=torch.float64)
    first, second = torch.linalg.qr(square)[0].T.contiguous()
    removals, left_alone = {}, {}
    for number, writer in enumerate(find_writers(model)):
        if writer.tied:
            left_alone[writer.name] = "tied"
        elif number % 2:
            removals[writer.name] = Removal(("direction", "second"), (1.0, 0.6), keep_norm)
        else:
            removals[writer.name] = Removal(("direction",), (1.0,), keep_norm)
    parts = {"vectors": {"direction": first, "second": second}, "removals": removals}
    parts |= {"additions": {}, "left_alone": left_alone, "about": {}}
    return Edit(**{**parts, **fields})
