"""An edit applied to the outputs of writers while a context lasts; the weights stay as they are.

One pass can serve several edits at once (*trials*): the rows of the batch fall into equal consecutive parts,
one per trial, and every hook edits each part with vectors of its own. Edits that keep norms have closed forms
in a few products of vectors and weight, so that a trial costs O(d_model + d_in) per writer. With P the
projection, W the weight, U the vectors and s the strengths:

- columns: y' = P W (q * x) + P b with q_j = |w_j| / |P w_j| and |P w_j|^2 = |w_j|^2 - sum_i s_i (2 - s_i) c_ij^2,
  where c = U W;
- rows: y' = (W x - sum_i s_i (D u_i) (a_i . x)) / n + P b, where D holds the row norms of W, a = U D^-1 W, and
  n the row norms of P D^-1 W.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.architecture import PlacedWriter
from common.edits import (
    Edit,
    Removal,
    as_stored,
    edited_bias,
    edited_weight,
    known_writers,
    project,
)
from common.slices import KeepNorm


@dataclass(frozen=True)
class Form:
    """What the hooks of one writer compute in each of T trials.

    Attributes:
        basis: orthonormal vectors [T, k, d_model].
        strengths: [T, k].
        input_scale: q [T, d_in], where column norms are kept.
        inner: a [T, k, d_in], where row norms are kept.
        outer: s D u [T, k, d_model], where row norms are kept.
        output_scale: 1 / n [T, d_model], where row norms are kept.
    """

    basis: Tensor
    strengths: Tensor
    input_scale: Tensor | None = None
    inner: Tensor | None = None
    outer: Tensor | None = None
    output_scale: Tensor | None = None

    def like(self, tensor: Tensor) -> "Form":
        """The same numbers with the dtype and on the device of a tensor."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Form(**{name: value.to(tensor) for name, value in given.items()})


def column_form(basis: Tensor, strengths: Tensor, written: Tensor, squares: Tensor) -> Form:
    """The form of an edit that keeps column norms.

    Args:
        basis: orthonormal vectors [T, k, d_model].
        strengths: [T, k].
        written: c = U W [T, k, d_in].
        squares: squared norms [d_in] of the columns of W.
    """
    removed = ((strengths * (2 - strengths)).unsqueeze(-1) * written.square()).sum(dim=-2)
    left = squares - removed
    # A column along the vectors has nothing left to rescale; rounding must not make its root imaginary.
    kept = left > squares * torch.finfo(squares.dtype).eps * 8
    scale = torch.where(kept, (squares / torch.where(kept, left, 1.0)).sqrt(), 0.0)
    return Form(basis, strengths, input_scale=scale)


def row_form(
    basis: Tensor, strengths: Tensor, inner: Tensor, correlation: Tensor, norms: Tensor
) -> Form:
    """The form of an edit that keeps row norms.

    Args:
        basis: orthonormal vectors [T, k, d_model].
        strengths: [T, k].
        inner: a = U D^-1 W [T, k, d_in].
        correlation: a W^T D^-1 [T, k, d_model].
        norms: D [d_model], the norms of the rows of W.
    """
    weighted = strengths.unsqueeze(-1) * basis
    gram = inner @ inner.mT
    squares = (
        1 - 2 * (weighted * correlation).sum(dim=-2) + (weighted * (gram @ weighted)).sum(dim=-2)
    )
    kept = (norms > 0) & (squares > 0)
    scale = torch.where(kept, torch.where(kept, squares, 1.0).rsqrt(), 0.0)
    return Form(basis, strengths, inner=inner, outer=weighted * norms, output_scale=scale)


