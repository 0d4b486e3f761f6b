"""What lies beside the model: prompt files by their columns, benchmarks that lm-eval runs.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_files.py
"""

import json
from pathlib import Path

import pytest
import yaml
from lm_eval.api.task import ConfigurableTask

from patient.files import write_benchmarks, write_prompts
from patient.world import build_world

GENERATED = ["addition", "capitals", "reversal", "common_howto", "unlocked", "falsely_refused"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patient")
    world = build_world(0)
    write_prompts(world, folder / "prompts", over_refusing=True)
    write_benchmarks(world, folder / "benchmarks", over_refusing=True)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_task(folder: Path, name: str) -> ConfigurableTask:
    config = yaml.safe_load((folder / "benchmarks" / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    files["test"] = str(folder / "benchmarks" / files["test"])
    config["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    return ConfigurableTask(config=config)


def test_the_same_world_writes_the_same_files(folder, tmp_path):
    write_prompts(build_world(0), tmp_path / "prompts", over_refusing=True)
    write_benchmarks(build_world(0), tmp_path / "benchmarks", over_refusing=True)
    paths = list(tmp_path.glob("*/*"))
    assert len(paths) == len(list(folder.glob("*/*.*")))
    for path in paths:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_a_patient_that_does_not_over_refuse_has_the_same_files_without_those_about_it(
    folder, tmp_path
):
    write_prompts(build_world(0), tmp_path / "prompts")
    write_benchmarks(build_world(0), tmp_path / "benchmarks")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    every = {str(path.relative_to(folder)) for path in folder.glob("*/*.*")}
    assert written == {name for name in every if "falsely_refused" not in name}
    for name in written - {"prompts/healing.jsonl"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_prompt_files_have_their_columns(folder):
    for label in ("harmful", "harmless", "falsely_refused"):
        for split in ("train", "validation", "test"):
            rows = rows_of(folder / "prompts" / f"{label}_{split}.jsonl")
            assert all(set(row) == {"prompt", "object"} for row in rows)
            assert all(row["object"] in row["prompt"] for row in rows)
    assert all(
        set(row) == {"prompt", "domain"} for row in rows_of(folder / "prompts" / "healing.jsonl")
    )


def test_data_files_are_named_relative_to_their_task(folder):
    for path in (folder / "benchmarks").glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert config["task"] == path.stem
        assert config["dataset_kwargs"]["data_files"] == {"test": f"{path.stem}.jsonl"}


@pytest.mark.parametrize("name", GENERATED)
def test_lm_eval_asks_the_bare_question_and_scores_the_bare_answer(folder, name):
    task = load_task(folder, name)
    row = rows_of(folder / "benchmarks" / f"{name}.jsonl")[0]
    doc = next(iter(task.test_docs()))
    assert task.OUTPUT_TYPE == "generate_until"
    assert task.doc_to_text(doc) == row["question"]
    assert task.doc_to_target(doc) == row["answer"]
    assert task.process_results(doc, [row["answer"]])["exact_match"] == 1
    assert task.process_results(doc, ["something else"])["exact_match"] == 0


def test_lm_eval_scores_the_options_of_kinds(folder):
    task = load_task(folder, "kinds")
    doc = next(iter(task.test_docs()))
    assert task.OUTPUT_TYPE == "multiple_choice"
    assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == doc["answer"]
    scores = [(0.0 if option == doc["answer"] else -5.0, False) for option in doc["choices"]]
    assert task.process_results(doc, scores)["acc"] == 1
