"""A saved edit: unit vectors, and how strongly each is removed from which writer. What applies it.

The edit is an artifact, not a model: a few vectors and numbers that a hook and an in-memory weight edit
apply to the same effect. For a writer y = W x + b with unit vector u and strength s both compute
y' = (I - s u u^T) y, which is directional ablation (Arditi et al. 2024, arXiv:2406.11717, section 2.4)
at s = 1.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.architecture import Layout, PlacedWriter, find_writers
from common.errors import InputError, StageError

FORMAT = 1


@dataclass(frozen=True)
class Removal:
    """What is taken out of one writer: the name of a vector of the edit, and its strength (1 removes it all)."""

    vector: str
    strength: float


@dataclass(frozen=True)
class Edit:
    """A directional ablation of one checkpoint.

    Attributes:
        vectors: unit vectors [d_model] in float64 by name; `direction` is the refusal direction itself, the
            others are what a writer behind a norm needs instead (`abliteration.edits`).
        removals: what is removed from each writer, by the writer's name in the model.
        left_alone: writers that are not edited, with the reason.
        about: where the direction comes from: layer, position, stream, base model, template hash.
    """

    vectors: Mapping[str, Tensor]
    removals: Mapping[str, Removal]
    left_alone: Mapping[str, str]
    about: Mapping[str, Any]

    @property
    def direction(self) -> Tensor:
        """The refusal direction, a unit vector [d_model]."""
        return self.vectors["direction"]

    def vector_of(self, writer: str) -> Tensor:
        """The unit vector [d_model] that is removed from a writer."""
        return self.vectors[self.removals[writer].vector]


def save_edit(edit: Edit, path: Path) -> None:
    """Write an edit as safetensors; the same edit gives the same bytes."""
    about = {
        "format": FORMAT,
        "removals": {name: [r.vector, r.strength] for name, r in edit.removals.items()},
        "left_alone": dict(edit.left_alone),
        "about": dict(edit.about),
    }
    # One metadata key: with two or more, safetensors writes them in an order that changes between processes.
    save_file(
        {name: vector.contiguous() for name, vector in edit.vectors.items()},
        path,
        metadata={"healing": json.dumps(about, sort_keys=True)},
    )


def load_edit(path: Path) -> Edit:
    """Read an edit written by `save_edit`.

    Raises:
        InputError: if the file is missing, damaged, or not an edit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("healing")
            vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as an edit: {error}; run stage one again"
        ) from error
    about = json.loads(metadata) if metadata else {}
    if about.get("format") != FORMAT:
        raise InputError(
            f"{path} is no edit of format {FORMAT} (found {about.get('format')}); make it again"
        )
    removals = {
        name: Removal(vector, strength) for name, (vector, strength) in about["removals"].items()
    }
    return Edit(vectors, removals, about["left_alone"], about["about"])


def project(output: Tensor, vector: Tensor, strength: float) -> Tensor:
    """Remove a share of the component along a unit vector from the last axis: y - s (y.u) u."""
    vector = vector.to(output)
    return output - strength * (output @ vector).unsqueeze(-1) * vector


def orthogonalize(weight: Tensor, vector: Tensor, strength: float, layout: Layout) -> Tensor:
    """Remove from a writer's weight what it writes along a unit vector.

    Args:
        weight: [d_model, d_in] (linear), [vocab, d_model] (embedding) or [experts, d_model, d_in] (experts).
        vector: unit vector [d_model].
        strength: 1 removes all of it.
        layout: which of these shapes it is.

    Returns:
        The edited weight, computed in float32 or wider and cast back to the weight's dtype.

    Source: Arditi et al. 2024, arXiv:2406.11717, "weight orthogonalization".
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if layout == "embedding":
        edited = project(wide, vector, strength)
    else:
        edited = project(wide.transpose(-1, -2), vector, strength).transpose(-1, -2)
    return edited.to(weight.dtype).contiguous()


def component_along(weight: Tensor, vector: Tensor, layout: Layout) -> Tensor:
    """What a writer's weight writes along a unit vector: v^T W, in float64, one number per input."""
    wide = weight.detach().to(torch.float64)
    vector = vector.to(wide)
    return wide @ vector if layout == "embedding" else wide.transpose(-1, -2) @ vector


def edited_writers(model: nn.Module, edit: Edit) -> dict[str, PlacedWriter]:
    """The writers of a model that an edit names, by name.

    Raises:
        InputError: if the model lacks one of them or has a writer that the edit does not know: the edit was
            made for another architecture.
    """
    writers = {writer.name: writer for writer in find_writers(model)}
    known = set(edit.removals) | set(edit.left_alone)
    if set(writers) != known:
        odd = sorted(set(writers) ^ known)
        raise InputError(
            f"the edit and the model name different writers ({', '.join(odd[:3])}{' ...' if odd[3:] else ''}); "
            "an edit fits only the architecture and depth it was made for"
        )
    return {name: writers[name] for name in edit.removals}


@torch.no_grad()
def apply_to_weights(model: nn.Module, edit: Edit) -> None:
    """Edit a model's weights in place, biases included.

    Raises:
        InputError: if the edit was made for another architecture.
        StageError: if a weight did not change although the edit removes something from it (coverage).
    """
    for name, writer in edited_writers(model, edit).items():
        removal, vector = edit.removals[name], edit.vector_of(name)
        edited = orthogonalize(writer.weight, vector, removal.strength, writer.layout)
        if torch.equal(edited, writer.weight):
            raise StageError(
                f"abliteration: {name} did not change under the edit, so it still writes what it wrote; its side "
                "or layout in common/architecture.py is wrong, or the direction is not one of this model's"
            )
        writer.weight.copy_(edited)
        if writer.bias is not None:
            writer.bias.copy_(
                orthogonalize(writer.bias[None], vector, removal.strength, "embedding")[0]
            )


@contextmanager
def applied_by_hooks(model: nn.Module, edit: Edit) -> Iterator[None]:
    """Apply an edit to the outputs of the writers while the context lasts; the weights stay as they are.

    By linearity one hook on a block of experts equals the edit of every expert.

    Raises:
        InputError: if the edit was made for another architecture.
    """
    handles = []
    for name, writer in edited_writers(model, edit).items():
        vector, strength = edit.vector_of(name), edit.removals[name].strength
        handles.append(writer.module.register_forward_hook(_projection_hook(vector, strength)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projection_hook(vector: Tensor, strength: float) -> Any:  # noqa: ANN401  # torch's hook type is Any
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal vector
        vector = vector.to(output)  # moved once, not at every token
        return project(output, vector, strength)

    return hook
