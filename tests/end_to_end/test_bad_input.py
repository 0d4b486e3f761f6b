"""Broken recipes and inputs: each ends with its exit code and one message, and leaves earlier results untouched.

make setup && .venv/bin/python -m pytest tests/end_to_end/test_bad_input.py
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from train import run

ROOT = Path(__file__).resolve().parent.parent.parent


class Place(NamedTuple):
    """A folder with everything a small run needs, free to be broken."""

    folder: Path
    model: Path
    recipe: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.folder / name


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path, model_folder: Path) -> Place:
    """A sound recipe over a tiny random model, and the results of an earlier run."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    for name in ("harmful", "harmless"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}"} for n in range(12)])
    write_jsonl(tmp_path / "healing.jsonl", [{"prompt": f"heal {n}"} for n in range(8)])
    write_jsonl(tmp_path / "panel.jsonl", [{"prompt": f"panel {n}"} for n in range(4)])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    recipe = {
        "name": "broken",
        "output_dir": str(tmp_path / "runs"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "abliteration": {
            "prompts": {
                "harmful": {"path": str(tmp_path / "harmful.jsonl")},
                "harmless": {"path": str(tmp_path / "harmless.jsonl")},
                "validation": 4,
            },
            "direction": {"name": "difference_in_means"},
            "selection": {"name": "scores"},
            "edit": {"name": "orthogonalize"},
        },
        "train": {
            "preferences": [
                {"name": "on_policy", "prompts": {"path": str(tmp_path / "healing.jsonl")}}
            ],
            "trainer": {"max_steps": 1},
        },
        "eval": {
            "benchmarks": [
                {
                    "name": "refusal",
                    "panel": "panel",
                    "prompts": {"path": str(tmp_path / "panel.jsonl")},
                    "harmless": False,
                }
            ]
        },
        "release": {"license": "apache-2.0"},
        "tracking": {"mode": "disabled"},
    }
    earlier = tmp_path / "runs" / "broken" / "release"
    earlier.mkdir(parents=True)
    (earlier / "README.md").write_text("an earlier release")
    return Place(tmp_path, model, recipe)


Break = Callable[[Place], None]


class Case(NamedTuple):
    """What is broken, what the message says, and the exit code."""

    name: str
    breaks: Break
    fragments: tuple[str, ...]
    code: int = 2


def setting(path: str, value: Any) -> Break:
    """Put a value at a dotted key of the recipe; integers index lists."""

    def breaks(place: Place) -> None:
        *parents, last = path.split(".")
        node: Any = place.recipe
        for key in parents:
            node = node[int(key)] if key.isdigit() else node[key]
        node[int(last) if last.isdigit() else last] = value

    return breaks


def text(name: str, content: str | bytes) -> Break:
    """Overwrite a file."""

    def breaks(place: Place) -> None:
        data = content.encode() if isinstance(content, str) else content
        place.file(name).write_bytes(data)

    return breaks


def config(**changes: Any) -> Break:
    """Change the model's configuration."""

    def breaks(place: Place) -> None:
        path = place.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return breaks


def no_template(place: Place) -> None:
    (place.model / "chat_template.jinja").unlink(missing_ok=True)
    path = place.model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def truncated(place: Place) -> None:
    weights = place.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_weights(place: Place) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")


def missing_shard(place: Place) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))


def pairs_instead(row: dict[str, Any]) -> Break:
    """Take the pairs from a file whose only row is this one."""

    def breaks(place: Place) -> None:
        write_jsonl(place.file("pairs.jsonl"), [row])
        source = {"name": "dataset", "path": str(place.file("pairs.jsonl"))}
        place.recipe["train"]["preferences"] = [source]

    return breaks


def overlapping(place: Place) -> None:
    write_jsonl(place.file("panel.jsonl"), [{"prompt": "Heal 3?"}, {"prompt": "panel 1"}])


