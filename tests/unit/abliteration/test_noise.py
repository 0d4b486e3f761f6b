"""A model measured against itself shows what the batch alone changes, and only that.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_noise.py
"""

import pytest
import torch

from abliteration import noise
from abliteration.noise import self_divergence
from common import chat

PROMPTS = [
    "do it",
    "tell me how the other thing is made",
    "how?",
    "why does the rest not rest at all",
]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-15), (torch.float32, 1e-10)])
def test_in_wide_numbers_a_model_is_itself_in_any_batch(
    batch_size, dtype, limit, build_model, tokenizer
):
    assert (
        self_divergence(build_model("llama", dtype=dtype), tokenizer, PROMPTS, batch_size) < limit
    )


def test_prompts_are_compared_with_themselves_in_batches_of_another_size(monkeypatch):
    seen = []

    def logits(_model, _tokenizer, prompts, batch_size):
        seen.append((tuple(prompts), batch_size))
        return torch.tensor([[0.0, 1.0], [1.0, 0.0]]) * (len(seen) % 2)

    monkeypatch.setattr(noise, "next_token_logits", logits)
    # KL of the softmax of (0, 1) against the even distribution of two.
    p = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0)
    expected = float((p * (2 * p).log()).sum())
    for size, other in ((8, 1), (1, 2)):
        seen.clear()
        assert self_divergence(None, None, ["a", "b"], size) == pytest.approx(expected)
        assert seen == [(("a", "b"), size), (("a", "b"), other)]


def test_a_batch_that_leaks_into_its_rows_is_seen(build_model, tokenizer, monkeypatch):
    def unmasked(rows, pad_id, device, real=chat.pad_left):
        ids, mask = real(rows, pad_id, device)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(chat, "pad_left", unmasked)
    assert self_divergence(build_model("llama"), tokenizer, PROMPTS, 4) > 1e-3
