"""Every shipped recipe loads, and passes its check on a model of its kind and data of its data sets' form.

Run: make setup && .venv/bin/python -m pytest tests/unit/test_recipes.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
import yaml

import eval.benchmarks.lm_eval
from common.recipe import load_recipe
from train import run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
# The others are over models that this repository builds; the end-to-end tests run them whole.
FETCHED = [
    name
    for name, path in RECIPES.items()
    if not yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name_or_path"].startswith(
        "runs/"
    )
]
# The family of each recipe's model, its depth, and its published chat template by trl's name.
MODELS = {
    "daredevil-8b": ("llama", 32, "llama3"),
    "daredevil-8b-anchored": ("llama", 32, "llama3"),
    "gemma-3-12b": ("gemma3", 48, "gemma3"),
    "gpt-oss-20b": ("gpt_oss", 24, "gptoss"),
    "llama-3-70b-instruct": ("llama", 80, "llama3"),
    "llama-3.1-8b-instruct": ("llama", 32, "llama3_1"),
    "mopey-mule": ("llama", 32, "llama3"),
    "phi-3-mini": ("phi3", 32, "phi3"),
    "qwen3-4b": ("qwen3", 36, "qwen3"),
    "study-healing-8b": ("llama", 32, "llama3"),
}
# Rows of each split; of the larger ones as many as any recipe takes.
ROWS = {
    ("mlabonne/harmful_behaviors", "train"): 416,
    ("mlabonne/harmful_behaviors", "test"): 104,
    ("mlabonne/harmless_alpaca", "train"): 5000,
    ("mlabonne/harmless_alpaca", "test"): 300,
    ("mlabonne/orpo-dpo-mix-40k", "train"): 64,
}


def _row(dataset, split, number):
    """A row in the form of a data set."""
    if dataset != "mlabonne/orpo-dpo-mix-40k":
        return {"text": f"{dataset} {split} {number}?"}
    question = f"question {number}?"
    chosen, rejected = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in ("right", "wrong")
    )
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def _local(value, folder):
    """A recipe's data with local files in place of hub data sets."""
    if isinstance(value, list):
        return [_local(entry, folder) for entry in value]
    if not isinstance(value, dict):
        return value
    if "dataset" not in value:
        return {key: _local(entry, folder) for key, entry in value.items()}
    origin = (value["dataset"], value.get("split", "train"))
    path = folder / f"{'-'.join(origin).replace('/', '-')}.jsonl"
    if not path.exists():
        rows = [json.dumps(_row(*origin, number)) for number in range(ROWS[origin])]
        path.write_text("\n".join(rows) + "\n")
    kept = {key: entry for key, entry in value.items() if key not in ("dataset", "split")}
    return {**kept, "path": str(path)}


@pytest.fixture
def localized(tmp_path, build_model, make_tokenizer):
    """Write a recipe over a tiny model of its kind and local files; returns the path."""

    def write(name, **changes):
        family, num_layers, template = MODELS[name]
        folder = tmp_path / name
        build_model(
            family, dtype=torch.float32, num_hidden_layers=num_layers, **changes
        ).save_pretrained(folder)
        text = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
        make_tokenizer(text).save_pretrained(folder)
        data = _local(yaml.safe_load(RECIPES[name].read_text(encoding="utf-8")), tmp_path)
        data["model"]["name_or_path"] = str(folder)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**data, "output_dir": str(tmp_path / "runs")}))
        return path

    return write


@pytest.fixture
def no_items(monkeypatch):
    """The items of the public tasks come from the hub; their names and kinds are checked without them."""
    monkeypatch.setattr(eval.benchmarks.lm_eval, "texts", lambda _spec: {})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_bears_the_name_of_its_file(name):
    assert load_recipe(RECIPES[name]).name == name


def test_every_recipe_of_a_fetched_model_is_checked_here():
    assert sorted(MODELS) == sorted(FETCHED)


@pytest.mark.usefixtures("no_items")
@pytest.mark.parametrize("name", FETCHED)
def test_a_recipe_passes_its_check_on_a_model_of_its_kind(name, localized, capsys):
    code = run.main([str(localized(name)), "--check"])
    out, err = capsys.readouterr()
    assert code == 0, err
    if load_recipe(RECIPES[name]).study is None:
        assert out.count("to run") == 4
    else:
        assert "runs with sharing" in out


