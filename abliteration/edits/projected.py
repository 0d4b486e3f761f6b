"""Projected ablation: what the direction shares with the harmless mean of its layer is kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliteration.placement import Direction, remove
from common.architecture import PlacedWriter
from common.edits import Edit
from common.recipe import Projected


def build(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: Projected,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that removes v = normalize(r - (r.g) g), g the unit harmless mean where r was measured."""
    return remove(direction, writers, settings, about, projection="projected")
