"""Releases of a tiny model, made by the real stage from what the earlier stages would have left, for the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from common import artifacts
from common.checkpoint import apply_to_checkpoint
from common.edits import Edit, save_edit
from common.recipe import COMPONENTS, Recipe
from eval import results as results_file
from eval.items import MODELS, Item, Row
from eval.release import stage
from eval.results import Settings
from tests.editing import edit_of

BENIGN = "Where is the sea?"
CATEGORIES = ("first", "second")


class Tracker:
    """Takes what would go to wandb."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.summary: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        """Keep the last value of each."""
        self.logged |= values


def make_upstream(
    folder: Path, model: PreTrainedModel, tokenizer: Any, kind: str = "orthogonalize", **lora: Any
) -> dict[str, Path]:
    """A base, and the folders of the stages before the release; see `make_healed`."""
    stages = make_healed(folder, model, tokenizer, edit_of(model, kind, about=about(kind)), **lora)
    evaluation = folder / "eval"
    evaluation.mkdir()
    write_evaluation(evaluation)
    return stages | {"eval": evaluation}


def make_healed(
    folder: Path, model: PreTrainedModel, tokenizer: Any, edit: Edit, **lora: Any
) -> dict[str, Path]:
    """A base, two files of prompts, and the folders of the stages before the evaluation.

    Args:
        folder: to make them in.
        model: the base.
        tokenizer: of the base.
        edit: of the base.
        lora: of the adapter, whose weights are drawn, so that it has an effect.
    """
    base = folder / "base"
    stages = {name: folder / name for name in ("abliteration", "train")}
    for stage_folder in stages.values():
        stage_folder.mkdir(parents=True)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "LICENSE").write_text("Do as you like.\n")
    (folder / "prompts.txt").write_text(f"{BENIGN}\nWho are you?\n")
    (folder / "other.txt").write_text("Sing a song.\nTell a long tale.\n")
    save_edit(edit, stages["abliteration"] / "edit.safetensors")
    apply_to_checkpoint(base, edit, stages["abliteration"] / "model")
    torch.manual_seed(1)
    settings = LoraConfig(**{"r": 2, "target_modules": ["up_proj", "down_proj"], **lora})
    settings.init_lora_weights = False
    edited = AutoModelForCausalLM.from_pretrained(stages["abliteration"] / "model")
    get_peft_model(edited, settings).save_pretrained(stages["train"] / "adapter")
    artifacts.write_json(stages["train"] / "summary.json", {"pairs": 7, "steps": 3})
    return stages


def write_evaluation(folder: Path) -> None:
    """What an evaluation leaves, with answers made up: a benchmark that was damaged and healed, and a harmful panel."""
    rows = [Row("benchmarks", "letters", BENCHMARK), Row("refusal", "restricted", PANEL)]
    items = _items()
    artifacts.write_jsonl(folder / "items.jsonl", [item.record() for item in items])
    artifacts.write_json(folder / "results.json", _results(rows, items))
    (folder / "report.html").write_text("<!doctype html><title>mini</title>\n")


BENCHMARK = {"metric": "acc", "role": "capability", "higher_is_better": True}
PANEL = {"harmless": False}


def _items() -> list[Item]:
    wrong = {"original": 2, "abliterated": 12, "healed": 3}
    refused = {"original": 18, "abliterated": 0, "healed": 1}
    found = []
    for model in MODELS:
        for index in range(40):
            details = {"answer": f"the {index}th answer"}
            value = float(index >= wrong[model])
            found.append(Item("benchmarks", "letters", model, index, value, None, -0.5, details))
        for index in range(20):
            value = float(index < refused[model])
            details = {"text": f"an answer to {BENIGN}", "label": "compliance"}
            found.append(Item("refusal", "restricted", model, index, value, details=details))
    return found


def _results(rows: list[Row], items: list[Item]) -> dict[str, Any]:
    provenance = {"versions": {}, "seed": 0, "fingerprints": {"train": "f2"}}
    results = results_file.build(Settings("mini", 0.05, provenance=provenance), rows, items)
    for row in results["refusal"]:
        parts = {model: row[model] for model in MODELS}
        row["by_category"] = [{"category": name, "n": 10, **parts} for name in CATEGORIES]
    return results


def about(kind: str = "orthogonalize", **settings: Any) -> dict[str, Any]:
    """What stage one says of an edit."""
    section = COMPONENTS["abliteration.edit"][kind](name=kind, **settings)
    return {
        "layer": 1,
        "position": -1,
        "stream": "resid_pre",
        "estimator": "difference_in_means",
        "selection": "scores",
        "edit": kind,
        "settings": section.model_dump(mode="json", exclude={"name"}),
        "target": "harmful",
        "base_model": "base",
        "revision": None,
    }


def recipe_of(folder: Path, **release: Any) -> Recipe:
    """The recipe of a release, whose base and prompts lie in a folder."""
    source, other = ({"path": str(folder / name)} for name in ("prompts.txt", "other.txt"))
    panel = {"name": "refusal", "panel": "restricted", "prompts": source, "harmless": False}
    return Recipe.model_validate(
        {
            "name": "mini",
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
            "abliteration": {"prompts": {"harmful": source, "harmless": other}},
            "train": {"preferences": [{"name": "on_policy", "prompts": source}]},
            "eval": {"benchmarks": [panel]},
            "release": {"license": "apache-2.0", **release},
        }
    )


def write_release(
    folder: Path, upstream: dict[str, Path], name: str = "release", **release: Any
) -> Path:
    """Make a release beside its base."""
    target = folder / name
    target.mkdir()
    stage.run(recipe_of(folder, **release), target, upstream, Tracker())
    return target


def read(folder: Path, name: str = "results.json") -> Any:
    """A JSON file of a release."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
