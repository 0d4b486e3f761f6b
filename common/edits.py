"""A saved edit, and what it does to weights: unit vectors, and how strongly each is removed from which writer.

The edit is an artifact, not a model: a few vectors and numbers that hooks (`common.hooks`), the weights in
memory (here), the weights on disk (`common.checkpoint`) and a LoRA adapter (`common.lora`) all apply to the
same effect. For a writer y = W x + b with orthonormal vectors u_i and strengths s_i every form computes
y' = (I - sum_i s_i u_i u_i^T) y, which is directional ablation (Arditi et al. 2024, arXiv:2406.11717,
section 2.4) for one vector at strength 1. An edit that keeps norms rescales the columns or rows of W behind it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import artifacts
from common.architecture import Layout, PlacedWriter, find_writers
from common.errors import InputError, StageError
from common.slices import KeepNorm, edit_in_place, writes_last

FORMAT = 2
# In a model folder: additions that no bias can hold; hooks make them when the folder is loaded.
SIDECAR = "additions.safetensors"


@dataclass(frozen=True)
class Removal:
    """What is taken out of one writer.

    Attributes:
        vectors: names of orthonormal vectors of the edit.
        strengths: one per vector; 1 removes all of it. Where all are 0 the weight stays as it is, and the
            vectors say what healing may not write there.
        keep_norm: which norms of the weight are restored.
    """

    vectors: tuple[str, ...]
    strengths: tuple[float, ...]
    keep_norm: KeepNorm = "none"

    @property
    def is_void(self) -> bool:
        """Whether nothing is taken out."""
        return not any(self.strengths)


@dataclass(frozen=True)
class Addition:
    """What is added to the residual stream beside a writer's contribution, at every token.

    Attributes:
        vector: name of a unit vector of the edit.
        amount: how far, in the units of the residual stream; negative goes against it.
    """

    vector: str
    amount: float


@dataclass(frozen=True)
class Edit:
    """An edit of one checkpoint: directions that are removed from its writers, or added to the stream.

    Attributes:
        vectors: unit vectors [d_model] in float64 by name; `direction` is the direction itself, the others are
            what single writers need instead (`abliteration.placement`).
        removals: what is removed from each writer, by the writer's name in the model.
        additions: what is added beside a writer, by its name.
        left_alone: writers that are not edited, with the reason.
        about: where the direction comes from: layer, position, stream, base model, template hash.
    """

    vectors: Mapping[str, Tensor]
    removals: Mapping[str, Removal]
    additions: Mapping[str, Addition]
    left_alone: Mapping[str, str]
    about: Mapping[str, Any]

    @property
    def direction(self) -> Tensor:
        """The direction the edit is about, a unit vector [d_model]."""
        return self.vectors["direction"]

    def basis(self, writer: str) -> Tensor:
        """The orthonormal vectors [k, d_model] that are removed from a writer."""
        return torch.stack([self.vectors[name] for name in self.removals[writer].vectors])

    def strengths(self, writer: str) -> Tensor:
        """How strongly each of them is removed: [k] in float64."""
        return torch.tensor(self.removals[writer].strengths, dtype=torch.float64)

    def content(self) -> str:
        """A hash of which vectors are removed from which writer, however strongly."""
        removed = {name: removal.vectors for name, removal in self.removals.items()}
        vectors = {name: vector.tolist() for name, vector in self.vectors.items()}
        return artifacts.hash_data([removed, vectors])

    def is_low_rank(self) -> bool:
        """Whether every change of a weight has the rank of its vectors, so that an adapter can hold it."""
        return all(removal.keep_norm == "none" for removal in self.removals.values())


def save_edit(edit: Edit, path: Path) -> None:
    """Write an edit as safetensors; the same edit gives the same bytes."""
    about = {
        "format": FORMAT,
        "removals": {
            name: {"vectors": r.vectors, "strengths": r.strengths, "keep_norm": r.keep_norm}
            for name, r in edit.removals.items()
        },
        "additions": {
            name: {"vector": a.vector, "amount": a.amount} for name, a in edit.additions.items()
        },
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
            f"{path} cannot be read as an edit: {error}; name an edit.safetensors of stage one"
        ) from error
    try:
        about = json.loads(metadata or "{}")
        found = about.get("format")
        if found == FORMAT:
            return _edit_of(vectors, about)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged: what stands beside its vectors is no edit; make or fetch it again"
        ) from error
    raise InputError(f"{path} is no edit of format {FORMAT} (found {found}); make it again")


def _edit_of(vectors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Edit:
    removals = {
        name: Removal(tuple(r["vectors"]), tuple(r["strengths"]), r["keep_norm"])
        for name, r in about["removals"].items()
    }
    additions = {name: Addition(**a) for name, a in about["additions"].items()}
    used = {name for removal in removals.values() for name in removal.vectors}
    used |= {addition.vector for addition in additions.values()}
    if not used <= set(vectors):
        raise ValueError
    return Edit(vectors, removals, additions, about["left_alone"], about["about"])


def project(output: Tensor, basis: Tensor, strengths: Tensor) -> Tensor:
    """Remove a share of the components along orthonormal vectors from the last axis.

    Args:
        output: [..., tokens, d_model].
        basis: orthonormal vectors [..., k, d_model].
        strengths: [..., k].

    Returns:
        output - sum_i s_i (output . u_i) u_i, of the same shape.
    """
    basis = basis.to(output)
    return output - (output @ basis.mT * strengths.to(output).unsqueeze(-2)) @ basis


def edited_weight(
    weight: Tensor, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm, layout: Layout
) -> Tensor:
    """Remove from a writer's weight what it writes along orthonormal vectors.

    Args:
        weight: in one of the layouts of `common.architecture`.
        basis: orthonormal vectors [k, d_model].
        strengths: [k]; 1 removes all.
        keep_norm: which norms of the weight, read as [d_model, d_in], are restored: each exactly, except that
            of a column or row that lies wholly along a removed vector, which becomes 0.
        layout: how the weight is stored.

    Returns:
        The edited weight, computed in float32 or wider and cast back to the weight's dtype.

    Source: Arditi et al. 2024, arXiv:2406.11717, "weight orthogonalization"; restoring norms changes
        W' = P W to P W diag(s) (columns), or to diag(1/n) (D P D^-1 W) with D the row norms (rows).
    """
    edited = weight.detach().clone(memory_format=torch.contiguous_format)
    edit_in_place(edited, basis, strengths, keep_norm, layout)
    return edited


def edited_bias(bias: Tensor, basis: Tensor, strengths: Tensor) -> Tensor:
    """Remove from a writer's bias, [d_model] or [experts, d_model], what it writes along orthonormal vectors."""
    wide = bias.detach().to(torch.promote_types(bias.dtype, torch.float32))
    rows = wide.reshape(-1, wide.shape[-1])
    return project(rows, basis, strengths).reshape(bias.shape).to(bias.dtype)