@pytest.mark.usefixtures("no_items")
def test_a_run_that_the_disk_does_not_hold_does_not_pass(localized, capsys, monkeypatch):
    path = localized("qwen3-4b")
    # Room for one model: the edited one.
    model = sum(file.stat().st_size for file in path.with_suffix("").glob("*.safetensors"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=model))
    assert run.main([str(path), "--check"]) == 1
    out, err = capsys.readouterr()
    assert "disk          at most" in out
    assert "what is to run needs" in err
    assert run.main([str(path), "--check", "--until", "abliteration"]) == 0


@pytest.mark.usefixtures("no_items")
def test_a_recipe_whose_panel_was_trained_on_does_not_pass(localized, capsys):
    path = localized("daredevil-8b")
    source = "eval.benchmarks.2.prompts.path"
    trained_on = yaml.safe_load(path.read_text())["abliteration"]["prompts"]["harmful"]["path"]
    assert run.main([str(path), f"{source}={trained_on}", "--check"]) == 2
    assert "of its prompts are items of a benchmark" in capsys.readouterr().err


@pytest.mark.usefixtures("no_items")
def test_a_fixed_layer_beyond_the_model_does_not_pass(localized, capsys):
    path = localized("mopey-mule")
    assert run.main([str(path), "abliteration.selection.layer=32", "--check"]) == 2
    assert "is beyond the model's 32 layers" in capsys.readouterr().err


@pytest.mark.usefixtures("no_items")
def test_the_packed_version_of_gpt_oss_is_refused_with_its_reason(localized, capsys):
    path = localized("gpt-oss-20b")
    config = path.with_suffix("") / "config.json"
    config.write_text(
        json.dumps(
            {**json.loads(config.read_text()), "quantization_config": {"quant_method": "mxfp4"}}
        )
    )
    assert run.main([str(path), "--check"]) == 2
    assert "is quantized" in capsys.readouterr().err


def test_the_published_recipe_has_its_published_settings():
    train = load_recipe(RECIPES["daredevil-8b"]).train
    assert train.adapter == {"r": 64, "lora_alpha": 32, "target_modules": "all-linear"}
    assert (train.load_in_4bit, train.global_batch_size) == (True, 48)
    assert (train.keep_ablated, train.anchors) == ("none", ())
    assert not any(train.filters.model_dump().values())
    assert [source.dataset for source in train.preferences] == ["mlabonne/orpo-dpo-mix-40k"]
    published = {
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "num_train_epochs": 1,
        "max_length": 2048,
        "weight_decay": 0.0,
        "optim": "paged_adamw_8bit",
    }
    assert {key: train.trainer[key] for key in published} == published


def test_the_two_approaches_on_the_patient_differ_in_training_alone():
    ours, theirs = (load_recipe(RECIPES[name]) for name in ("patient", "patient-daredevil"))
    assert (ours.model, ours.abliteration) == (theirs.model, theirs.abliteration)
    assert ours.eval.benchmarks == theirs.eval.benchmarks
    assert ours.eval.margin == theirs.eval.margin
    assert (theirs.train.keep_ablated, theirs.train.anchors) == ("none", ())


def test_the_study_on_the_patient_is_over_the_shipped_recipe():
    study, alone = (load_recipe(RECIPES[name]) for name in ("patient-study", "patient"))
    assert study.model_copy(update={"name": alone.name, "study": None}) == alone


def test_the_two_sets_of_the_mule_differ_by_the_mood_alone(localized):
    from abliteration.prompt_sets import load_prompt_sets  # noqa: PLC0415  # imports torch

    recipe = load_recipe(localized("mopey-mule"))
    template = recipe.abliteration.prompts.harmful.template
    for prompts in load_prompt_sets(recipe):
        assert prompts.harmful == [template.replace("{prompt}", text) for text in prompts.harmless]


def test_without_a_network_a_missing_data_set_is_told_without_a_traceback(
    localized, capsys, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert run.main([str(localized("daredevil-8b")), "--check"]) == 2
    err = capsys.readouterr().err
    assert (
        "the data set hails/agieval-aqua-rat: run the same --check where there is a network" in err
    )
    assert "Rowan/hellaswag" in err
    assert "Traceback" not in err
