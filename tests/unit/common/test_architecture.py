"""The map of writers, held against the residual stream itself and against what transformers saves.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_architecture.py
"""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING

from common.architecture import (
    ARCHITECTURES,
    RECURRENT,
    Architecture,
    DiskTensor,
    Writer,
    architecture_of,
    find_blocks,
    find_writers,
    on_disk,
)
from common.errors import InputError
from tests.conftest import FAMILIES

IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90]])
SANDWICHED = ["gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3"]
DIRECTION = nn.functional.normalize(
    torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=0
)
# Axis of d_model in a weight of each layout, written without the code under test.
OUTPUT_AXIS = {
    "linear": 0,
    "conv1d": 1,
    "embedding": 1,
    "experts": 1,
    "experts_transposed": 2,
}
# One case for every writer entry of every family.
ENTRIES = [
    (family, writer.module)
    for family, mapped in ARCHITECTURES.items()
    for writer in (*mapped.embeddings, *mapped.writers)
]


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


def _remove(weight, vector, axis):
    """W - u (u . W) along one axis, in place."""
    along = torch.tensordot(weight.data, vector, dims=([axis], [0]))
    weight.data -= (along.unsqueeze(-1) * vector).movedim(-1, axis)


def _remove_from_all(model, spare=()):
    """Edit every writer's weight and bias at full strength, but for the named entries."""
    for writer in find_writers(model):
        if any(writer.name.endswith("." + module) for module in spare):
            continue
        vector = DIRECTION
        if writer.post_norm is not None:
            vector = nn.functional.normalize(writer.post_norm_gain * DIRECTION, dim=0)
        _remove(writer.weight, vector, OUTPUT_AXIS[writer.layout])
        if writer.bias is not None:
            _remove(writer.bias, vector, -1)


def _along(streams):
    """The largest share of the stream along the direction, at any block and position."""
    return max(float((s @ DIRECTION).abs().max() / s.norm(dim=-1).max()) for s in streams)


def _norm_in_float64(model):
    """Let the norms behind writers compute in float64: transformers' compute in float32."""

    def exactly(norm, args, output, gain):
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        mean_square = args[0].pow(2).mean(-1, keepdim=True)
        exact = gain * args[0] / (mean_square + eps).sqrt()
        torch.testing.assert_close(exact, output, rtol=1e-4, atol=1e-5)
        return exact

    for writer in find_writers(model):
        if writer.post_norm is not None:
            writer.post_norm.register_forward_hook(
                lambda norm, args, output, gain=writer.post_norm_gain: exactly(
                    norm, args, output, gain
                )
            )


def _changed(monkeypatch, family, **changes):
    mapped = dataclasses.replace(ARCHITECTURES[family], **changes)
    monkeypatch.setitem(ARCHITECTURES, family, mapped)


def test_every_mapped_family_has_a_tiny_model():
    assert set(FAMILIES) == set(ARCHITECTURES)


# In qwen2_moe a gate scales what the shared expert writes, so its output alone is not what is added.
@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"qwen2_moe"}))
def test_the_mapped_writers_add_up_to_the_residual_stream(family, build_model, read_stream):
    model = build_model(family)
    end = read_stream(model, IDS)[-1]
    total = sum(contribution.view(-1, 32) for contribution in _contributions(model).values())
    torch.testing.assert_close(total.view_as(end), end, rtol=1e-12, atol=1e-12)


