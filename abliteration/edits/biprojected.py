"""Biprojected ablation: the harmless mean is kept where the direction was measured and where it is removed."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliteration.placement import Direction, remove
from common.architecture import PlacedWriter
from common.edits import Edit
from common.recipe import Biprojected


def build(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: Biprojected,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that removes from each block what of the projected direction its harmless mean does not share."""
    return remove(direction, writers, settings, about, projection="biprojected")
