"""A weight edited slice by slice is the weight edited whole, and what it wrote is measured on the way.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_slices.py
"""

import pytest
import torch

from common import slices
from common.edits import component_along, edited_weight
from common.slices import edit_in_place

SHAPES = {
    "linear": (24, 40),
    "conv1d": (40, 24),
    "embedding": (40, 24),
    "experts": (3, 24, 40),
    "experts_transposed": (3, 40, 24),
}


def _case(layout):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SHAPES[layout], generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(24, 2, generator=generator, dtype=torch.float64))[0].T
    return weight, basis.contiguous(), torch.tensor([1.0, 0.6], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 100, 1 << 17])
@pytest.mark.parametrize("keep_norm", ["none", "column", "row"])
@pytest.mark.parametrize("layout", sorted(SHAPES))
def test_slices_of_any_size_give_the_weight_edited_whole(layout, keep_norm, size, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_NUMBERS", size)
    weight, basis, strengths = _case(layout)
    expected = edited_weight(weight, basis, strengths, keep_norm, layout)
    before = component_along(weight, basis, layout).square().sum()
    after = component_along(expected, basis, layout).square().sum()
    measured = edit_in_place(weight, basis, strengths, keep_norm, layout)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        torch.tensor(measured, dtype=torch.float64), torch.stack([before, after])
    )


@pytest.mark.parametrize("keep_norm", ["column", "row"])
@pytest.mark.parametrize("layout", ["linear", "embedding"])
def test_the_norms_that_are_kept_are_kept(layout, keep_norm, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_NUMBERS", 100)
    weight, basis, strengths = _case(layout)
    original = weight.clone()
    edit_in_place(weight, basis, strengths, keep_norm, layout)
    axis = (
        (0 if layout == "linear" else 1)
        if keep_norm == "column"
        else (1 if layout == "linear" else 0)
    )
    torch.testing.assert_close(weight.norm(dim=axis), original.norm(dim=axis))
    assert not torch.allclose(weight.norm(dim=1 - axis), original.norm(dim=1 - axis))


def test_a_column_that_lies_wholly_along_the_vector_becomes_zero_and_not_a_number():
    vector = torch.zeros(1, 24, dtype=torch.float64)
    vector[0, 3] = 1
    weight = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:, 2] = 7 * vector[0]
    edit_in_place(weight, vector, torch.ones(1), "column", "linear")
    assert torch.equal(weight[:, 2], torch.zeros(24, dtype=torch.float64))
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_edited_in_float32_and_rounded_once(dtype):
    weight, basis, strengths = _case("linear")
    low = weight.to(dtype)
    exact = edited_weight(low.float(), basis, strengths, "none", "linear")
    edit_in_place(low, basis, strengths, "none", "linear")
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