def test_a_missing_writer_would_show_in_the_sum(build_model, read_stream):
    model = build_model("llama")
    collected = _contributions(model)
    collected.pop("model.layers.1.mlp.down_proj")
    total = sum(collected.values())
    assert (total - read_stream(model, IDS)[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_nothing_is_left_along_a_direction_removed_from_every_writer(
    family, build_model, read_stream
):
    model = build_model(family)
    _norm_in_float64(model)
    assert _along(read_stream(model, IDS)) > 1e-2
    _remove_from_all(model)
    assert _along(read_stream(model, IDS)) < 1e-10


@pytest.mark.parametrize(("family", "module"), ENTRIES)
def test_any_one_writer_that_is_not_edited_shows_in_the_stream(
    family, module, build_model, read_stream
):
    model = build_model(family)
    _norm_in_float64(model)
    _remove_from_all(model, spare=[module])
    assert _along(read_stream(model, IDS)) > 1e-3


@pytest.mark.parametrize(("family", "module"), [("gpt2", "attn"), ("llama", "self_attn")])
def test_the_wrong_side_of_a_square_weight_would_show(
    family, module, build_model, read_stream, monkeypatch
):
    model = build_model(family)
    monkeypatch.setitem(OUTPUT_AXIS, "linear", 1)
    monkeypatch.setitem(OUTPUT_AXIS, "conv1d", 0)
    squares = [w for w in find_writers(model) if f".{module}." in w.name]
    assert all(writer.weight.shape == (32, 32) for writer in squares)
    for writer in squares:
        _remove(writer.weight, DIRECTION, OUTPUT_AXIS[writer.layout])
    monkeypatch.undo()
    _remove_from_all(model, spare=[writer.name.split(".", 2)[2] for writer in squares])
    assert _along(read_stream(model, IDS)) > 1e-3


@pytest.mark.parametrize("family", SANDWICHED)
def test_a_post_norm_that_is_not_mapped_would_show(family, build_model, read_stream, monkeypatch):
    mapped = ARCHITECTURES[family]
    bare = [dataclasses.replace(writer, post_norm=None) for writer in mapped.writers]
    norms = [writer.post_norm for writer in mapped.writers]
    _changed(monkeypatch, family, writers=tuple(bare), readers=(*mapped.readers, *norms))
    model = build_model(family)
    _remove_from_all(model)
    assert _along(read_stream(model, IDS)) > 1e-3


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_writers_come_in_order_with_their_block_and_component(family, build_model):
    model = build_model(family)
    mapped = architecture_of(family)
    writers = find_writers(model)
    blocks = find_blocks(model)
    assert writers[0].name == mapped.embedding
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    before = [writer for writer in writers if writer.block is None]
    assert writers[: len(before)] == before
    assert {writer.component for writer in before} == {"embedding"}
    for index in range(len(blocks)):
        inside = [writer for writer in writers if writer.block == index]
        assert inside[0].component == "attention"
        assert {writer.component for writer in inside[1:]} == {"mlp"}
        assert all(writer.name.startswith(f"{mapped.blocks}.{index}.") for writer in inside)
    for writer in writers:
        assert writer.weight.shape[OUTPUT_AXIS[writer.layout]] == 32
        assert model.get_submodule(writer.name) is writer.module
        if writer.bias is not None:
            assert writer.bias.shape[-1] == 32


def test_a_model_with_dense_and_sparse_blocks_gets_the_writer_of_each(build_model):
    layouts = {writer.name: writer.layout for writer in find_writers(build_model("deepseek_v3"))}
    assert layouts["model.layers.0.mlp.down_proj"] == "linear"
    assert layouts["model.layers.1.mlp.experts"] == "experts"
    assert layouts["model.layers.1.mlp.shared_experts.down_proj"] == "linear"


def test_the_bias_of_fused_experts_has_one_row_for_each(build_model):
    experts = [w for w in find_writers(build_model("gpt_oss")) if w.component == "mlp"]
    assert [tuple(writer.bias.shape) for writer in experts] == [(4, 32)] * 3


@pytest.mark.parametrize("family", SANDWICHED)
def test_the_gain_of_a_post_norm_is_what_the_norm_multiplies_with(family, build_model):
    model = build_model(family)
    behind = [writer for writer in find_writers(model) if writer.block is not None]
    for writer in behind:
        ones = torch.ones(1, 32, dtype=torch.float64)
        with torch.no_grad():
            applied = writer.post_norm(ones)[0]
        # The norm computes in float32, and rms(1) differs from 1 by its epsilon.
        torch.testing.assert_close(writer.post_norm_gain, applied, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - set(SANDWICHED)))
def test_families_without_post_norms_have_no_gain(family, build_model):
    assert all(writer.post_norm_gain is None for writer in find_writers(build_model(family)))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_is_recognised(tied, family, build_model):
    model = build_model(family, tie_word_embeddings=tied)
    assert find_writers(model)[0].tied is tied
    assert not any(writer.tied for writer in find_writers(model)[1:])


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_parameter_that_is_not_mapped_is_an_error_that_names_it(family, build_model, monkeypatch):
    """Every entry of the map is needed: without it the model has a parameter that nothing explains."""
    model = build_model(family)
    find_writers(model)
    mapped = ARCHITECTURES[family]
    for field in ("embeddings", "writers", "readers", "left_alone", "final_norm", "unembedding"):
        for path, changed in _without_each_entry(getattr(mapped, field)):
            if path == "self_attn.q_proj" and family == "deepseek_v3":
                continue  # only without latent queries, see the next test
            _changed(monkeypatch, family, **{field: changed})
            with pytest.raises(InputError, match=rf"{re.escape(path)}.*name it in common/arch"):
                find_writers(model)
            monkeypatch.undo()


def _without_each_entry(value):
    """The path of every entry of a field of the map, with what the field is without it."""
    if isinstance(value, str):
        yield value, "nowhere"
    elif isinstance(value, dict):
        yield from ((path, {p: why for p, why in value.items() if p != path}) for path in value)
    else:
        for entry in value:
            path = entry.module if isinstance(entry, Writer) else entry
            yield path, tuple(other for other in value if other != entry)


def test_queries_without_a_latent_space_are_mapped_too(build_model):
    model = build_model("deepseek_v3", q_lora_rank=None)
    assert hasattr(find_blocks(model)[0].self_attn, "q_proj")
    find_writers(model)


@pytest.mark.parametrize(
    "place", ["model", "model.layers.1", "model.layers.2.mlp", "model.layers.0.self_attn"]
)
def test_a_module_that_the_map_does_not_know_is_an_error_that_names_it(place, build_model):
    model = build_model("llama")
    model.get_submodule(place).detour = nn.Linear(32, 32)
    message = rf"{re.escape(place)}\.detour\.weight, {re.escape(place)}\.detour\.bias: not mapped"
    with pytest.raises(InputError, match=message):
        find_writers(model)


def test_a_bare_vector_that_the_map_does_not_know_is_an_error_that_names_it(build_model):
    model = build_model("llama")
    find_blocks(model)[1].offset = nn.Parameter(torch.zeros(32))
    with pytest.raises(InputError, match=r"model\.layers\.1\.offset: not mapped"):
        find_writers(model)


def test_the_undeclared_bias_of_an_expert_is_an_error_that_names_it(build_model):
    model = build_model("mixtral")
    experts = find_blocks(model)[0].mlp.experts
    experts.down_proj_bias = nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts\.down_proj_bias: not mapped"):
        find_writers(model)


def test_a_block_without_one_of_its_writers_is_refused(build_model):
    model = build_model("llama")
    find_blocks(model)[1].mlp = nn.Identity()
    with pytest.raises(InputError, match="block 1 holds no mlp writer"):
        find_writers(model)


def test_what_is_left_alone_has_a_reason():
    reasons = [why for mapped in ARCHITECTURES.values() for why in mapped.left_alone.values()]
    assert len(reasons) == 5
    assert all(why == "it writes at the positions of images only" for why in reasons)


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_what_reads_images_writes_nothing_where_there_is_only_text(
    family, build_model, read_stream
):
    model = build_model(family)
    before = read_stream(model, IDS)
    with torch.no_grad():
        for path in architecture_of(family).left_alone:
            for parameter in model.get_submodule(path).parameters():
                parameter.add_(1.0)
    after = read_stream(model, IDS)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_an_unmapped_family_is_refused_with_the_mapped_ones():
    with pytest.raises(InputError, match=r"'bloom' is not mapped.*gemma2.*common/architecture\.py"):
        architecture_of("bloom")


@pytest.mark.parametrize("family", ["mamba", "jamba", "falcon_h1", "qwen3_next", "qwen3_5_text"])
def test_a_family_with_a_recurrent_state_is_refused_for_that_reason(family):
    with pytest.raises(InputError, match=f"'{family}' has layers with a recurrent state") as raised:
        architecture_of(family)
    assert "is not mapped" not in str(raised.value)


def test_every_recurrent_family_is_one_that_transformers_knows():
    assert {f for f in RECURRENT if not {f, f + "_text"} & set(CONFIG_MAPPING)} == set()
    assert not RECURRENT & set(ARCHITECTURES)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_saved_checkpoint_gives_back_every_writer_bit_for_bit(family, build_model, tmp_path):
    model = build_model(family, dtype=torch.float32, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        owner = on_disk(architecture_of(family), name)
        if owner is not None:
            found.setdefault((owner.writer, owner.part), []).append((owner, tensor))
    expected = {}
    for writer in find_writers(model):
        expected[writer.name, "weight"] = writer.weight, writer.layout
        if writer.bias is not None:
            expected[writer.name, "bias"] = writer.bias, writer.layout
    assert found.keys() == expected.keys()
    for key, (tensor, layout) in expected.items():
        assert torch.equal(_joined(found[key], layout), tensor), key


def _joined(parts, layout):
    if len(parts) == 1 and parts[0][0].expert is None:
        assert parts[0][0].layout == layout
        return parts[0][1]
    assert all(owner.layout == "linear" for owner, _ in parts)
    ordered = sorted(parts, key=lambda part: part[0].expert)
    assert [owner.expert for owner, _ in ordered] == list(range(len(parts)))
    return torch.stack([tensor for _, tensor in ordered])


def test_layer_1_is_not_mistaken_for_layers_10_and_11(build_model, tmp_path):
    model = build_model("llama", dtype=torch.float32, num_hidden_layers=12)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    owners = {name: on_disk(architecture_of("llama"), name) for name in stored}
    of_layer_1 = [
        n for n, owner in owners.items() if owner and owner.writer.startswith("model.layers.1.")
    ]
    assert sorted(of_layer_1) == [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]
    assert sum(owner is not None for owner in owners.values()) == 1 + 2 * 12


@pytest.mark.parametrize(
    ("family", "name", "owner"),
    [
        (
            "mixtral",
            "model.layers.3.block_sparse_moe.experts.12.w2.weight",
            DiskTensor("model.layers.3.mlp.experts", "weight", "linear", 12),
        ),
        (
            "gpt_oss",
            "model.layers.3.mlp.experts.down_proj_bias",
            DiskTensor("model.layers.3.mlp.experts", "bias", "experts_transposed"),
        ),
        # Older checkpoints of these families have another prefix than the one transformers writes now.
        ("gpt2", "wpe.weight", DiskTensor("transformer.wpe", "weight", "embedding")),
        (
            "gpt2",
            "h.7.mlp.c_proj.bias",
            DiskTensor("transformer.h.7.mlp.c_proj", "bias", "conv1d"),
        ),
        (
            "qwen2_5_vl",
            "model.language_model.layers.3.self_attn.o_proj.weight",
            DiskTensor("model.language_model.layers.3.self_attn.o_proj", "weight", "linear"),
        ),
        (
            "gemma3",
            "model.language_model.embed_tokens.weight",
            DiskTensor("model.language_model.embed_tokens", "weight", "embedding"),
        ),
    ],
)
def test_a_name_on_disk_leads_to_its_writer(family, name, owner):
    assert on_disk(architecture_of(family), name) == owner


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.layers.1.self_attn.q_proj.weight"),
        ("llama", "model.layers.1.self_attn.o_proj.weight_scale"),
        ("llama", "model.layers.self_attn.o_proj.weight"),
        ("llama", "draft.model.layers.1.self_attn.o_proj.weight"),
        ("llama", "modelXlayers.1.self_attn.o_proj.weight"),
        ("gpt_neox", "embed_out.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("qwen2_5_vl", "visual.blocks.0.mlp.down_proj.weight"),
        ("gemma3", "vision_tower.encoder.layers.0.self_attn.o_proj.weight"),
    ],
)
def test_a_tensor_of_no_writer_is_attributed_to_none(family, name):
    assert on_disk(architecture_of(family), name) is None


def test_a_map_is_plain_data():
    assert ARCHITECTURES["llama"] == Architecture(
        ARCHITECTURES["llama"].writers, ARCHITECTURES["llama"].readers
    )
    assert hash(ARCHITECTURES["gemma3"]) != hash(ARCHITECTURES["gemma3_text"])