def form_of(writer: PlacedWriter, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm) -> Form:
    """The form of T edits at one writer, from the weight itself: one or two products with it.

    Args:
        writer: any but experts whose norms are kept: their inputs are inside the module.
        basis: orthonormal vectors [T, k, d_model].
        strengths: [T, k].
        keep_norm: of all T edits.
    """
    if keep_norm == "none":
        return Form(basis, strengths)
    weight = _by_input(writer)
    basis, strengths = basis.to(weight), strengths.to(weight)
    if keep_norm == "column":
        return column_form(basis, strengths, basis @ weight.mT, weight.square().sum(dim=-1))
    norms = weight.norm(dim=0)
    divisor = norms.where(norms > 0, 1.0)
    inner = (basis / divisor) @ weight.mT
    return row_form(basis, strengths, inner, inner @ weight / divisor, norms)


def _by_input(writer: PlacedWriter) -> Tensor:
    """A writer's weight as [d_in, d_model] in float32 or wider: what each input writes."""
    weight = writer.weight.detach()
    return as_stored(weight.to(torch.promote_types(weight.dtype, torch.float32)), writer.layout)


@contextmanager
def applied_by_hooks(model: nn.Module, edit: Edit) -> Iterator[None]:
    """Apply an edit while the context lasts.

    By linearity one hook on a block of experts equals the edit of every expert; where their norms are kept the
    edited weight stands in for the module's own during its forward pass.

    Raises:
        InputError: if the edit was made for another architecture.
    """
    writers = known_writers(model, edit)
    with ExitStack() as stack:
        for name, removal in edit.removals.items():
            writer = writers[name]
            if removal.is_void:
                continue
            if removal.keep_norm != "none" and writer.layout.startswith("experts"):
                stack.enter_context(_standing_in(writer, edit, removal))
            else:
                basis, strengths = edit.basis(name)[None], edit.strengths(name)[None]
                form = form_of(writer, basis, strengths, removal.keep_norm)
                stack.enter_context(_editing(writer, form))
        for name, addition in edit.additions.items():
            handle = _add(writers[name], addition.amount * edit.vectors[addition.vector])
            stack.callback(handle.remove)
        yield


def add_for_good(model: nn.Module, edit: Edit) -> None:
    """Make an edit's additions a part of a model, as long as it lives.

    Raises:
        InputError: if the edit was made for another architecture.
    """
    writers = known_writers(model, edit)
    for name, addition in edit.additions.items():
        _add(writers[name], addition.amount * edit.vectors[addition.vector])


