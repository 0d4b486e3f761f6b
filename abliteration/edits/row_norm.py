"""Ablation that keeps the norm of every row of a weight: Heretic's form, exact and without an SVD."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliteration.placement import Direction, remove
from common.architecture import PlacedWriter
from common.edits import Edit
from common.recipe import RowNorm


def build(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: RowNorm,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that removes a direction and restores the row norms: W' = diag(1/n) D P D^-1 W.

    Rescaling rows turns what is written: where the direction has a few large coordinates, up to half of it can
    stay even at strength 1. Keeping columns does not have that fault.
    """
    return remove(
        direction, writers, settings, about, projection=settings.projection, keep_norm="row"
    )
