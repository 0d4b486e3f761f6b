"""Weight orthogonalization: remove from every writer what it writes along the direction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.architecture import PlacedWriter
from common.edits import Edit, Removal


def build(
    direction: Tensor, writers: Sequence[PlacedWriter], strength: float, about: Mapping[str, Any]
) -> Edit:
    """The edit that removes a direction from all writers of a model.

    A writer y behind a norm contributes gain * y / rms(y). That has no component along v exactly if y has none
    along u = normalize(gain * v), so such a writer is edited with u instead of v.

    Args:
        direction: the refusal direction [d_model], of any length above 0.
        writers: the writers of the model.
        strength: the share that is removed; 1 removes all, more overshoots.
        about: where the direction comes from.

    Returns:
        The edit. Tied embeddings are left alone: they are the unembedding as well.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4; the norms are our own algebra.
    """
    unit = _normalize(direction.to(torch.float64).cpu())
    vectors, removals, left_alone = {"direction": unit}, {}, {}
    for writer in writers:
        if writer.tied:
            left_alone[writer.name] = "tied to the unembedding"
            continue
        vector = "direction"
        if writer.post_norm_gain is not None:
            vector = writer.name
            vectors[vector] = _normalize(writer.post_norm_gain.cpu() * unit)
        removals[writer.name] = Removal(vector, strength)
    return Edit(vectors, removals, left_alone, dict(about))


def _normalize(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit
