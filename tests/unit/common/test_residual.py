"""The residual stream is read and changed where it says: at the input of a block.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_residual.py
"""

import pytest
import torch

from common import residual
from common.architecture import ARCHITECTURES

IDS = torch.tensor([[0, 40, 41, 99, 120, 7], [0, 50, 51, 52, 53, 54]])


def _forward(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **options)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_reading_gives_the_input_of_every_block(family, build_model, read_stream):
    model = build_model(family)
    with residual.reading(model, 3) as streams:
        _forward(model)
    expected = read_stream(model, IDS)[:-1]
    assert len(streams) == model.config.get_text_config().num_hidden_layers
    for stream, inputs in zip(streams, expected, strict=True):
        assert torch.equal(stream, inputs[:, -3:])


def test_reading_gives_what_blocks_called_by_hand_give(build_model):
    model = build_model("llama")
    with residual.reading(model, IDS.shape[1]) as streams:
        _forward(model)
    hidden = model.model.embed_tokens(IDS)
    rotary = model.model.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    for stream, block in zip(streams, model.model.layers, strict=True):
        torch.testing.assert_close(stream, hidden, rtol=1e-12, atol=1e-12)
        mask = torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()[None, None]
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)


def test_the_last_hidden_state_of_transformers_is_no_residual_stream(build_model, read_stream):
    model = build_model("llama")
    with residual.reading(model, 1) as streams:
        states = _forward(model, output_hidden_states=True).hidden_states
    for stream, state in zip(streams, states[:-1], strict=True):
        assert torch.equal(stream, state[:, -1:])
    end = read_stream(model, IDS)[-1]
    assert (states[-1] - end).abs().max() > 0.1


def test_reading_leaves_no_hook_behind(build_model):
    model = build_model("llama")
    with residual.reading(model, 1) as streams:
        _forward(model)
    _forward(model)
    assert len(streams) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_adding_adds_at_one_layer_and_every_position(layer, build_model, read_stream):
    model = build_model("gemma2")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = read_stream(model, IDS)
    with residual.adding(model, layer, vector):
        # Registered later, so these see the changed input.
        during = read_stream(model, IDS)
    after = read_stream(model, IDS)
    for index in range(layer):
        assert torch.equal(during[index], before[index])
    torch.testing.assert_close(during[layer], before[layer] + vector, rtol=0, atol=1e-12)
    assert (during[-1] - before[-1]).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adding_reaches_blocks_that_get_their_input_by_name(build_model):
    model = build_model("llama")
    block = model.model.layers[0]
    hidden = torch.zeros(1, 2, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, torch.arange(2)[None])
    seen = []
    block.input_layernorm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with residual.adding(model, 0, torch.ones(32)), residual.reading(model, 2) as streams:
        block(hidden_states=hidden, position_embeddings=rotary)
        block(hidden, position_embeddings=rotary)
    assert len(streams) == 2
    assert all(torch.equal(inputs, hidden + 1) for inputs in seen)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_pass_that_only_reads_gives_what_a_whole_pass_gives(family, build_model):
    model = build_model(family, dtype=torch.float32)
    mask = torch.ones_like(IDS)
    with residual.reading(model, 3) as streams:
        _forward(model, attention_mask=mask)
    found = residual.read(model, IDS, mask, 3)
    expected = torch.stack(streams, dim=1)
    assert found.shape == (2, len(streams), 3, 32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_model_works_as_before_after_a_pass_that_only_reads(build_model):
    model = build_model("llama")
    before = _forward(model).logits
    residual.read(model, IDS, torch.ones_like(IDS), 1)
    assert torch.equal(_forward(model).logits, before)
    with residual.reading(model, 1) as streams:
        _forward(model)
    assert len(streams) == model.config.get_text_config().num_hidden_layers