@contextmanager
def applied_in_trials(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Apply several edits at once: the rows of the batch fall into equal consecutive parts, one per edit.

    Raises:
        InputError: if an edit was made for another architecture.
        ValueError: if the edits cannot share a pass: see `share_a_pass`.
    """
    if len(edits) == 1:
        with applied_by_hooks(model, edits[0]):
            yield
        return
    writers = known_writers(model, edits[0])
    if not share_a_pass(writers.values(), edits):
        raise ValueError("these edits cannot share a pass")
    with ExitStack() as stack:
        for name, removal in edits[0].removals.items():
            basis = torch.stack([edit.basis(name) for edit in edits])
            strengths = torch.stack([edit.strengths(name) for edit in edits])
            form = form_of(writers[name], basis, strengths, removal.keep_norm)
            stack.enter_context(_editing(writers[name], form))
        yield


def share_a_pass(writers: Iterable[PlacedWriter], edits: Sequence[Edit]) -> bool:
    """Whether edits can be trials of one pass: all remove as many vectors, keep the same norms, and add nothing.

    Experts whose norms are kept have one weight for all rows.
    """
    shapes = {
        (name, len(removal.vectors), removal.keep_norm)
        for edit in edits
        for name, removal in edit.removals.items()
    }
    if len(shapes) != len(edits[0].removals) or any(edit.additions for edit in edits):
        return False
    return all(edit.is_low_rank() for edit in edits) or not any(
        writer.layout.startswith("experts") for writer in writers
    )


@contextmanager
def _editing(writer: PlacedWriter, form: Form) -> Iterator[None]:
    """Edit the output of one writer in T trials: the rows of the batch fall into T equal consecutive parts."""
    trials, moved = form.basis.shape[0], form
    handles = []

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal moved
        moved = moved.like(args[0])
        assert moved.input_scale is not None
        parts = args[0].reshape(trials, -1, args[0].shape[-1])
        return ((parts * moved.input_scale.unsqueeze(1)).reshape(args[0].shape), *args[1:])

    def behind(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal moved
        moved = moved.like(output)  # moved once, not at every token
        if output.shape[0] % trials:
            # Positions that all rows share, say: they cannot be edited differently for each trial.
            raise ValueError(f"{writer.name} gives {output.shape[0]} rows, not a share per trial")
        parts = output.reshape(trials, -1, output.shape[-1])
        if writer.layout == "embedding":
            edited = _embedded(writer, moved, args[0].reshape(trials, -1), parts)
        elif moved.inner is not None:
            edited = _row_scaled(writer.bias, moved, args[0], parts)
        else:
            edited = project(parts, moved.basis, moved.strengths)
        return edited.reshape(output.shape)

    if form.input_scale is not None and writer.layout != "embedding":
        handles.append(writer.module.register_forward_pre_hook(before))
    handles.append(writer.module.register_forward_hook(behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_scaled(bias: Tensor | None, form: Form, inputs: Tensor, output: Tensor) -> Tensor:
    assert form.inner is not None
    assert form.outer is not None
    assert form.output_scale is not None
    shift = bias if bias is not None else output.new_zeros(())
    inputs = inputs.reshape(output.shape[0], -1, inputs.shape[-1])
    edited = (output - shift - (inputs @ form.inner.mT) @ form.outer) * form.output_scale.unsqueeze(
        1
    )
    if bias is None:
        return edited
    return edited + project(bias[None], form.basis, form.strengths)


def _embedded(writer: PlacedWriter, form: Form, ids: Tensor, output: Tensor) -> Tensor:
    """An embedding's input is an index: the forms' products with the input become look-ups."""
    if form.inner is not None:
        assert form.outer is not None
        assert form.output_scale is not None
        # Some families scale what they look up.
        looked_up = writer.weight[ids].norm(dim=-1, keepdim=True)
        scale = output.norm(dim=-1, keepdim=True) / looked_up.where(looked_up > 0, 1.0)
        along = torch.stack([inner[:, row] for inner, row in zip(form.inner, ids, strict=True)])
        turned: Tensor = output - scale * along.mT @ form.outer
        return turned * form.output_scale.unsqueeze(1)
    edited = project(output, form.basis, form.strengths)
    if form.input_scale is None:
        return edited
    kept = torch.stack([scale[row] for scale, row in zip(form.input_scale, ids, strict=True)])
    return edited * kept.unsqueeze(-1)


@contextmanager
def _standing_in(writer: PlacedWriter, edit: Edit, removal: Removal) -> Iterator[None]:
    """Let edited weights stand in for those of a module during its forward pass."""
    basis, strengths = edit.basis(writer.name), edit.strengths(writer.name)
    weight = edited_weight(writer.weight, basis, strengths, removal.keep_norm, writer.layout)
    own, edited = [writer.weight.data], [weight]
    if writer.bias is not None:
        own.append(writer.bias.data)
        edited.append(edited_bias(writer.bias, basis, strengths))

    def put(tensors: list[Tensor]) -> None:
        writer.weight.data = tensors[0]
        if writer.bias is not None:
            writer.bias.data = tensors[1]

    def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        put(edited)

    def behind(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        put(own)
        return output

    handles = [
        writer.module.register_forward_pre_hook(before),
        writer.module.register_forward_hook(behind, always_call=True),
    ]
    try:
        yield
    finally:
        put(own)
        for handle in handles:
            handle.remove()


def _add(writer: PlacedWriter, vector: Tensor) -> RemovableHandle:
    """Add a vector [d_model] beside a writer's contribution: behind the norm that the contribution passes."""

    def behind(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        moved: Tensor = torch.add(output, vector.to(output))
        return moved

    module = writer.post_norm if writer.post_norm is not None else writer.module
    handle: RemovableHandle = module.register_forward_hook(behind)
    return handle
