"""The evaluation from finished folders to results.json.

Run: python -m pytest tests/unit/eval/test_stage.py
"""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import artifacts
from common.edits import (
    Edit,
    Removal,
    apply_to_weights,
    as_stored,
    edited_writers,
    load_edit,
)
from common.recipe import Recipe
from eval import results as results_file
from eval import stage
from eval.benchmarks import refusal
from eval.direction import share_written, writes_along
from eval.items import Item
from eval.subjects import load_healed, load_subject
from tests.editing import edit_of, vector
from tests.releasing import Tracker


def changed(recipe: Recipe, path: str, value: object) -> Recipe:
    data = recipe.model_dump(mode="json")
    at = data
    *steps, last = path.split(".")
    for step in steps:
        at = at[int(step)] if step.isdigit() else at[step]
    at[last] = value
    return Recipe.model_validate(data)


def test_an_evaluation_leaves_items_and_results_that_follow_from_them(finished, tmp_path) -> None:
    folder, tracker = tmp_path / "eval", Tracker()
    folder.mkdir()
    results = stage.run(finished.recipe, folder, finished.upstream, tracker)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    results_file.validate(results)
    records = artifacts.read_jsonl(folder / "items.jsonl")
    counts = {(r["kind"], r["name"], r["model"]) for r in records}
    assert len(counts) == 3 * 3 + 2
    assert len(records) == 3 * (10 + 12 + 3) + 2 * 3
    letters = [Item(**r) for r in records if r["name"] == "letters"]
    original = [item.value for item in letters if item.model == "original"]
    assert results["benchmarks"][0]["original"]["value"] == pytest.approx(sum(original) / 10)
    assert results["provenance"]["fingerprints"] == {"abliteration": "f1"}
    assert results["direction"]["residual"]["abliterated"] < 1e-6
    assert results["direction"]["residual_bfloat16"]["abliterated"] > 1e-5
    again = results["direction"]["reestimated"]
    assert again["reason"] is None
    assert again["original"]["norm_ratio"] == 1.0
    assert results["accept"]["gates"][0]["name"] == "refusal[restricted].healed.value"
    assert str(tmp_path) not in (folder / "results.json").read_text()


def test_no_answer_goes_to_wandb(finished, byte_tokenizer, tmp_path, monkeypatch) -> None:
    folder, tracker = tmp_path / "eval", Tracker()
    folder.mkdir()
    answer = byte_tokenizer.encode(
        "I cannot help with the forbidden thing", add_special_tokens=False
    )
    monkeypatch.setattr(refusal, "generate", lambda *_args, **_settings: [answer] * 3)
    recipe = changed(finished.recipe, "eval.accept", {})
    stage.run(recipe, folder, finished.upstream, tracker)
    assert "forbidden thing" in (folder / "items.jsonl").read_text()
    sent = repr(tracker.summary) + repr([table.data for table in tracker.logged.values()])
    assert "forbidden" not in sent
    assert tracker.summary["refusal/restricted/healed/value"] == 1.0
    assert "items" in tracker.logged


def test_two_evaluations_give_the_same_bytes(finished, tmp_path) -> None:
    written = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        stage.run(finished.recipe, folder, finished.upstream, Tracker())
        written.append([(folder / file).read_bytes() for file in ("results.json", "items.jsonl")])
    assert written[0] == written[1]


def test_the_healed_model_is_the_abliterated_one_with_its_adapter(finished) -> None:
    healed = load_healed(finished.recipe, finished.upstream)
    abliterated = load_subject("abliterated", finished.recipe, finished.upstream)
    name = "model.layers.0.mlp.up_proj"
    adapter = finished.upstream["train"] / "adapter" / "adapter_model.safetensors"
    tensors = load_file(adapter)
    a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    scale = 8 / 2  # peft's default lora_alpha over r
    expected = abliterated.get_submodule(name).weight + scale * b @ a
    assert torch.allclose(healed.get_submodule(name).weight, expected, atol=1e-5)
    assert not healed.training
    assert not hasattr(healed, "peft_config") or not healed.peft_config
    assert torch.equal(healed.model.embed_tokens.weight, abliterated.model.embed_tokens.weight)


def test_a_fully_trained_model_needs_no_adapter(finished, make_model) -> None:
    train = finished.upstream["train"]
    (train / "adapter").rename(train / "unused")
    trained = make_model(7)
    trained.save_pretrained(train / "model")
    healed = load_healed(finished.recipe, finished.upstream)
    assert torch.equal(healed.lm_head.weight, trained.lm_head.weight)


def _share_written(edit, original, abliterated, healed):
    """In one form, that in which both models are saved."""
    return share_written(edit, original, abliterated, abliterated, healed)


def test_the_residual_is_relative_to_what_the_original_wrote(finished, make_model) -> None:
    edit = load_edit(finished.upstream["abliteration"] / "edit.safetensors")
    original = load_subject("original", finished.recipe, finished.upstream)
    abliterated = load_subject("abliterated", finished.recipe, finished.upstream)
    writes = writes_along(original, edit)
    found = _share_written(edit, writes, writes_along(abliterated, edit), writes)
    assert found["abliterated"] < 1e-6  # float32 weights
    assert found["healed"] == pytest.approx(1.0, abs=1e-6)  # all of it written again
    healed = AutoModelForCausalLM.from_pretrained(finished.upstream["abliteration"] / "model")
    weight = healed.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight += 0.01 * torch.outer(edit.direction.float(), torch.ones(weight.shape[1]))
    expected = 0.01 * weight.shape[1] ** 0.5 / float(writes["model.layers.1.mlp.down_proj"].norm())
    found = _share_written(
        edit, writes, writes_along(abliterated, edit), writes_along(healed, edit)
    )
    assert found["healed"] == pytest.approx(expected, rel=1e-3)


