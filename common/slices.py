"""A weight edited in place, a slice at a time.

Whole, a weight and its changes take several times its own memory in float32, and more time than slices do that
fit a processor's cache. The slices are the same wherever the weight lies, so that the edit on disk and the edit
in memory give the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from common.architecture import Layout

# Which norms of a weight W [d_model, d_in] an edit restores: those of its columns (what one input writes), of
# its rows (what is written to one coordinate of the stream), or none.
KeepNorm = Literal["none", "column", "row"]

# Numbers in a slice: half a megabyte in float32.
SLICE_NUMBERS = 1 << 17


@torch.no_grad()
def edit_in_place(
    weight: Tensor, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm, layout: Layout
) -> tuple[float, float]:
    """Remove from a writer's weight what it writes along orthonormal vectors.

    Computed in float32 or wider, and rounded to the weight's own dtype. Needs little memory beside the weight.

    Args:
        weight: in one of the layouts of `common.architecture`; it is changed.
        basis: orthonormal vectors [k, d_model].
        strengths: [k]; 1 removes all.
        keep_norm: which norms of the weight, read as [d_model, d_in], are restored: each exactly, except that
            of a column or row that lies wholly along a removed vector, which becomes 0.
        layout: how the weight is stored.

    Returns:
        |U W|^2 before and after: what the weight writes along the vectors, summed over them, inputs and experts.

    Source: Arditi et al. 2024, arXiv:2406.11717, "weight orthogonalization"; restoring norms changes
        W' = P W to P W diag(s) (columns), or to diag(1/n) (D P D^-1 W) with D the row norms (rows).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    basis = basis.to(weight.device, wide)
    strengths = strengths.to(weight.device, wide)
    edit = _edit_inputs if writes_last(layout) else _edit_coordinates
    before = after = 0.0
    with _one_thread():
        for matrix in experts_of(weight, layout):
            squares = edit(matrix, basis, strengths, keep_norm)
            before, after = before + squares[0], after + squares[1]
    return before, after


@contextmanager
def _one_thread() -> Iterator[None]:
    """Slices are too small to share, and several threads may add in another order: other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def experts_of(weight: Tensor, layout: Layout) -> Tensor:
    """A weight as [experts, ...]; as a single expert where it is not of a mixture."""
    return weight if layout.startswith("experts") else weight[None]


def writes_last(layout: Layout) -> bool:
    """Whether the last axis of a stored weight is the residual stream's."""
    return layout in ("embedding", "conv1d", "experts_transposed")


def slices_of(matrix: Tensor) -> Sequence[Tensor]:
    """Some rows at a time of a matrix as it is stored, so that a slice is one piece of memory."""
    parts: Sequence[Tensor] = matrix.split(max(1, SLICE_NUMBERS // matrix.shape[1]))
    return parts


def _edit_coordinates(
    matrix: Tensor, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm
) -> tuple[float, float]:
    """Edit a weight [d_model, d_in]: a slice is some coordinates of the stream, for all inputs."""
    parts = slices_of(matrix)
    own = basis.split(len(parts[0]), dim=1)
    widen = _widener(parts, basis.dtype)
    before = _sum(u @ widen(part) for u, part in zip(own, parts, strict=True))
    along = before
    if keep_norm == "row":
        along = _sum(u @ _unit_rows(widen(part))[0] for u, part in zip(own, parts, strict=True))
    removed = strengths[:, None] * along
    scale = basis.new_ones(())
    if keep_norm == "column":
        squares = _sum(widen(part).square().sum(dim=0) for part in parts)
        left = _sum(
            widen(part).addmm_(u.T, removed, alpha=-1).square().sum(dim=0)
            for u, part in zip(own, parts, strict=True)
        )
        scale = _restoring(squares.sqrt(), left.sqrt())
    after = torch.zeros_like(before)
    for u, part in zip(own, parts, strict=True):
        wide = widen(part)
        if keep_norm == "row":
            wide, scale = _unit_rows(wide)
        wide.addmm_(u.T, removed, alpha=-1)
        if keep_norm == "row":
            scale = _ratio(scale, wide.norm(dim=1, keepdim=True))
        part.copy_(wide if keep_norm == "none" else wide.mul_(scale))
        after.addmm_(u, widen(part))
    return float(before.square().sum()), float(after.square().sum())


def _edit_inputs(
    matrix: Tensor, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm
) -> tuple[float, float]:
    """Edit a weight [d_in, d_model]: a slice is some inputs, for all coordinates of the stream."""
    parts = slices_of(matrix)
    widen = _widener(parts, basis.dtype)
    unit = scale = basis.new_ones(())
    if keep_norm == "row":
        norms = _sum(widen(part).square().sum(dim=0) for part in parts).sqrt()
        unit = _ratio(torch.ones_like(norms), norms)

    def project_(wide: Tensor, along: Tensor) -> Tensor:
        return wide.addmm_(along * strengths, basis, alpha=-1)

    if keep_norm == "row":
        scaled = (widen(part).mul_(unit) for part in parts)
        left = _sum(project_(wide, wide @ basis.T).square().sum(dim=0) for wide in scaled)
        scale = _ratio(norms, left.sqrt())
    before, after = basis.new_zeros(()), basis.new_zeros(())
    for part in parts:
        wide = widen(part)
        along = wide @ basis.T
        before += along.square().sum()
        if keep_norm == "row":
            along = wide.mul_(unit) @ basis.T
        elif keep_norm == "column":
            scale = wide.norm(dim=1, keepdim=True)
        project_(wide, along)
        if keep_norm == "column":
            scale = _restoring(scale, wide.norm(dim=1, keepdim=True))
        part.copy_(wide if keep_norm == "none" else wide.mul_(scale))
        after += (widen(part) @ basis.T).square().sum()
    return float(before), float(after)


def _widener(parts: Sequence[Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Gives slices in a wider type, all in the same memory: each until the next."""
    scratch = torch.empty_like(parts[0], dtype=dtype, memory_format=torch.contiguous_format)
    return lambda part: scratch[: len(part)].copy_(part)


def _unit_rows(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the rows of a slice to length 1, in place; returns them and their lengths before."""
    norms = wide.norm(dim=1, keepdim=True)
    return wide.mul_(_ratio(torch.ones_like(norms), norms)), norms


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _restoring(before: Tensor, left: Tensor) -> Tensor:
    """What restores norms; 0 for an input that writes along the vectors alone: only rounding is left of it."""
    noise = before * (8 * torch.finfo(before.dtype).eps) ** 0.5
    return _ratio(before, torch.where(left > noise, left, 0.0))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where nothing is left to rescale."""
    left = denominator > 0
    return torch.where(left, numerator / torch.where(left, denominator, 1.0), 0.0)
