"""Models and tokenizers are found, checked without loading a weight, and loaded as is needed.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_model.py
"""

import json
import os
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers.integrations import deepspeed

from common.errors import InputError
from common.model import (
    check_model,
    identity_files,
    load_model,
    load_to_shard,
    load_tokenizer,
    resolve,
    weight_files,
)


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny model that may be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


def _change(path, **values):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **values}))


def test_a_sound_model_has_no_problem(model_folder):
    assert check_model(model_folder) == []


def test_a_model_is_loaded_for_evaluation_in_the_wanted_type(model_folder):
    model = load_model(model_folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(model_folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_model_comes_back_as_it_was_saved(model_folder, build_model):
    saved = build_model("llama", dtype=torch.float32).state_dict()
    loaded = load_model(model_folder).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_every_rank_reads_the_weights_whatever_the_launcher_says(model_folder, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert not any(p.is_meta for p in load_model(model_folder).parameters())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_model_is_loaded_whole_while_the_settings_of_a_zero_3_training_live(
    model_folder, monkeypatch
):
    settings = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: settings)
    assert deepspeed.is_deepspeed_zero3_enabled()
    for load in (load_model, load_to_shard):
        assert all(p.numel() for p in load(model_folder, dtype="float32").parameters())
    # trl's trainer reads them.
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_a_model_to_be_shared_out_is_its_file_mapped_into_memory(build_model, tmp_path):
    build_model("llama", dtype=torch.bfloat16, vocab_size=200_000).save_pretrained(tmp_path)
    process = psutil.Process()
    before = process.memory_info().rss
    model = load_to_shard(tmp_path, dtype="auto")
    taken = process.memory_info().rss - before
    assert taken < 0.5 * sum(p.numel() * p.element_size() for p in model.parameters())
    assert not any(p.is_meta or p.is_cuda for p in model.parameters())


def test_the_tokenizer_pads_on_the_left(folder):
    _change(folder / "tokenizer_config.json", padding_side="right")
    assert load_tokenizer(folder).padding_side == "left"


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(folder):
    _change(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_model_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no chat template"):
        load_tokenizer(folder)
    assert any("has no chat template" in problem for problem in check_model(folder))


def test_a_truncated_weight_file_is_found_without_loading(folder):
    file = weight_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert any("is truncated or damaged" in problem for problem in check_model(folder))
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(folder)


def test_missing_weights_are_found(folder):
    for file in weight_files(folder):
        file.unlink()
    assert any("holds no safetensors weights" in problem for problem in check_model(folder))


def test_a_missing_shard_is_named(model_folder, build_model, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    build_model("llama", dtype=torch.float32).save_pretrained(folder, max_shard_size="60KB")
    shards = weight_files(folder)
    assert len(shards) > 1
    assert check_model(folder) == []
    shards[0].unlink()
    assert any(f"lacks {shards[0].name}" in problem for problem in check_model(folder))


def test_a_damaged_index_is_a_problem_and_no_traceback(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert any("model.safetensors.index.json" in problem for problem in check_model(folder))


def test_a_quantized_model_is_refused(folder):
    _change(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert any("is quantized" in problem for problem in check_model(folder))


def test_an_unmapped_architecture_is_refused(folder):
    config = {"model_type": "bloom", "vocab_size": 280}
    (folder / "config.json").write_text(json.dumps(config))
    assert any("'bloom' is not mapped" in problem for problem in check_model(folder))


def test_a_recurrent_architecture_is_refused_for_what_it_is(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": 280}))
    assert any("layers with a recurrent state" in problem for problem in check_model(folder))


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_a_vision_language_model_comes_back_as_it_was_saved(
    family, build_model, tokenizer, tmp_path
):
    model = build_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert check_model(tmp_path) == []
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    saved, state = model.state_dict(), loaded.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    ids = torch.tensor([[0, 40, 41, 99, 120, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    assert any("has no readable config.json" in problem for problem in check_model(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "justaname", "a/b/c"])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(name):
    with pytest.raises(InputError, match=r"is no folder and no hub id"):
        resolve(name)


def test_a_missing_patient_says_how_to_build_it():
    with pytest.raises(InputError, match=r"build it with `python -m patient --output .*`"):
        resolve("nowhere/patient-model")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_the_files_that_make_a_model_what_it_is_are_known(name, model_folder):
    assert name in [path.name for path in identity_files(model_folder)]
