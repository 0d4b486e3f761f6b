"""The adapter form of an edit does what its hooks do, at the rank of its vectors.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_lora.py
"""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from common.edits import Addition, apply_to_weights
from common.errors import InputError
from common.hooks import applied_by_hooks
from common.lora import save_adapter
from tests.conftest import FAMILIES
from tests.editing import mixed_edit

IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90, 17, 18, 19, 20]])
# The only switch PEFT has for biases replaces the model's own while the adapter is loaded, on or off.
REPLACES_BIASES = ("gpt2", "gpt_neox", "gpt_oss")


def _adapted(model, edit, folder):
    model.save_pretrained(folder / "source", max_shard_size="20KB")
    save_adapter(folder / "source", edit, folder / "adapter")
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "adapter")).eval()


def _difference(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapter_hooks_and_weights_give_the_same_residual_stream(
    family, build_model, read_stream, tmp_path
):
    model = build_model(family)
    edit = mixed_edit(model)
    before = read_stream(model, IDS)[-1]
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)[-1]
    adapted = _adapted(model, edit, tmp_path)
    with_adapter = read_stream(adapted.get_base_model(), IDS)[-1]
    merged = read_stream(adapted.merge_and_unload(), IDS)[-1]
    apply_to_weights(model, edit)
    weighted = read_stream(model, IDS)[-1]
    assert _difference(before, hooked) > 0.05, "the edit has no effect"
    assert _difference(with_adapter, hooked) < 1e-10
    assert _difference(with_adapter, weighted) < 1e-10
    assert _difference(merged, weighted) < 1e-10


@pytest.mark.parametrize(
    "options", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_biases_and_additions_to_them_are_in_the_adapter(
    options, tied, build_model, read_stream, tmp_path
):
    """All modules linear with biases takes PEFT's `lora_bias`; otherwise the edited biases themselves."""
    model = build_model("llama", tie_word_embeddings=tied, **options)
    additions = {"model.layers.1.self_attn.o_proj": Addition("second", 3.0)}
    edit = mixed_edit(model, additions=additions)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)[-1]
    adapted = _adapted(model, edit, tmp_path)
    assert _difference(read_stream(adapted.get_base_model(), IDS)[-1], hooked) < 1e-10
    merged = read_stream(adapted.merge_and_unload(), IDS)[-1]
    assert _difference(merged, hooked) < 1e-10
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_bias"] == (tied and "mlp_bias" in options)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(REPLACES_BIASES)))
def test_disabled_the_adapter_leaves_the_model_as_it_was(
    family, build_model, read_stream, tmp_path
):
    model = build_model(family)
    before = read_stream(model, IDS)[-1]
    adapted = _adapted(model, mixed_edit(model), tmp_path)
    with adapted.disable_adapter():
        torch.testing.assert_close(read_stream(adapted.get_base_model(), IDS)[-1], before)


def test_a_wrong_side_in_the_adapter_is_seen(build_model, read_stream, tmp_path):
    """Mutation: the factors of a square weight swapped keep all shapes."""
    model = build_model("llama")
    edit = mixed_edit(model)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)[-1]
    _adapted(model, edit, tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    tensors |= {name.format("A"): b.T.contiguous(), name.format("B"): a.T.contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})
    wrong = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
    assert _difference(read_stream(wrong.get_base_model(), IDS)[-1], hooked) > 1e-3


def test_the_rank_is_the_number_of_vectors_and_the_same_edit_gives_the_same_bytes(
    build_model, tmp_path
):
    model = build_model("mixtral", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for name in ("one", "other"):
        save_adapter(tmp_path / "source", mixed_edit(model), tmp_path / name, "owner/model")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    assert settings["base_model_name_or_path"] == "owner/model"
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("keep_norm", ["column", "row"])
def test_an_edit_that_keeps_norms_has_no_adapter_form(keep_norm, build_model, tmp_path):
    model = build_model("llama")
    with pytest.raises(InputError, match=r"keeps the norms .* full rank"):
        _adapted(model, mixed_edit(model, keep_norm), tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_an_addition_without_a_bias_has_no_adapter_form(build_model, tmp_path):
    model = build_model("llama")
    edit = mixed_edit(model, additions={"model.layers.1.mlp.down_proj": Addition("second", 1.0)})
    with pytest.raises(InputError, match="no bias that could hold it"):
        _adapted(model, edit, tmp_path)


def test_an_output_in_use_and_an_edit_of_another_model_are_refused(build_model, tmp_path):
    model = build_model("llama")
    _adapted(model, mixed_edit(model), tmp_path)
    with pytest.raises(InputError, match="exists already"):
        save_adapter(tmp_path / "source", mixed_edit(model), tmp_path / "adapter")
    with pytest.raises(InputError, match="do not hold"):
        save_adapter(tmp_path / "source", mixed_edit(build_model("mixtral")), tmp_path / "other")
