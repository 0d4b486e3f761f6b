"""The plan knows a model's depth and memory from its configuration alone, whatever its family.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_plan.py
"""

import re

import pytest
import torch
from transformers import AutoConfig

from common import chat, distributed
from common.model import load_tokenizer
from common.recipe import Recipe
from train import launch, plan
from train.launch import Strategy
from train.memory import training_memory

ONE = Strategy("one process")


@pytest.fixture
def recipe_for(tokenizer, build_model, tmp_path):
    """Make a model folder without weights, and a recipe that heals it; gives the model too."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def make(family, adapter, **train):
        model = build_model(family)
        model.config.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        source = {"path": str(prompts)}
        panel = {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
        recipe = Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": str(tmp_path / family), "dtype": "float32"},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {
                    "preferences": [{"name": "on_policy", "prompts": source}],
                    "global_batch_size": 1,
                    "adapter": adapter,
                    "trainer": {"max_length": 1},
                    **train,
                },
                "eval": {"benchmarks": [panel]},
            }
        )
        return recipe, model

    return make


FAMILIES = ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma3", "llava", "qwen2_5_vl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_made_without_weights(family, recipe_for):
    recipe, _ = recipe_for(family, {"r": 2})
    lines = plan.plan_lines(recipe, [("train", False, "0" * 64)])
    assert any("candidates    3 layers x 4 positions" in line for line in lines)
    assert any(line.startswith("  memory        about 0.0") for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_that_of_the_models_own_parameters(family, recipe_for):
    recipe, model = recipe_for(family, None)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    full = training_memory(plan.model_shape(recipe, 1, "cpu"), ONE)
    assert (full.weights, full.gradients, full.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)
    adapted, _ = recipe_for(family, {"r": 2})
    shape = plan.model_shape(adapted, 1, "cpu")
    memory = training_memory(shape, ONE)
    assert memory.weights == 4 * (numbers + shape.trained)
    assert memory.optimizer == 2 * memory.gradients == 8 * shape.trained
    assert 0 < shape.trained < numbers / 2
    assert memory.activations == full.activations > 0


def test_the_width_of_a_number_is_the_checkpoints_own_where_the_recipe_says_auto(recipe_for):
    recipe, _ = recipe_for("llava", None)
    wide = plan.model_shape(recipe, 1, "cpu").width
    folder = recipe.model.name_or_path
    config = AutoConfig.from_pretrained(folder)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    auto = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "auto"})})
    assert (plan.model_shape(auto, 1, "cpu").width, wide) == (2, 4)


def test_the_memory_line_names_the_launch_its_processes_and_every_part(recipe_for):
    recipe, _ = recipe_for("llama", {"r": 2})
    eight = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"global_batch_size": 8})}
    )
    line = plan.memory_line(eight, Strategy("FSDP2", 8, True, True, True), "cuda")
    assert re.fullmatch(
        r"about [\d.]+ GiB on each of 8 GPUs \(FSDP2: weights [\d.]+, gradients [\d.]+, "
        r"optimizer [\d.]+, activations [\d.]+, teachers 0.00(; stage three's two models take [\d.]+)?\)",
        line,
    )
    assert "on one process (one process: weights" in plan.memory_line(recipe, ONE, "cpu")


def test_the_reference_of_all_weights_under_fsdp_2_counts_where_it_is_the_most(
    recipe_for, monkeypatch
):
    monkeypatch.setattr(distributed, "room", lambda: 1)
    for adapter in (None, {"r": 2}):
        recipe, model = recipe_for("llama", adapter)
        whole = 4 * sum(parameter.numel() for parameter in model.parameters())
        train = recipe.train.model_copy(update={"global_batch_size": 1024})
        recipe = recipe.model_copy(update={"train": train})
        line = plan.memory_line(recipe, Strategy("FSDP2", 1024, True, True, True), "cuda")
        found = re.search(r"the reference, gathered before training, takes ([\d.]+)", line)
        assert bool(found) == (adapter is None), line
        if found:
            assert float(found[1]) == pytest.approx(whole / 2**30, abs=0.006)
            assert line.startswith(f"about {found[1]} GiB on each of 1024 GPUs")


def test_one_process_takes_all_gpus_that_it_sees(recipe_for, monkeypatch):
    recipe, _ = recipe_for("llama", {"r": 2})
    for seen, words in ((1, "on one GPU"), (8, "over 8 GPUs together")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert f"GiB {words} (one process: weights" in plan.memory_line(recipe, ONE, "cuda")


def test_processes_without_room_for_two_whole_models_leave_them_to_the_main_one(
    recipe_for, monkeypatch
):
    recipe, model = recipe_for("llama", {"r": 2})
    two = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    asked = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", lambda value: value)
    monkeypatch.setattr(distributed, "by_main", lambda work: asked.append(work))
    shards = Strategy("FSDP2", 2, True, True, True)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"global_batch_size": 2})}
    )
    for room, by_main in ((two / 0.89, False), (two / 0.91, True)):
        monkeypatch.setattr(distributed, "room", lambda room=room: room)
        assert launch.with_whole_models(recipe, lambda: "done") == (None if by_main else "done")
        assert len(asked) == by_main
        line = plan.memory_line(recipe, shards, "cpu")
        assert ("the main process holds whole models" in line) == by_main


def test_one_process_works_by_itself_whatever_its_room(recipe_for, monkeypatch):
    recipe, _ = recipe_for("llama", None)
    monkeypatch.setattr(distributed, "room", lambda: 1)
    assert launch.with_whole_models(recipe, lambda: "done") == "done"
    assert "main process" not in plan.memory_line(recipe, ONE, "cpu")


def test_an_optimizer_in_eight_bits_keeps_a_quarter(recipe_for):
    recipe, _ = recipe_for("llama", None)
    sizes = {}
    for optim in ("adamw_torch", "paged_adamw_8bit", "sgd"):
        trainer = {**recipe.train.trainer, "optim": optim}
        train = recipe.train.model_copy(update={"trainer": trainer})
        shape = plan.model_shape(recipe.model_copy(update={"train": train}), 1, "cpu")
        sizes[optim] = training_memory(shape, ONE).optimizer
    assert sizes["paged_adamw_8bit"] == sizes["adamw_torch"] / 4
    assert sizes["sgd"] == 0


def anchored(path, **changes):
    return {
        "to": "original",
        "prompts": {"path": str(path)},
        "batch_size": 3,
        "top_k": 5,
        **changes,
    }


def test_anchors_count_with_their_logits_and_with_what_their_teachers_say(recipe_for, tmp_path):
    path = tmp_path / "prompts.txt"
    anchors = [
        anchored(path, max_new_tokens=100),
        anchored(path, max_new_tokens=7, residual={"size": 16}),
    ]
    recipe, model = recipe_for("llama", {"r": 2}, anchors=anchors)
    shape = plan.model_shape(recipe, 1, "cpu")
    assert (shape.anchor_answers, shape.anchor_tokens) == (3 * 107, 2 * 3 * 107)
    prompts = chat.encode(load_tokenizer(recipe.model.name_or_path), ["one", "two"])
    streams = (2 * 7 + sum(map(len, prompts))) * model.config.num_hidden_layers * 16 * 4
    likely = 2 * 107 * 5
    assert plan._taught_bytes(recipe, shape, plan.ID_IN_MEMORY) == likely * (8 + 4) + streams
    checkpoints = 2 * shape.trained * 3 * 4
    assert plan.disk_bytes(recipe) == likely * (4 + 4) + streams + checkpoints
    assert "teachers said" not in plan.memory_line(recipe, ONE, "cpu")
    assert "what teachers said takes 0.00 of each process's own" in plan.memory_line(
        recipe, ONE, "cuda"
    )


def test_a_pull_keeps_where_all_weights_began_and_how_far_they_came(recipe_for):
    plain, pulled = (
        training_memory(plan.model_shape(recipe_for("llama", None, **l2)[0], 1, "cpu"), ONE)
        for l2 in ({}, {"l2": 0.1})
    )
    assert pulled.weights == 2 * plain.weights
    assert pulled.activations == plain.activations + plain.weights
    adapted, _ = recipe_for("llama", {"r": 2}, l2=0.1)
    shape = plan.model_shape(adapted, 1, "cpu")
    assert training_memory(shape, ONE).weights == 4 * (shape.weights + shape.trained)


def test_disk_counts_the_checkpoints_that_are_kept(recipe_for):
    for trainer, copies in (
        ({}, 2),
        ({"save_total_limit": 3}, 4),
        ({"save_total_limit": None}, 11),
        ({"save_strategy": "no"}, 0),
    ):
        recipe, model = recipe_for("llama", None, trainer={"max_length": 1, **trainer})
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        # A checkpoint: the weights and two moments. The model itself is saved at the end.
        assert plan.disk_bytes(recipe) == weights * (1 + 3 * copies)
