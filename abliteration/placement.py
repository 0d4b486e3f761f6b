"""A direction placed at every writer: what the kinds of edit share.

A writer y behind an RMS norm contributes gain * y / rms(y). That has no component along v exactly if y has none
along u = normalize(gain * v), so such a writer is edited with u instead of v.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from abliteration.strengths import strengths_of
from common.architecture import PlacedWriter
from common.edits import Edit, Removal
from common.recipe import EditWeights
from common.slices import KeepNorm

Projection = Literal["none", "projected", "biprojected"]


class Removing(Protocol):
    """What the settings of every kind of removal hold."""

    @property
    def strength(self) -> float:
        """Share of the component to remove."""

    @property
    def weights(self) -> EditWeights:
        """Factors on it, by component and layer."""


@dataclass(frozen=True)
class Direction:
    """What was chosen, with what the kinds of edit need to know around it.

    Attributes:
        vectors: [k, d_model] in float64; the first is the direction, of the length it was measured with.
        layer: the block whose input it was measured at; a fraction lies between two.
        harmless: mean resid_pre over harmless prompts [layers, d_model] at the same position.
    """

    vectors: Tensor
    layer: float
    harmless: Tensor


def remove(
    direction: Direction,
    writers: Sequence[PlacedWriter],
    settings: Removing,
    about: Mapping[str, Any],
    *,
    projection: Projection = "none",
    keep_norm: KeepNorm = "none",
) -> Edit:
    """The edit that removes a direction, or several at once, from all writers of a model.

    Args:
        direction: what was chosen.
        writers: the writers of the model.
        settings: strength and weights; where their product is 0 the removal is void.
        about: where the direction comes from.
        projection: what of the direction is kept: see `vectors_at`.
        keep_norm: which norms of the weights are restored.

    Returns:
        The edit. Tied embeddings are left alone: they are the unembedding as well.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4; the norms behind writers are our own algebra.
    """
    strengths = strengths_of(writers, settings.strength, settings.weights)
    own = direction.vectors if projection == "none" else projected(direction)
    vectors = {"direction": unit(own[0].to(torch.float64).cpu())}
    removals, left_alone = {}, {}
    for writer in writers:
        if writer.tied:
            left_alone[writer.name] = "tied to the unembedding"
            continue
        basis = orthonormal(behind_norm(vectors_at(direction, projection, writer), writer))
        names = tuple(_name(vector, vectors, writer, i) for i, vector in enumerate(basis))
        removals[writer.name] = Removal(names, (strengths[writer.name],) * len(names), keep_norm)
    return Edit(vectors, removals, {}, left_alone, dict(about))


def vectors_at(direction: Direction, projection: Projection, writer: PlacedWriter) -> Tensor:
    """The vectors [k, d_model] to remove from a writer, before its norm is taken into account.

    `projected` keeps what they share with the harmless mean of the layer they were measured at, `biprojected`
    also what they share with that of the block they are removed from (of the first one for the embedding).
    """
    if projection == "none":
        return direction.vectors
    vectors = projected(direction)
    return (
        vectors
        if projection == "projected"
        else without(vectors, direction.harmless[writer.block or 0])
    )


def projected(direction: Direction) -> Tensor:
    """The vectors [k, d_model] without the harmless mean g of their own layer: r - (r.g) g / |g|^2."""
    return without(direction.vectors, at_layer(direction.harmless, direction.layer))


def behind_norm(vectors: Tensor, writer: PlacedWriter) -> Tensor:
    """What must vanish in a writer's output for vectors [..., d_model] to vanish in its contribution."""
    vectors = vectors.to(torch.float64).cpu()
    gain = writer.post_norm_gain
    return vectors if gain is None else gain.cpu() * vectors


def without(vectors: Tensor, other: Tensor) -> Tensor:
    """Vectors [..., d_model] without their components along another [d_model]; as they are where that is 0.

    Twice, so that rounding leaves nothing of a component much larger than the rest.
    """
    length = other.norm()
    if length == 0:
        return vectors
    axis = other / length
    for _ in range(2):
        vectors = vectors - (vectors @ axis).unsqueeze(-1) * axis
    return vectors


def orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis [k, d_model] of vectors [k, d_model], the first keeping its direction."""
    basis: list[Tensor] = []
    for vector in vectors:
        rest = unit(vector)
        for _ in range(2):
            for axis in basis:
                rest = unit(rest - (rest @ axis) * axis)
        basis.append(rest)
    return torch.stack(basis)


def unit(vector: Tensor) -> Tensor:
    """A vector [..., d_model] scaled to length 1."""
    scaled: Tensor = vector / vector.norm(dim=-1, keepdim=True)
    return scaled


def at_layer(per_layer: Tensor, layer: float) -> Tensor:
    """The value [...] at a layer of [layers, ...]; between two layers in proportion."""
    lower = int(layer)
    share = layer - lower
    if share == 0:
        return per_layer[lower]
    return (1 - share) * per_layer[lower] + share * per_layer[lower + 1]


def _name(vector: Tensor, vectors: dict[str, Tensor], writer: PlacedWriter, index: int) -> str:
    """The name of a vector in the edit: of one that is already there, if it is the same."""
    for name, known in vectors.items():
        if torch.equal(known, vector):
            return name
    name = f"{writer.name}.{index}"
    vectors[name] = vector
    return name
