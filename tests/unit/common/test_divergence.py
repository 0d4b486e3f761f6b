"""Divergences between next-token distributions.

Run: python -m pytest tests/unit/common/test_divergence.py
"""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.divergence import (
    answer_logits,
    batches,
    kl_divergence,
    kl_to_each,
    repetition,
    surprisal,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_equal_distributions_do_not_diverge_whatever_their_logits_offset() -> None:
    logits = torch.randn(5, 7)
    assert torch.all(kl_divergence(logits, logits) == 0)
    assert torch.all(kl_divergence(logits, logits + 3) < 1e-12)


def test_the_divergence_is_the_sum_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = kl_divergence(torch.tensor(p).log(), torch.tensor(q).log())
    assert float(found) == pytest.approx(expected, abs=1e-7)


def test_a_token_that_is_ruled_out_contributes_nothing_unless_only_the_second_rules_it_out() -> (
    None
):
    never = torch.tensor([0.0, 0.0, -math.inf])
    always = torch.tensor([0.0, 0.0, 0.0])
    assert float(kl_divergence(never, never)) == 0.0
    assert float(kl_divergence(never, always)) == pytest.approx(math.log(1.5))
    assert float(kl_divergence(always, never)) == math.inf


def test_rounding_never_makes_a_divergence_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(200, 1000, generator=generator)
    nudged = logits + 1e-7 * torch.randn(200, 1000, generator=generator)
    assert float(kl_divergence(logits, nudged).min()) >= 0.0


def test_half_precision_logits_lose_nothing_more() -> None:
    p, q = torch.randn(3, 50).half(), torch.randn(3, 50).half()
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert kl_divergence(p, q).tolist() == pytest.approx(expected.tolist())


def test_surprisal_is_what_cross_entropy_is_the_mean_of() -> None:
    logits, tokens = torch.randn(6, 9), torch.arange(6)
    expected = torch.nn.functional.cross_entropy(logits, tokens)
    assert float(surprisal(logits, tokens).mean()) == pytest.approx(float(expected), abs=1e-6)
    logits[0, 0] = -math.inf
    assert float(surprisal(logits, tokens)[0]) == math.inf


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)
    assert repetition([1, 1, 1]) == 0.0  # shorter than one gram


def test_divergences_from_one_distribution_are_those_of_each_pair_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    p, *others = (4 * torch.randn(3, 5, 700, generator=generator) for _ in range(4))
    p[..., 3] = -torch.inf
    others[0][..., 3] = -torch.inf
    near = [*others, p + 0.01 * others[1], p]
    for q, found in zip(near, kl_to_each(p, near), strict=True):
        expected = kl_divergence(p, q)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    ruled_out = p.clone()
    ruled_out[..., 4] = -torch.inf
    (found,) = kl_to_each(p, [ruled_out])
    assert bool((found > 1e9).all())
    (broken,) = kl_to_each(p, [torch.full_like(p, torch.nan)])
    assert bool(broken.isnan().all())


def test_answer_logits_predict_each_answer_token_in_batches_as_alone(model) -> None:
    prompts, answers = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]], [[10, 11], [12], [13, 14, 15, 16]]
    together = answer_logits(model, prompts, answers, pad_id=0)
    for prompt, answer, found in zip(prompts, answers, together, strict=True):
        with torch.inference_mode():
            whole = model(torch.tensor([[*prompt, *answer]])).logits[0]
        expected = whole[len(prompt) - 1 : -1]
        assert found.shape == (len(answer), 40)
        assert torch.allclose(found, expected, atol=1e-4)  # float32, other batch shapes


def test_the_last_answer_token_itself_is_never_read(model) -> None:
    one = answer_logits(model, [[1, 2, 3]], [[10, 11]], pad_id=0)[0]
    other = answer_logits(model, [[1, 2, 3]], [[10, 30]], pad_id=0)[0]
    assert torch.equal(one, other)


def test_batches_hold_every_row_once_and_rows_of_like_length_together() -> None:
    lengths = [5, 1, 9, 2, 8, 2, 7]
    found = list(batches(lengths, 3))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert [[lengths[index] for index in batch] for batch in found] == [[1, 2, 2], [5, 7, 8], [9]]
