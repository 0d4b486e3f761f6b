"""Block by block from disk gives what the whole model gives, with one block in memory.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_layerwise.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliteration import activations, layerwise
from common import residual
from common.architecture import ARCHITECTURES, find_blocks
from common.errors import InputError
from common.model import load_model

HARMFUL = ["a", "How is the thing made?", "the other one", "x", "b" * 40]
HARMLESS = ["made of the rest", "y"]
OPTIONS = {"num_positions": 4, "batch_size": 3}


@pytest.fixture
def save(build_model, tmp_path):
    """Save a model of a family in float32 and return its folder."""

    def write(family="llama", max_shard_size="1GB", **changes):
        model = build_model(family, dtype=torch.float32, **changes)
        model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        return tmp_path / "model"

    return write


def _whole(folder, tokenizer, prompts, **options):
    return activations.collect(load_model(folder), tokenizer, prompts, **OPTIONS, **options)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_it_equals_the_whole_model(family, save, tokenizer):
    folder = save(family)
    found = layerwise.collect(folder, tokenizer, [HARMFUL, HARMLESS], **OPTIONS)
    for part, prompts in zip(found, (HARMFUL, HARMLESS), strict=True):
        expected = _whole(folder, tokenizer, prompts)
        assert part.count == len(prompts)
        torch.testing.assert_close(part.mean, expected.mean, rtol=1e-6, atol=1e-6)
        # Each block changes the stream by far more than the tolerance.
        assert (expected.mean[1:] - expected.mean[:-1]).abs().amax(dim=(1, 2)).min() > 0.05


def test_block_1_is_not_block_10_and_weights_may_lie_in_many_files(save, tokenizer):
    folder = save(num_hidden_layers=12, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    (found,) = layerwise.collect(folder, tokenizer, [HARMFUL], **OPTIONS)
    expected = _whole(folder, tokenizer, HARMFUL)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)


def test_clipping_and_samples_are_those_of_the_whole_model(save, tokenizer, tmp_path):
    folder = save()
    files = [tmp_path / "harmful.npy", tmp_path / "harmless.npy"]
    found = layerwise.collect(
        folder, tokenizer, [HARMFUL, HARMLESS], winsorize=0.9, keep_samples=files, **OPTIONS
    )
    for part, prompts in zip(found, (HARMFUL, HARMLESS), strict=True):
        options = {"winsorize": 0.9, "keep_samples": tmp_path / "whole.npy"}
        expected = _whole(folder, tokenizer, prompts, **options)
        torch.testing.assert_close(part.mean, expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part.samples, expected.samples, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_no_more_than_one_block_is_ever_in_memory(family, save, tokenizer, monkeypatch):
    folder = save(family, num_hidden_layers=6)
    resident = []

    def bytes_in_memory(model):
        return sum(weight.nbytes for weight in model.parameters() if not weight.is_meta)

    build = layerwise.build_without_weights

    def watched(*args):
        model = build(*args)
        assert bytes_in_memory(model) == 0
        for module in [model.model.embed_tokens, *find_blocks(model)]:
            # A block that only notes its call runs no submodule; a block that is applied does.
            inner = getattr(module, "self_attn", module)
            inner.register_forward_pre_hook(
                lambda _module, _args: resident.append(bytes_in_memory(model))
            )
        return model

    monkeypatch.setattr(layerwise, "build_without_weights", watched)
    layerwise.collect(folder, tokenizer, [HARMFUL], **OPTIONS)
    whole = load_model(folder)
    around, block = (
        sum(weight.nbytes for weight in part.parameters())
        for part in (
            torch.nn.ModuleList([whole.model.embed_tokens, whole.model.norm]),
            find_blocks(whole)[0],
        )
    )
    # Two batches are embedded, and go through every block but the last.
    assert resident == [around] * 2 + [block] * 2 * 5


def test_a_block_that_is_used_with_another_blocks_weights_would_show(save, tokenizer):
    folder = save()
    expected = _whole(folder, tokenizer, HARMFUL).mean
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.{}.mlp.down_proj.weight"
    weights[name.format(0)], weights[name.format(1)] = (
        weights[name.format(1)],
        weights[name.format(0)],
    )
    save_file(weights, file, metadata={"format": "pt"})
    (found,) = layerwise.collect(folder, tokenizer, [HARMFUL], **OPTIONS)
    assert (found.mean - expected)[1:].abs().max() > 0.1


@pytest.mark.parametrize(
    "missing", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_a_folder_that_lacks_a_weight_is_named_with_it(missing, save, tokenizer):
    folder = save()
    weights = load_file(folder / "model.safetensors")
    del weights[missing]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=missing):
        layerwise.collect(folder, tokenizer, [HARMFUL], **OPTIONS)


def test_the_dtype_is_the_recipes_or_the_checkpoints(save, tokenizer, monkeypatch):
    folder = save()
    assert layerwise.build_without_weights(folder).dtype == torch.float32
    (rough,) = layerwise.collect(folder, tokenizer, [HARMFUL], dtype="bfloat16", **OPTIONS)
    # An opening that is computed once rounds to bfloat16 in another place.
    monkeypatch.setattr(residual, "can_share_opening", lambda *_: False)
    whole = load_model(folder, dtype="bfloat16")
    expected = activations.collect(whole, tokenizer, HARMFUL, **OPTIONS)
    torch.testing.assert_close(rough.mean, expected.mean, rtol=1e-6, atol=1e-6)