def component_along(weight: Tensor, basis: Tensor, layout: Layout) -> Tensor:
    """What a writer's weight writes along vectors [k, d_model]: U W in float64, [..., d_in, k]."""
    wide = weight.detach().to(torch.float64)
    by_input = as_stored(wide, layout)
    return by_input @ basis.to(wide).T


def edited_writers(model: nn.Module, edit: Edit) -> dict[str, PlacedWriter]:
    """The writers of a model that an edit removes something from, by name.

    Raises:
        InputError: if the model lacks one of them or has a writer that the edit does not know: the edit was
            made for another architecture.
    """
    writers = known_writers(model, edit)
    return {name: writers[name] for name in edit.removals}


@torch.no_grad()
def apply_to_weights(model: nn.Module, edit: Edit) -> None:
    """Edit a model's weights in place, biases included; additions go into the biases of their writers.

    Raises:
        InputError: if the edit was made for another architecture, or adds where no bias can hold it.
        StageError: if a weight did not change although the edit removes something from it (coverage).
    """
    writers = known_writers(model, edit)
    for name, removal in edit.removals.items():
        if removal.is_void:
            continue
        writer, basis, strengths = writers[name], edit.basis(name), edit.strengths(name)
        edited = edited_weight(writer.weight, basis, strengths, removal.keep_norm, writer.layout)
        if torch.equal(edited, writer.weight):
            raise StageError(
                f"abliteration: {name} did not change under the edit, so it still writes what it wrote; its side "
                "or layout in common/architecture.py is wrong, or the direction is not one of this model's"
            )
        writer.weight.copy_(edited)
        if writer.bias is not None:
            writer.bias.copy_(edited_bias(writer.bias, basis, strengths))
    for name, addition in edit.additions.items():
        if not holds_additions(writers[name]):
            raise InputError(
                f"the edit adds a vector beside {name}, which has no bias that could hold it; apply it by hooks"
            )
        bias = writers[name].bias
        assert bias is not None
        added = bias.double() + addition.amount * edit.vectors[addition.vector].to(bias.device)
        bias.copy_(added.to(bias.dtype))


def holds_additions(writer: PlacedWriter) -> bool:
    """Whether a vector added to a writer's bias reaches the residual stream as it is.

    The bias of an expert is weighted by the router, and what lies before a norm is rescaled by it.
    """
    return writer.bias is not None and writer.bias.ndim == 1 and writer.post_norm is None


def known_writers(model: nn.Module, edit: Edit) -> dict[str, PlacedWriter]:
    """Every writer of a model by name, if the edit was made for such a model.

    Raises:
        InputError: if it was not.
    """
    writers = {writer.name: writer for writer in find_writers(model)}
    named = {*edit.removals, *edit.additions, *edit.left_alone}
    # A removal that does not know every writer would leave some unedited in silence; an addition needs one only.
    odd = sorted(named ^ set(writers) if edit.removals else named - set(writers))
    if odd:
        raise InputError(
            f"the edit and the model name different writers ({', '.join(odd[:3])}{' ...' if odd[3:] else ''}); "
            "an edit fits only the architecture and depth it was made for"
        )
    return writers


def as_stored(weight: Tensor, layout: Layout) -> Tensor:
    """A weight [..., d_in, d_model] (what each input writes) in its layout, and the other way round."""
    return weight if writes_last(layout) else weight.mT
