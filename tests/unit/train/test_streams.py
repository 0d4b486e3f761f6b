"""A sketch of a stream tells distances as the stream does, and nothing about what was removed from it.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_streams.py
"""

import copy

import pytest
import torch
from peft import get_peft_model

from common import residual
from common.architecture import ARCHITECTURES
from common.edits import apply_to_weights
from tests.editing import WIDTH, edit_of, vector
from tests.training import taught
from train.adapter import build_adapter
from train.anchors import (
    anchor_and_stream_loss,
    anchor_loss,
    load_removed,
    load_rows,
    save_rows,
)
from train.streams import Sketch, distance, removed_from_stream

PROMPTS = ["a", "How is the thing made?", "the other one", "x y"]
CPU = torch.device("cpu")
NOTHING = torch.zeros(0, WIDTH, dtype=torch.float64)


def _removed(*vectors):
    return torch.linalg.qr(torch.stack(vectors).T)[0].T.contiguous()


ONE = _removed(vector())


@pytest.fixture(scope="module")
def teacher(build_model):
    return build_model("llama", seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def student(build_model):
    return build_model("llama", seed=2, dtype=torch.float32)


def _taught(teacher, tokenizer, sketch):
    return taught(
        teacher, tokenizer, PROMPTS, top_k=20, max_new_tokens=5, batch_size=3, sketch=sketch
    )


@pytest.mark.parametrize("size", [4, 16, 31])
def test_squared_lengths_are_right_on_average(size):
    sketch, hidden = Sketch(size, NOTHING), vector(3).float()
    found = torch.stack(
        [(hidden @ sketch.matrix([n, 5])).square().sum() for n in range(4000 // size)]
    )
    # Of a chi-squared variable with `size` degrees of freedom, over as many rows.
    error = (2 / size) ** 0.5 / len(found) ** 0.5
    assert float(found.mean() / hidden.square().sum()) == pytest.approx(1, abs=4 * error)
    assert found.std() > 0, "each row has a projection of its own"


def test_a_projection_is_drawn_by_the_tokens_alone():
    sketch = Sketch(8, ONE)
    torch.manual_seed(0)
    first = sketch.matrix([1, 2, 3])
    torch.manual_seed(1)
    assert torch.equal(Sketch(8, ONE).matrix([1, 2, 3]), first)
    assert not torch.allclose(sketch.matrix([1, 2, 4]), first)


@pytest.mark.parametrize("size", [8, WIDTH, 10 * WIDTH])
def test_what_was_removed_is_not_seen(size):
    two = _removed(vector(1), vector(2))
    matrix = Sketch(size, two).matrix([7])
    assert (two.float() @ matrix).abs().max() < 1e-6
    other = vector(3) - two.T @ (two @ vector(3))
    assert (other.float() @ matrix).norm() > 0.1 * other.norm()


@pytest.mark.parametrize("size", [WIDTH, 10 * WIDTH])
def test_a_sketch_as_wide_as_the_stream_keeps_all_of_it(size):
    hidden = torch.randn(1, 6, WIDTH)
    (kept,) = Sketch(size, ONE).of([hidden], [[1, 2, 3, 4]])
    expected = hidden[0, -4:] - (hidden[0, -4:] @ ONE.float().T) @ ONE.float()
    torch.testing.assert_close(kept[:, 0], expected)


def test_no_gradient_leads_back_to_what_was_removed():
    stream = torch.randn(2, 5, WIDTH, requires_grad=True)
    rows = [[1, 2, 3], [4, 5, 6, 7, 8]]
    kept = torch.cat(Sketch(8, ONE).of([stream, 2 * stream], rows))
    distance(kept, torch.randn_like(kept)).sum().backward()
    assert stream.grad.abs().max() > 0.1
    assert (stream.grad @ ONE.float().T).abs().max() < 1e-5 * stream.grad.abs().max()
    assert not stream.grad[0, :2].any(), "padding is no token"


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_what_an_edit_removes_from_the_stream_is_found_behind_every_norm(family, build_model):
    model = build_model(family)
    found = removed_from_stream(model, edit_of(model, "orthogonalize", vector()))
    unit = vector() / vector().norm()
    assert found.shape == (1, WIDTH)
    assert abs(float(found[0] @ unit)) == pytest.approx(1, abs=1e-9)


def test_of_two_removed_directions_both_are_found(build_model):
    model = build_model("gemma3")
    found = removed_from_stream(model, edit_of(model, "orthogonalize", vector(1), vector(2)))
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    both = _removed(vector(1), vector(2))
    assert torch.linalg.matrix_norm(found @ both.T) == pytest.approx(2**0.5, abs=1e-9)


def test_an_edit_that_only_adds_removes_nothing(build_model):
    model = build_model("llama")
    edit = edit_of(model, "add", strength=1.0)
    assert removed_from_stream(model, edit).shape == (0, WIDTH)


@pytest.mark.parametrize("size", [8, WIDTH])
def test_the_kept_streams_are_the_teachers_whatever_stands_in_the_batch(
    size, teacher, tokenizer, read_stream
):
    sketch = Sketch(size, ONE)
    rows = _taught(teacher, tokenizer, sketch)
    assert len({len(row.tokens) for row in rows}) > 1
    for row in rows:
        streams = torch.stack(read_stream(teacher, torch.tensor([row.tokens]))[:-1], dim=2)[0]
        torch.testing.assert_close(row.streams, streams @ sketch.matrix(row.tokens))


def test_rows_with_streams_come_back_as_they_were_saved(teacher, tokenizer, tmp_path):
    sketch, path = Sketch(8, ONE), tmp_path / "anchor.safetensors"
    rows = _taught(teacher, tokenizer, sketch)
    save_rows(rows, path, sketch)
    for one, other in zip(load_rows(path), rows, strict=True):
        assert one.tokens == other.tokens
        assert torch.equal(one.streams, other.streams)
    assert torch.equal(load_removed(path), ONE)


def test_the_distance_is_a_share_of_each_token():
    teacher = torch.randn(6, 3, 8)
    assert distance(teacher, teacher).abs().max() == 0
    torch.testing.assert_close(distance(torch.zeros_like(teacher), teacher), torch.ones(6))
    torch.testing.assert_close(distance(1.5 * teacher, teacher), torch.full((6,), 0.25))
    longer = torch.tensor([1.0, 1000.0, 1, 1, 1, 1])[:, None, None]
    other = torch.randn(6, 3, 8)
    torch.testing.assert_close(
        distance(longer * other, longer * teacher), distance(other, teacher), rtol=1e-4, atol=1e-5
    )


def test_the_teacher_itself_is_at_no_distance_and_another_model_is(teacher, student, tokenizer):
    sketch = Sketch(8, ONE)
    rows = _taught(teacher, tokenizer, sketch)
    with torch.no_grad():
        own = anchor_and_stream_loss(teacher, teacher, rows, 2, CPU, sketch)
        other = anchor_and_stream_loss(student, student, rows, 2, CPU, sketch)
        assert float(other[0]) == pytest.approx(float(anchor_loss(student, rows, 2, CPU)))
    assert float(own[1]) == pytest.approx(0, abs=1e-6)
    assert float(other[1]) > 0.1


def test_the_abliterated_model_differs_from_the_original_by_more_than_what_was_removed(
    teacher, tokenizer
):
    """Else there would be nothing to heal: later blocks read what is gone, and write something else."""
    abliterated = copy.deepcopy(teacher)
    edit = edit_of(teacher, "orthogonalize", vector())
    apply_to_weights(abliterated, edit)
    sketch = Sketch(WIDTH, removed_from_stream(teacher, edit))
    rows = _taught(teacher, tokenizer, sketch)
    with torch.no_grad(), residual.reading(abliterated) as streams:
        abliterated(input_ids=torch.tensor([rows[1].tokens]), use_cache=False)
    (kept,) = sketch.of(streams, [rows[1].tokens])
    off = (kept - rows[1].streams).square().sum(dim=-1).mean(dim=0)
    # The embedding lost the direction and nothing else.
    assert off[0] < 1e-8
    assert (off[1:] > 1e-4).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(reentrant, student, teacher, tokenizer):
    sketch = Sketch(8, ONE)
    rows = _taught(teacher, tokenizer, sketch)
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(student), build_adapter({"r": 4}))
        model.train()
        inner = model.get_base_model()
        if recomputed:
            inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
            inner.enable_input_require_grads()
        _, far = anchor_and_stream_loss(model, inner, rows, 2, CPU, sketch)
        far.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    writers = [name for name, grad in found[0].items() if grad is not None and grad.any()]
    # Nothing after the last block's input has a part in it.
    assert len(writers) > 10
    assert not any(".layers.2." in name for name in writers)
    for name in writers:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-6)


def test_following_the_stream_leads_to_the_teacher_on_texts_it_was_not_shown(teacher, tokenizer):
    model = copy.deepcopy(teacher)
    edit = edit_of(teacher, "orthogonalize", vector())
    apply_to_weights(model, edit)
    sketch = Sketch(8, removed_from_stream(teacher, edit))
    shown, others = (rows := _taught(teacher, tokenizer, sketch))[:3], rows[3:]

    def far(rows):
        return anchor_and_stream_loss(model, model, rows, 2, CPU, sketch)[1]

    before = float(far(others).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        far(shown).backward()
        optimizer.step()
    assert float(far(others).detach()) < 0.5 * before
