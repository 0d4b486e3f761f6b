"""A weight edited in place, a slice at a time.

Whole, a weight and its changes take several times its own memory in float32, and more time than the slices do
that fit a processor's cache. The slices are the same wherever the weight lies, so that the edit on disk and the
edit in memory give the same bits.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from common.architecture import Layout

# Which norms of a weight W [d_model, d_in] an edit restores: those of its columns (what one input writes), of
# its rows (what is written to one coordinate of the stream), or none.
KeepNorm = Literal["none", "column", "row"]

# Numbers in a slice: 2 MB in float32.
SLICE_NUMBERS = 1 << 19


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


@torch.no_grad()
def edit_in_place(
    weight: Tensor, basis: Tensor, strengths: Tensor, keep_norm: KeepNorm, layout: Layout
) -> None:
    """Remove from a writer's weight what it writes along orthonormal vectors.

    Computed in float32 or wider, and rounded to the weight's own dtype. Needs little memory beside the weight.

    Args:
        weight: in one of the layouts of `common.architecture`; it is changed.
        basis: orthonormal vectors [k, d_model].
        strengths: [k]; 1 removes all.
        keep_norm: which norms of the weight, read as [d_model, d_in], are restored: each exactly, except that
            of a column or row that lies wholly along a removed vector, which becomes 0.
        layout: how the weight is stored.

    Source: Arditi et al. 2024, arXiv:2406.11717, "weight orthogonalization"; restoring norms changes
        W' = P W to P W diag(s) (columns), or to diag(1/n) (D P D^-1 W) with D the row norms (rows).
    """
    for matrix in experts_by_input(weight, layout):
        if keep_norm == "row":
            _edit_rows(matrix, basis, strengths)
        else:
            _edit_inputs(matrix, basis, strengths, keep_norm=keep_norm == "column")


def written_along(weight: Tensor, basis: Tensor, layout: Layout) -> float:
    """How much a weight writes along vectors [k, d_model]: |U W|^2, summed over vectors and inputs."""
    # What an edit leaves in 16 bits is their rounding, which float32 shows; wider weights need float64.
    dtype = torch.float32 if weight.dtype.itemsize == 2 else torch.float64
    basis = basis.to(dtype)
    return sum(
        float((part.to(dtype) @ basis.T).double().square().sum())
        for matrix in experts_by_input(weight, layout)
        for part in slices_of(matrix)
    )


def experts_by_input(weight: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Views [d_in, d_model] of a weight, one per expert: row j is what input j writes."""
    writes_last = layout in ("embedding", "conv1d", "experts_transposed")
    for matrix in weight if layout.startswith("experts") else weight[None]:
        yield matrix if writes_last else matrix.T


def slices_of(matrix: Tensor) -> Iterator[Tensor]:
    """Views [some inputs, d_model] of a matrix [d_in, d_model]."""
    yield from matrix.split(max(1, SLICE_NUMBERS // matrix.shape[1]))


def _edit_inputs(matrix: Tensor, basis: Tensor, strengths: Tensor, *, keep_norm: bool) -> None:
    for part in slices_of(matrix):
        wide = _widened(part)
        edited = project(wide, basis, strengths)
        if keep_norm:
            edited = edited * _ratio(wide.norm(dim=-1), edited.norm(dim=-1)).unsqueeze(-1)
        part.copy_(edited)


def _edit_rows(matrix: Tensor, basis: Tensor, strengths: Tensor) -> None:
    """A row of W runs through all slices: its norms before and behind the projection come first."""
    norms = _joined([_widened(part).norm(dim=0) for part in slices_of(matrix)])
    scale = _ratio(torch.ones_like(norms), norms)
    projected = (project(_widened(part) * scale, basis, strengths) for part in slices_of(matrix))
    restored = _ratio(norms, _joined([part.norm(dim=0) for part in projected]))
    for part in slices_of(matrix):
        part.copy_(project(_widened(part) * scale, basis, strengths) * restored)


def _joined(norms: list[Tensor]) -> Tensor:
    """The norms of rows from those of their pieces."""
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)


def _widened(part: Tensor) -> Tensor:
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where nothing is left to rescale."""
    left = denominator > 0
    return torch.where(left, numerator / torch.where(left, denominator, 1.0), 0.0)