def occupied_run_folder(place: Place) -> None:
    place.recipe["name"] = "occupied"
    (place.folder / "runs" / "occupied").write_text("a file")


def output_dir_is_a_file(place: Place) -> None:
    place.file("taken").write_text("a file")
    place.recipe["output_dir"] = str(place.file("taken"))


def csv_without_column(place: Place) -> None:
    place.file("prompts.csv").write_text("question,answer\nwhy,so\n")
    place.recipe["abliteration"]["prompts"]["harmful"] = {"path": str(place.file("prompts.csv"))}


def fewshot_of_nothing(place: Place) -> None:
    entry = {"name": "lm_eval", "tasks": ["additoin"], "include_path": str(place.folder / "tasks")}
    (place.folder / "tasks").mkdir()
    task = {
        "task": "addition",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "addition.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    (place.folder / "tasks" / "addition.yaml").write_text(yaml.safe_dump(task))
    write_jsonl(place.folder / "tasks" / "addition.jsonl", [{"question": "1+1", "answer": "2"}])
    place.recipe["eval"]["benchmarks"].append(entry)


HARMFUL = "abliteration.prompts.harmful"

CASES = [
    Case("unknown key", setting("abliteration.strenght", 1), ("strenght", "not a key")),
    Case("misspelt edit", setting("abliteration.edit.name", "ortogonalize"), ("did you mean",)),
    Case("wrong type", setting("seed", "zero"), ("seed", "whole number")),
    Case("boolean for a word", setting("tracking.mode", False), ("mode", "quotes")),
    Case("several at once", setting("eval.margin", "wide"), ("eval.margin",)),
    Case("no model", setting("model.name_or_path", "./missing"), ("./missing", "no folder")),
    Case("model not on the hub", setting("model.name_or_path", "no/such"), ("no/such", "hub")),
    Case("no chat template", no_template, ("chat template", "add")),
    Case("truncated weights", truncated, ("model.safetensors", "truncated")),
    Case("no safetensors", no_weights, ("no safetensors",)),
    Case("missing shard", missing_shard, ("model-00002-of-00002", "fetch")),
    Case("no config", lambda p: (p.model / "config.json").unlink(), ("config.json",)),
    Case("unmapped architecture", config(model_type="bloom"), ("bloom", "not mapped")),
    Case(
        "quantized model",
        config(quantization_config={"quant_method": "fp8"}),
        ("quantized", "full-precision"),
    ),
    Case("empty prompt file", text("harmful.jsonl", ""), ("harmful.jsonl", "no prompts")),
    Case("missing prompt file", setting(HARMFUL, {"path": "none.jsonl"}), ("none.jsonl", "exist")),
    Case("broken JSON", text("harmful.jsonl", '{"prompt": "a"}\n{oops'), (":2", "not JSON")),
    Case("no column", setting(HARMFUL + ".column", "question"), ("question", "found: prompt")),
    Case("no CSV column", csv_without_column, ("prompts.csv", "column", "question")),
    Case("unknown suffix", setting(HARMFUL, {"path": "Makefile"}), ("Makefile", ".jsonl")),
    Case("not UTF-8", text("harmful.jsonl", b'{"prompt": "\xff"}'), ("UTF-8",)),
    Case("prompt is no text", text("harmful.jsonl", '{"prompt": 3}'), ("int", "not text")),
    Case(
        "nothing left to estimate from",
        setting("abliteration.prompts.validation", 12),
        ("12 prompts", "held out"),
    ),
    Case(
        "layer beyond the model",
        setting("abliteration.selection", {"name": "fixed", "layer": 99, "position": -1}),
        ("99", "3 layers"),
    ),
    Case(
        "position before the template",
        setting("abliteration.selection", {"name": "fixed", "layer": 1, "position": -99}),
        ("-99", "before"),
    ),
    Case(
        "pairs without columns", pairs_instead({"prompt": "p", "good": "a"}), ("'chosen'", "found")
    ),
    Case("pair without prompt", pairs_instead({"chosen": "a", "rejected": "b"}), ("user turn",)),
    Case(
        "data set out of reach",
        setting("train.preferences.0", {"name": "dataset", "dataset": "no/such"}),
        ("no/such", "could not be loaded"),
    ),
    Case("gone TRL name", setting("train.trainer.warmup_ratio", 0.1), ("warmup_steps",)),
    Case("unknown TRL name", setting("train.trainer.learning_rat", 1), ("learning_rate",)),
    Case(
        "adapter that rewrites the base",
        setting("train.adapter", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", "reference"),
    ),
    Case("unknown task", fewshot_of_nothing, ("additoin", "addition")),
    Case("shared with a benchmark", overlapping, ("heal 3", "benchmark")),
    Case(
        "gate on nothing",
        setting("eval.accept", {"refusal[other].healed.value": {"max": 0.1}}),
        ("other",),
    ),
    Case("file where the run folder should be", occupied_run_folder, ("occupied", "file")),
    Case("file where the runs should be", output_dir_is_a_file, ("taken", "file")),
    Case("too few processes", setting("processes", 2), ("2 processes", "1 started")),
    Case(
        "batch that no process count gives",
        setting("train.trainer.per_device_train_batch_size", 5),
        ("5", "divide"),
    ),
    Case(
        "prompts that the model never refuses",
        setting("abliteration.selection.min_refusals", 2),
        ("0 of", "refused"),
        1,
    ),
]


def tree(folder: Path) -> dict[str, str]:
    """Every earlier result with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name == "README.md"
    }


def launch(place: Place, *arguments: str) -> int:
    path = place.file("recipe.yaml")
    path.write_text(yaml.safe_dump(place.recipe))
    return run.main([str(path), *arguments])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_with_its_code_and_one_message(
    case: Case, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    case.breaks(place)
    before = tree(place.folder / "runs") if (place.folder / "runs").is_dir() else {}
    code = launch(place)
    message = capfd.readouterr().err
    assert code == case.code, message
    for fragment in case.fragments:
        assert fragment in message
    assert "Traceback" not in message
    assert tree(place.folder / "runs") == before


def test_the_sound_recipe_passes_its_check(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Without this the table could pass for another reason than the one it names."""
    assert launch(place, "--check") == 0
    assert "to run" in capfd.readouterr().out


def test_errors_of_structure_and_of_pass_through_blocks_come_together(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.recipe["seed"] = "zero"
    place.recipe["train"]["trainer"] = {"rpo_alpha": 1}
    assert launch(place) == 2
    message = capfd.readouterr().err
    assert "seed" in message
    assert "rpo_alpha" in message


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("a: [1", "YAML"), ("", "empty"), ("- a", "mapping"), ("seed: 1\nseed: 2", "twice")],
)
def test_a_file_that_is_no_recipe_is_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, fragment: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert run.main([str(path)]) == 2
    assert fragment in capfd.readouterr().err


def test_a_missing_recipe_is_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["missing.yaml"]) == 2
    assert "missing.yaml" in capfd.readouterr().err


def test_a_run_that_another_process_is_at_is_left_alone(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    store = place.folder / "runs" / ".store"
    store.mkdir(parents=True)
    with (store / "run-broken.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert launch(place) == 2
    assert "another process" in capfd.readouterr().err


def test_a_launch_that_silently_became_one_process_is_an_error(place: Place) -> None:
    """As `accelerate launch --cpu --num_processes 2` does it: MASTER_ADDR is set, WORLD_SIZE is not."""
    path = place.file("recipe.yaml")
    path.write_text(yaml.safe_dump(place.recipe))
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {
        "MASTER_ADDR": "127.0.0.1"
    }
    done = subprocess.run(
        [sys.executable, "train/run.py", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "only one was started" in done.stderr
    assert "Traceback" not in done.stderr
