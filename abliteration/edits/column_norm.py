"""Ablation that keeps the norm of every column of a weight: how much each input writes stays as it was."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliteration.placement import Direction, remove
from common.architecture import PlacedWriter
from common.edits import Edit
from common.recipe import ColumnNorm


def build(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: ColumnNorm,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that removes a direction and restores the column norms.

    At strength 1 nothing is left along the direction; at others, rescaling leaves a little more than 1 - strength.
    """
    return remove(
        direction, writers, settings, about, projection=settings.projection, keep_norm="column"
    )
