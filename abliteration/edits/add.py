"""Activation addition: add the direction to the residual stream, so that the behaviour is induced."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from abliteration.placement import Direction, unit
from common.architecture import PlacedWriter
from common.edits import Addition, Edit
from common.errors import InputError
from common.recipe import Add


def build(
    direction: Direction, writers: Sequence[PlacedWriter], settings: Add, about: Mapping[str, Any]
) -> Edit:
    """The edit that adds strength * r to the input of the block that r was measured at, at every token.

    It stands beside the last writer of the block before, in its bias where one reaches the stream unchanged.

    Raises:
        InputError: if r was measured at the first block, before which only the embedding writes.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4, "activation addition".
    """
    layer = round(direction.layer)
    before = [writer for writer in writers if writer.block == layer - 1]
    if not before:
        raise InputError(
            "abliteration: a direction of layer 0 cannot be added, since no block writes before it; choose a later "
            "layer"
        )
    vector = direction.vectors[0].to(torch.float64).cpu()
    addition = Addition("direction", settings.strength * float(vector.norm()))
    return Edit({"direction": unit(vector)}, {}, {before[-1].name: addition}, {}, dict(about))
