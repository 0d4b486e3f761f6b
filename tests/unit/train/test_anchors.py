"""Anchors measure how far a model is from its teacher, exactly where they claim to.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_anchors.py
"""

import copy
from collections import Counter

import pytest
import torch

from common.divergence import kl_divergence
from tests.training import taught
from train.anchors import (
    AnchorBatches,
    TeacherRow,
    anchor_loss,
    anchored_divergence,
    load_rows,
    save_rows,
)

PROMPTS = ["a", "How is the thing made?", "the other one", "x y"]
CPU = torch.device("cpu")


def _logits(seed, scale=2.0, tokens=20, vocab=50):
    return scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


def _top(logits, k):
    logps, ids = torch.log_softmax(logits, dim=-1).topk(k, dim=-1)
    return ids, logps


@pytest.fixture(scope="module")
def teacher(build_model):
    return build_model("llama", seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def student(build_model):
    return build_model("llama", seed=2, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(teacher, tokenizer):
    return taught(teacher, tokenizer, PROMPTS, top_k=280, max_new_tokens=6, batch_size=3)


def test_with_the_whole_vocabulary_the_divergence_is_the_exact_kl():
    teacher, student = _logits(0), _logits(1)
    expected = kl_divergence(teacher, student)
    found = anchored_divergence(student, *_top(teacher, 50))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 49])
def test_with_fewer_tokens_it_is_a_lower_bound_that_grows_with_k(k):
    teacher, student = _logits(0), _logits(1)
    exact = kl_divergence(teacher, student)
    found = anchored_divergence(student, *_top(teacher, k)).double()
    more = anchored_divergence(student, *_top(teacher, min(k + 10, 50))).double()
    assert (found <= exact + 1e-5).all()
    assert (found <= more + 1e-5).all()
    assert found.mean() > 0.05 * exact.mean()


@pytest.mark.parametrize("k", [2, 7])
def test_the_rest_of_the_vocabulary_is_one_bucket(k):
    teacher, student = _logits(0), _logits(1)
    ids, logps = _top(teacher, k)
    p, q = torch.softmax(teacher, dim=-1).double(), torch.softmax(student, dim=-1).double()
    for token in range(len(teacher)):
        inside = set(ids[token].tolist())
        outside = [index for index in range(50) if index not in inside]
        pairs = [(p[token, index], q[token, index]) for index in inside]
        pairs.append((p[token, outside].sum(), q[token, outside].sum()))
        expected = sum(a * (a / b).log() for a, b in pairs)
        found = anchored_divergence(
            student[token : token + 1], ids[token : token + 1], logps[token : token + 1]
        )
        assert float(found) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_a_model_equal_to_its_teacher_has_no_divergence(k, scale):
    logits = _logits(0, scale)
    found = anchored_divergence(logits, *_top(logits, k))
    assert found.abs().max() < 1e-5