def an_edit(**strengths: float) -> Edit:
    removals = {name: Removal(("direction",), (s,)) for name, s in strengths.items()}
    return Edit({"direction": torch.ones(1)}, removals, {}, {}, {})


def test_training_is_charged_with_what_it_moved_and_not_with_what_the_edit_left() -> None:
    original = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([10.0])}
    abliterated = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0])}
    healed = {"a": torch.tensor([0.0, 1.5]), "b": torch.tensor([1.0])}
    found = _share_written(an_edit(a=1.0, b=1.0), original, abliterated, healed)
    assert found == {"abliterated": pytest.approx(0.2), "healed": pytest.approx(0.1)}


def test_what_was_not_edited_is_no_residual_of_the_edit_and_still_held_against_training() -> None:
    original = {"a": torch.tensor([10.0]), "b": torch.tensor([10.0])}
    abliterated = {"a": torch.tensor([1.0]), "b": torch.tensor([10.0])}
    healed = {"a": torch.tensor([1.0]), "b": torch.tensor([7.0])}
    found = _share_written(an_edit(a=0.9, b=0.0), original, abliterated, healed)
    assert found == {"abliterated": pytest.approx(0.1), "healed": pytest.approx(0.3)}


@pytest.mark.parametrize("strengths", [{}, {"a": 0.0}])
def test_where_nothing_was_removed_there_is_no_residual(strengths) -> None:
    writes = {name: torch.ones(1) for name in strengths}
    assert _share_written(an_edit(**strengths), writes, writes, writes) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_every_one_of_several_directions_counts(family, build_model) -> None:
    model, vectors = build_model(family), (vector(1), vector(2))
    edit = edit_of(model, "orthogonalize", *vectors)
    original = writes_along(model, edit)
    apply_to_weights(model, edit)
    abliterated = writes_along(model, edit)
    found = _share_written(edit, original, abliterated, abliterated)
    assert found == {"abliterated": pytest.approx(0, abs=1e-12), "healed": 0.0}
    name = next(name for name in edit.removals if ".1.mlp." in name)
    writer, basis = edited_writers(model, edit)[name], edit.basis(name)
    # Each input writes 0.01 along the second vector.
    writes = basis[1].expand(*original[name].shape[:-1], -1)
    with torch.no_grad():
        writer.weight.add_(0.01 * as_stored(writes, writer.layout))
    found = _share_written(edit, original, abliterated, writes_along(model, edit))
    expected = 0.01 * original[name][..., 0].numel() ** 0.5 / float(original[name].norm())
    assert found["healed"] == pytest.approx(expected)


def test_a_sound_recipe_has_no_problems(finished) -> None:
    assert stage.check(finished.recipe) == []


def test_problems_are_found_without_loading_weights(finished, monkeypatch) -> None:
    monkeypatch.setattr(stage, "load_subject", None)
    recipe = changed(finished.recipe, "eval.benchmarks.1.prompts.path", "nowhere.txt")
    assert any(p.startswith("eval.benchmarks[1].prompts: ") for p in stage.check(recipe))
    gate = {"benchmarks[leters].healed.value": {"min": 0.5, "max": None}}
    (problem,) = stage.check(changed(finished.recipe, "eval.accept", gate))
    assert problem.startswith("eval.accept.benchmarks[leters].healed.value: ")
    assert "letters, sums" in problem


def test_inputs_hold_contents_and_no_paths(finished, tmp_path) -> None:
    before = stage.inputs(finished.recipe)
    assert str(tmp_path) not in json.dumps(before)
    assert json.dumps(stage.inputs(finished.recipe)) == json.dumps(before)
    prompts = tmp_path / "prompts.txt"
    other = tmp_path / "renamed.txt"
    prompts.rename(other)
    moved = changed(finished.recipe, "eval.benchmarks.1.prompts.path", str(other))
    moved = changed(moved, "eval.benchmarks.2.prompts.path", str(other))
    assert stage.inputs(moved) == before
    other.write_text("Another?\n")
    assert stage.inputs(moved) != before


def test_the_items_are_every_wording_that_is_measured(finished) -> None:
    items = {text for texts in stage.items(finished.recipe).values() for text in texts}
    assert {"Which letter is a?", "3+3=", "How are you?"} <= items


def test_no_more_than_two_models_are_in_memory(finished, tmp_path, monkeypatch) -> None:
    loaded: list[weakref.ref] = []
    most = 0
    load, score = stage.load_subject, stage._score

    def remembered(*args):
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    def counted(*args):
        nonlocal most
        most = max(most, sum(model() is not None for model in loaded))
        return score(*args)

    monkeypatch.setattr(stage, "load_subject", remembered)
    monkeypatch.setattr(stage, "_score", counted)
    (tmp_path / "eval").mkdir()
    stage.run(finished.recipe, tmp_path / "eval", finished.upstream, Tracker())
    assert (len(loaded), most) == (3, 2)
