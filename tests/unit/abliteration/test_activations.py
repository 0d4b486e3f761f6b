"""Activations are those of prompts as the model sees them one by one.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_activations.py
"""

import numpy as np
import pytest
import torch

from abliteration.activations import MIN_OPENING, clip_outliers, collect, shared_opening
from common import chat, distributed, residual
from common.architecture import ARCHITECTURES, find_blocks
from common.errors import StageError

PROMPTS = ["a", "How is the thing made?", "the other one", "x", "a much longer prompt than those"]
# Begin alike, as prompts behind a system prompt do.
OPENED = [f"and the rest {prompt}" for prompt in PROMPTS]
NUM_POSITIONS = 4


def _one_by_one(model, tokenizer, read_stream, prompts=PROMPTS):
    """Each prompt's activations without padding [prompts, layers, positions, d_model]."""
    rows = []
    for ids in chat.encode(tokenizer, prompts):
        blocks = read_stream(model, torch.tensor([ids]))[:-1]
        rows.append(torch.stack([block[0, -NUM_POSITIONS:].double() for block in blocks]))
    return torch.stack(rows)


def _collect(model, tokenizer, batch_size=2, prompts=PROMPTS, **options):
    return collect(
        model, tokenizer, prompts, num_positions=NUM_POSITIONS, batch_size=batch_size, **options
    )


@pytest.mark.parametrize("prompts", [PROMPTS, OPENED], ids=["different", "opened"])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_mean_is_that_of_single_unpadded_prompts(
    family, prompts, build_model, tokenizer, read_stream
):
    model = build_model(family, dtype=torch.float32)
    found = _collect(model, tokenizer, batch_size=3, prompts=prompts)
    assert found.mean.shape == (model.config.get_text_config().num_hidden_layers, NUM_POSITIONS, 32)
    assert found.mean.dtype == torch.float64
    assert (found.count, found.samples) == (len(PROMPTS), None)
    expected = _one_by_one(model, tokenizer, read_stream, prompts).mean(dim=0)
    torch.testing.assert_close(found.mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_matter(batch_size, build_model, tokenizer, read_stream):
    model = build_model("llama")
    found = _collect(model, tokenizer, batch_size)
    expected = _one_by_one(model, tokenizer, read_stream).mean(dim=0)
    # Norms and rotary angles compute in float32, so the order of sums may cost a float32 ulp.
    torch.testing.assert_close(found.mean, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_prompts_does_not_matter_to_the_last_bit(build_model, tokenizer):
    model = build_model("llama")
    assert torch.equal(
        _collect(model, tokenizer).mean, _collect(model, tokenizer, prompts=PROMPTS[::-1]).mean
    )


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_what_the_processes_read_adds_up(num_processes, build_model, tokenizer, monkeypatch):
    model = build_model("llama")
    whole = _collect(model, tokenizer).mean
    parts = []
    for rank in range(num_processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: num_processes)
        monkeypatch.setattr(distributed, "sum_over_processes", lambda tensor: tensor)
        monkeypatch.setattr(distributed, "barrier", lambda: None)
        parts.append(_collect(model, tokenizer).mean)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


def test_reading_padding_would_show(build_model, tokenizer, monkeypatch):
    model = build_model("llama")
    expected = _collect(model, tokenizer, batch_size=1).mean
    real = chat.pad_left

    def without_mask(*args):
        ids, mask = real(*args)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(chat, "pad_left", without_mask)
    assert (_collect(model, tokenizer, batch_size=5).mean - expected).abs().max() > 1e-2
    torch.testing.assert_close(_collect(model, tokenizer, 1).mean, expected, rtol=1e-5, atol=1e-6)


def test_padding_on_the_right_is_refused(build_model, tokenizer, monkeypatch):
    def pad_right(rows, pad_id, device):
        longest = max(map(len, rows))
        ids = torch.tensor([list(row) + [pad_id] * (longest - len(row)) for row in rows])
        return ids, (ids != pad_id).long()

    monkeypatch.setattr(chat, "pad_left", pad_right)
    with pytest.raises(ValueError, match="pad on the left"):
        _collect(build_model("llama"), tokenizer, batch_size=5)


def test_more_positions_than_a_prompt_has_are_refused(build_model, tokenizer):
    with pytest.raises(ValueError, match="padding"):
        collect(build_model("llama"), tokenizer, PROMPTS, num_positions=20, batch_size=5)
    with pytest.raises(ValueError, match="padding"):
        collect(build_model("llama"), tokenizer, ["a"], num_positions=50, batch_size=5)


def test_nothing_behind_the_last_input_runs(build_model, tokenizer):
    model = build_model("llama")
    blocks = find_blocks(model)
    ran = []
    modules = {"first": blocks[0].mlp, "last": blocks[-1].mlp, "norm": model.model.norm}
    for name, module in {**modules, "unembedding": model.lm_head}.items():
        module.register_forward_pre_hook(lambda _module, _args, name=name: ran.append(name))
    _collect(model, tokenizer, batch_size=5)
    assert set(ran) == {"first"}


def test_no_hook_stays_on_the_model(build_model, tokenizer):
    model = build_model("llama")
    ids = torch.tensor([[0, 40, 41]])
    before = model(input_ids=ids).logits
    _collect(model, tokenizer)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_low_precision_activations_are_summed_in_float64(build_model, tokenizer, tmp_path):
    model = build_model("llama", dtype=torch.bfloat16)
    found = _collect(model, tokenizer, keep_samples=tmp_path / "samples.npy")
    # A bfloat16 is a float32 to the last bit.
    expected = found.samples.double().mean(dim=0)
    torch.testing.assert_close(found.mean, expected, rtol=1e-12, atol=1e-12)


def test_what_all_prompts_begin_with_is_computed_once(build_model, tokenizer, monkeypatch):
    model = build_model("llama")
    encoded = chat.encode(tokenizer, OPENED)
    shared = shared_opening(encoded, NUM_POSITIONS)
    assert shared >= MIN_OPENING
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _module, args: seen.append(tuple(args[0].shape))
    )
    found = _collect(model, tokenizer, batch_size=1, prompts=OPENED)
    assert sorted(seen) == sorted([(1, shared), *((1, len(ids) - shared) for ids in encoded)])
    monkeypatch.setattr(residual, "can_share_opening", lambda *_: False)
    whole = _collect(model, tokenizer, batch_size=1, prompts=OPENED)
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_a_window_shorter_than_the_prompts_forbids_to_share_their_opening(
    family, build_model, tokenizer, monkeypatch
):
    prompts = [*OPENED, "and the rest " + "b" * 14]
    longest = max(map(len, chat.encode(tokenizer, prompts)))
    narrow, wide = (
        build_model(family, dtype=torch.float32, sliding_window=window)
        for window in (longest - 1, longest)
    )
    assert residual.can_share_opening(wide, longest)
    assert not residual.can_share_opening(narrow, longest)
    shared = _collect(wide, tokenizer, batch_size=9, prompts=prompts).mean
    narrow_mean = _collect(narrow, tokenizer, batch_size=9, prompts=prompts).mean
    monkeypatch.setattr(residual, "can_share_opening", lambda *_: False)
    whole = _collect(wide, tokenizer, batch_size=9, prompts=prompts).mean
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(residual, "can_share_opening", lambda *_: True)
    wrong = _collect(narrow, tokenizer, batch_size=9, prompts=prompts).mean
    assert (wrong - narrow_mean).abs().max() > 1e-3


def test_layers_that_keep_a_state_cannot_share_an_opening(build_model):
    model = build_model("llama")
    assert residual.can_share_opening(model, 10**6)
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert not residual.can_share_opening(model, 10)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]], 2),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]], 3),
        ([[1, 2, 3, 4]], 2),
        ([[7, 1, 1], [8, 1, 1]], 0),
        ([[1], [1, 2]], 0),
    ],
)
def test_the_shared_opening_leaves_what_is_read(rows, shared):
    assert shared_opening(rows, 2) == shared


