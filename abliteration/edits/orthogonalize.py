"""Weight orthogonalization: remove from every writer what it writes along the direction."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliteration.placement import Direction, remove
from common.architecture import PlacedWriter
from common.edits import Edit
from common.recipe import Orthogonalize


def build(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: Orthogonalize,
    about: Mapping[str, Any],
) -> Edit:
    """The edit that removes a direction, or several at once, from all writers of a model.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4.
    """
    return remove(direction, writers, settings, about)
