"""The map of writers: every family's residual stream is the sum of what the mapped writers give.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_architecture.py
"""

import dataclasses

import pytest
import torch

from common import architecture
from common.architecture import ARCHITECTURES, architecture_of, find_blocks, find_writers
from common.errors import InputError

IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90]])


def _contributions(model):
    """What every mapped writer, and the norm behind it if there is one, adds to the stream."""
    collected, handles = {}, []
    for writer in find_writers(model):
        source = writer.post_norm if writer.post_norm is not None else writer.module
        handles.append(
            source.register_forward_hook(
                lambda _module, _args, output, name=writer.name: collected.__setitem__(name, output)
            )
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return collected


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_mapped_writers_add_up_to_the_residual_stream(family, build_model, read_stream):
    model = build_model(family)
    collected = _contributions(model)
    total = collected.pop("model.embed_tokens")
    if family.startswith("gemma"):
        total = read_stream(model, IDS)[0]  # the stream begins with the scaled embedding
    end = read_stream(model, IDS)[-1]
    for contribution in collected.values():
        total = total + contribution.view_as(total)
    torch.testing.assert_close(total, end, rtol=1e-12, atol=1e-12)


def test_a_missing_writer_would_show_in_the_sum(build_model, read_stream):
    model = build_model("llama")
    collected = _contributions(model)
    collected.pop("model.layers.1.mlp.down_proj")
    total = sum(collected.values())
    assert (total - read_stream(model, IDS)[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_block_has_its_writers_in_order(family, build_model):
    model = build_model(family)
    writers = find_writers(model)
    blocks = find_blocks(model)
    assert writers[0].name == "model.embed_tokens"
    assert len(blocks) == model.config.num_hidden_layers
    assert len(writers) == 1 + 2 * len(blocks)
    for writer in writers:
        assert writer.weight.shape[-1 if writer.layout == "embedding" else -2] == 32
        assert model.get_submodule(writer.name) is writer.module


def test_a_model_with_dense_and_sparse_blocks_gets_the_writer_of_each(build_model):
    layouts = {writer.name: writer.layout for writer in find_writers(build_model("qwen3_moe"))}
    assert layouts["model.layers.0.mlp.down_proj"] == "linear"
    assert layouts["model.layers.1.mlp.experts"] == "experts"


@pytest.mark.parametrize(
    ("family", "offset"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("olmo2", 0.0)]
)
def test_the_gain_of_a_post_norm_is_what_the_norm_multiplies_with(family, offset, build_model):
    model = build_model(family)
    for writer in find_writers(model)[1:]:
        ones = torch.ones(1, 32, dtype=torch.float64)
        with torch.no_grad():
            applied = writer.post_norm(ones)[0]
        # The norm computes in float32, and rms(1) differs from 1 by its epsilon.
        torch.testing.assert_close(writer.post_norm_gain, applied, rtol=1e-5, atol=1e-6)
        assert writer.norm_gain_offset == offset


def test_families_without_post_norms_have_no_gain(build_model):
    assert all(writer.post_norm_gain is None for writer in find_writers(build_model("qwen2")))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_recognised(tied, build_model):
    model = build_model("llama", tie_word_embeddings=tied)
    assert find_writers(model)[0].tied is tied
    assert not any(writer.tied for writer in find_writers(model)[1:])


def test_an_unmapped_family_is_refused_with_the_mapped_ones():
    with pytest.raises(InputError, match=r"'mamba' is not mapped.*gemma2.*common/architecture\.py"):
        architecture_of("mamba")


def test_a_block_without_a_mapped_writer_is_refused(build_model, monkeypatch):
    model = build_model("llama")
    wrong = (architecture.Writer("self_attn.o_proj"), architecture.Writer("mlp.no_such_proj"))
    changed = dataclasses.replace(ARCHITECTURES["llama"], writers=wrong)
    monkeypatch.setitem(ARCHITECTURES, "llama", changed)
    with pytest.raises(InputError, match=r"block 0 holds 1 of the writers.*no_such_proj"):
        find_writers(model)