@pytest.mark.parametrize("k", [5, 50])
def test_its_gradient_leads_to_the_teacher(k):
    teacher, student = _logits(0), _logits(1).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    first = None
    for _ in range(300):
        loss = anchored_divergence(student, *_top(teacher, k)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first if first is not None else loss.item()
    assert loss.item() < 1e-2 * first
    ids, logps = _top(teacher, k)
    found = torch.log_softmax(student, dim=-1).gather(-1, ids)
    torch.testing.assert_close(found.detach().exp(), logps.exp(), rtol=0, atol=0.01)


def test_the_gradient_of_the_exact_form_is_softmax_minus_teacher():
    teacher, student = _logits(0), _logits(1).requires_grad_()
    anchored_divergence(student, *_top(teacher, 50)).sum().backward()
    expected = torch.softmax(student, dim=-1) - torch.softmax(teacher, dim=-1)
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_certain_models_give_finite_numbers_and_gradients(scale):
    teacher, student = _logits(0, scale), _logits(1, scale).requires_grad_()
    loss = anchored_divergence(student, *_top(teacher, 5)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_a_teacher_answers_greedily_and_says_where_it_ended(teacher, tokenizer):
    ended = copy.deepcopy(teacher)
    full = taught(teacher, tokenizer, PROMPTS, top_k=5, max_new_tokens=6, batch_size=3)
    assert [len(row.answer) for row in full] == [6] * 4
    ended.generation_config.eos_token_id = full[0].answer[2]
    first = taught(ended, tokenizer, PROMPTS, top_k=5, max_new_tokens=6, batch_size=3)[0]
    cut = full[0].answer.index(full[0].answer[2])
    assert first.answer[:cut] == full[0].answer[:cut]
    assert len(first.answer) == cut + 1, "the end itself is a position to hold"


def test_the_kept_distributions_are_the_teachers_at_every_answer_token(teacher, rows):
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        with torch.no_grad():
            logits = teacher(ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        expected = torch.log_softmax(logits, dim=-1)
        found = torch.full_like(expected, torch.nan).scatter(-1, row.top_ids, row.top_logps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (row.top_logps.diff(dim=-1) <= 0).all()
        assert row.top_ids[:, 0].tolist() == row.answer


def test_top_k_beyond_the_vocabulary_keeps_all_of_it(teacher, tokenizer, rows):
    more = taught(teacher, tokenizer, PROMPTS, top_k=10_000, max_new_tokens=6, batch_size=3)
    assert [row.top_ids.shape[-1] for row in more] == [280] * 4


def test_rows_come_back_as_they_were_saved(rows, tmp_path):
    path = tmp_path / "anchor.safetensors"
    save_rows(rows, path)
    loaded = load_rows(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["anchor.safetensors"]
    assert len(loaded) == len(rows)
    for one, other in zip(loaded, rows, strict=True):
        assert (one.prompt, one.answer) == (other.prompt, other.answer)
        assert torch.equal(one.top_ids, other.top_ids)
        assert torch.equal(one.top_logps, other.top_logps)


def test_the_loss_is_the_sum_over_rows_without_padding(student, rows):
    expected = 0.0
    for row in rows:
        with torch.no_grad():
            logits = student(torch.tensor([row.prompt + row.answer]), use_cache=False).logits[0]
        scored = logits[len(row.prompt) - 1 : -1]
        expected += float(anchored_divergence(scored, row.top_ids, row.top_logps).sum())
    assert len({len(row.prompt) for row in rows}) > 1
    uneven = [
        TeacherRow(rows[0].prompt, rows[0].answer[:2], rows[0].top_ids[:2], rows[0].top_logps[:2])
    ]
    with torch.no_grad():
        found = float(anchor_loss(student, rows, 2, CPU))
        short = float(anchor_loss(student, uneven, 2, CPU))
        mixed = float(anchor_loss(student, [*uneven, rows[1]], 2, CPU))
        other = float(anchor_loss(student, rows[1:2], 2, CPU))
    assert found == pytest.approx(expected, rel=1e-5)
    assert mixed == pytest.approx(short + other, rel=1e-5)


def test_the_loss_of_the_teacher_itself_is_zero(teacher, rows):
    with torch.no_grad():
        assert float(anchor_loss(teacher, rows, 2, CPU)) == pytest.approx(0, abs=1e-4)


def test_the_loss_moves_every_parameter(student, rows):
    model = copy.deepcopy(student)
    anchor_loss(model, rows, 2, CPU).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def _numbered(count):
    return [
        TeacherRow([number], [0], torch.zeros(1, 1), torch.zeros(1, 1)) for number in range(count)
    ]


def _numbers(batches, step):
    return [row.prompt[0] for row in batches.batch(step)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (7, 3), (3, 8), (1, 5)])
def test_batches_depend_on_the_step_alone(count, size):
    forward = AnchorBatches(_numbered(count), size, seed=3)
    inorder = [_numbers(forward, step) for step in range(12)]
    jumping = AnchorBatches(_numbered(count), size, seed=3)
    for step in (11, 0, 5, 5, 2, 9, 1):
        assert _numbers(jumping, step) == inorder[step]
    assert all(len(batch) == size for batch in inorder)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 3), (3, 8)])
def test_every_pass_goes_once_over_all_rows(count, size):
    batches = AnchorBatches(_numbered(count), size, seed=3)
    stream = [number for step in range(30) for number in _numbers(batches, step)]
    passes = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
    assert len(passes) > 5
    assert all(Counter(one) == Counter(range(count)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1, "every pass has an order of its own"


def test_another_seed_gives_another_order():
    one, other = (AnchorBatches(_numbered(20), 20, seed) for seed in (0, 1))
    assert _numbers(one, 0) != _numbers(other, 0)