@pytest.mark.parametrize("winsorize", [None, 0.8])
def test_samples_are_each_prompts_own_in_their_order(
    winsorize, build_model, tokenizer, read_stream, tmp_path
):
    model = build_model("llama")
    file = tmp_path / "samples.npy"
    found = _collect(model, tokenizer, winsorize=winsorize, keep_samples=file)
    expected = _one_by_one(model, tokenizer, read_stream)
    if winsorize is not None:
        expected = clip_outliers(expected, winsorize)
    assert (found.samples.dtype, found.samples.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(found.samples.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.samples.double().mean(dim=0), found.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.samples_at(1), expected[:, 1], rtol=1e-5, atol=1e-6)


def test_samples_lie_on_disk_and_stay_as_they_were_read(build_model, tokenizer, tmp_path):
    file = tmp_path / "samples.npy"
    found = _collect(build_model("llama"), tokenizer, keep_samples=file)
    stored = np.load(file)
    assert torch.equal(torch.from_numpy(stored), found.samples)
    found.samples.zero_()
    assert np.array_equal(np.load(file), stored)


def test_samples_that_were_not_kept_cannot_be_read(build_model, tokenizer):
    with pytest.raises(ValueError, match="keep_samples"):
        _collect(build_model("llama"), tokenizer).samples_at(0)


@pytest.mark.parametrize("size", [2, 7, 32, 1001])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_a_vector_is_clipped_at_the_quantile_of_its_own_magnitudes(size, quantile):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 4, size, generator=generator, dtype=torch.float64) ** 3
    limit = torch.quantile(vectors.abs(), quantile, dim=-1, keepdim=True)
    expected = torch.minimum(torch.maximum(vectors, -limit), limit)
    torch.testing.assert_close(clip_outliers(vectors, quantile), expected, rtol=1e-12, atol=1e-12)


def test_a_vector_is_clipped_the_same_in_any_company():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    company = vectors.clone()
    company[1:] *= 1000
    assert torch.equal(clip_outliers(company, 0.9)[0], clip_outliers(vectors, 0.9)[0])


def test_a_stream_that_overflows_names_its_first_layer(build_model, tokenizer):
    model = build_model("llama")
    with torch.no_grad():
        find_blocks(model)[1].mlp.down_proj.weight.mul_(1e308)
    with pytest.raises(StageError, match="input of block 2"):
        _collect(model, tokenizer)
