"""The mean residual stream is the mean over prompts as the model sees them one by one.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_activations.py
"""

import pytest
import torch

from abliteration.activations import mean_residual_stream
from common import chat

PROMPTS = ["a", "How is the thing made?", "the other one", "x", "a much longer prompt than those"]
NUM_POSITIONS = 4


def _one_by_one(model, tokenizer, read_stream, prompts=PROMPTS):
    """The mean over single, unpadded prompts."""
    total = 0
    for ids in chat.encode(tokenizer, prompts):
        blocks = read_stream(model, torch.tensor([ids]))[:-1]
        total = total + torch.stack([block[0, -NUM_POSITIONS:] for block in blocks])
    return total / len(prompts)


def _mean(model, tokenizer, batch_size, prompts=PROMPTS):
    return mean_residual_stream(
        model, tokenizer, prompts, num_positions=NUM_POSITIONS, batch_size=batch_size
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_mean_is_that_of_single_unpadded_prompts(
    family, batch_size, build_model, tokenizer, read_stream
):
    # Gemma 2 has eager attention only, whose float64 mask overflows in a softmax in float32.
    model = build_model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    mean = _mean(model, tokenizer, batch_size)
    assert mean.shape == (model.config.num_hidden_layers, NUM_POSITIONS, 32)
    assert mean.dtype == torch.float64
    expected = _one_by_one(model, tokenizer, read_stream).double()
    # Norms and rotary angles compute in float32, so the order of sums may cost a float32 ulp.
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_prompts_does_not_matter(build_model, tokenizer):
    model = build_model("llama")
    mean, other = _mean(model, tokenizer, 2), _mean(model, tokenizer, 2, PROMPTS[::-1])
    torch.testing.assert_close(mean, other, rtol=1e-6, atol=1e-7)


def test_reading_padding_would_show(build_model, tokenizer, read_stream, monkeypatch):
    model = build_model("llama")
    real = chat.pad_left

    def without_mask(*args):
        ids, mask = real(*args)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(chat, "pad_left", without_mask)
    expected = _one_by_one(model, tokenizer, read_stream)
    assert (_mean(model, tokenizer, 5) - expected).abs().max() > 1e-2
    torch.testing.assert_close(_mean(model, tokenizer, 1), expected, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_would_show(build_model, tokenizer, read_stream, monkeypatch):
    model = build_model("llama")

    def pad_right(rows, pad_id, device):
        longest = max(map(len, rows))
        ids = torch.tensor([list(row) + [pad_id] * (longest - len(row)) for row in rows])
        return ids, (ids != pad_id).long()

    monkeypatch.setattr(chat, "pad_left", pad_right)
    expected = _one_by_one(model, tokenizer, read_stream)
    assert (_mean(model, tokenizer, 5) - expected).abs().max() > 1e-2


def test_no_hook_stays_on_the_model(build_model, tokenizer):
    model = build_model("llama")
    _mean(model, tokenizer, 5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_low_precision_activations_are_summed_in_float64(build_model, tokenizer, read_stream):
    model = build_model("llama", dtype=torch.bfloat16)
    expected = 0
    for ids in chat.encode(tokenizer, PROMPTS):
        blocks = read_stream(model, torch.tensor([ids]))[:-1]
        expected = expected + torch.stack([block[0, -NUM_POSITIONS:].double() for block in blocks])
    torch.testing.assert_close(
        _mean(model, tokenizer, 1), expected / len(PROMPTS), rtol=1e-12, atol=1e-12
    )
