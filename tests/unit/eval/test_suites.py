"""Suites by name: what they hold, that the harness knows it, and the averages they are published as.

Run: python -m pytest tests/unit/eval/test_suites.py
"""

import json
from pathlib import Path
from typing import get_args

import lm_eval as harness
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from common import statistics
from common.errors import InputError
from common.recipe import Limit, LmEval, LocalQuestions
from common.schema import SuiteName
from eval import averages, results, stage, suites, table, task_index
from eval.benchmarks import Subject, lm_eval
from eval.items import MODELS
from eval.results import Settings
from tests.releasing import Tracker

TASKS = Path(harness.__file__).parent / "tasks"
SETTINGS = Settings("mini", 0.05, provenance={"versions": {}, "seed": 0, "fingerprints": {}})
# What the Nous table is made of: groups and their number of tasks.
NOUS = {"AGIEval": 8, "GPT4All": 7, "TruthfulQA": 1, "Bigbench": 18}


def groups_of(name: str) -> dict[str, list[suites.Asked]]:
    found: dict[str, list[suites.Asked]] = {}
    for asked in suites.load(name):
        found.setdefault(asked.standing.group, []).append(asked)
    return found


def test_every_suite_of_the_recipe_has_its_file_and_every_file_its_key() -> None:
    assert suites.known() == sorted(get_args(SuiteName))


def test_the_suites_hold_the_published_tables() -> None:
    assert {group: len(tasks) for group, tasks in groups_of("nous").items()} == NOUS
    assert {asked.num_fewshot for asked in suites.load("nous")} == {0}
    shots = {group: tasks[0].num_fewshot for group, tasks in groups_of("leaderboard-v1").items()}
    assert shots == {
        "ARC": 25,
        "HellaSwag": 10,
        "MMLU": 5,
        "TruthfulQA": 0,
        "Winogrande": 5,
        "GSM8K": 5,
    }
    shots = {group: tasks[0].num_fewshot for group, tasks in groups_of("leaderboard-v2").items()}
    assert shots == {
        "IFEval": 0,
        "BBH": 3,
        "MATH level 5": 4,
        "GPQA": 0,
        "MuSR": 0,
        "MMLU-Pro": 5,
    }


@pytest.fixture(scope="module")
def built_in() -> dict[str, dict]:
    """Settings of the harness's own tasks and groups, by name, read from its files and not by its slow index."""
    folders = ["agieval", "arc", "bigbench", "gsm8k", "hellaswag", "leaderboard", "openbookqa"]
    folders += ["piqa", "super_glue/boolq", "truthfulqa", "winogrande", "mmlu/default"]
    found = {}
    for folder in folders:
        for path in (TASKS / folder).rglob("*.yaml"):
            entry = yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient)
            name = entry.get("task") if isinstance(entry.get("task"), str) else entry["group"]
            found[name] = _with_includes(path, entry)
    return found


class _Lenient(yaml.SafeLoader):
    """Safe YAML, with the harness's own tags (`!function`) read as text: no code of theirs is run."""


_Lenient.add_multi_constructor("!", lambda loader, suffix, node: f"{suffix} {node.value}")


def _with_includes(path: Path, entry: dict) -> dict:
    while "include" in entry:
        path = (path.parent / entry.pop("include")).resolve()
        entry = {**yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient), **entry}
    return entry


def members(built_in: dict[str, dict], name: str) -> list[dict]:
    """A task, or those of a group or tag."""
    if name not in built_in:
        return [entry for entry in built_in.values() if entry.get("tag") == name]
    if "group" not in built_in[name]:
        return [built_in[name]]
    return [one for task in built_in[name]["task"] for one in members(built_in, task)]


@pytest.mark.parametrize("name", suites.known())
def test_the_harness_knows_every_task_with_its_metric(name, built_in) -> None:
    for asked in suites.load(name):
        found = members(built_in, asked.task)
        assert len(found) == {"mmlu": 57, "leaderboard_math_hard": 7}.get(asked.task, 1), asked.name
        for task in found:
            assert asked.metric in {entry["metric"] for entry in task["metric_list"]}, asked.name
            # The leaderboard's own tasks say their shots; the suite must agree.
            if asked.task.startswith("leaderboard"):
                assert task.get("num_fewshot", 0) == asked.num_fewshot


def test_chance_is_one_over_the_options_that_the_task_lists(built_in) -> None:
    listed = 0
    for asked in suites.load("leaderboard-v2"):
        options = built_in[asked.task].get("doc_to_choice")
        if isinstance(options, list):
            assert asked.standing.chance == pytest.approx(1 / len(options), abs=1e-6), asked.name
            listed += 1
    assert listed == 24 + 3


@pytest.fixture
def quick_folder(task_folder: Path) -> Path:
    """Tasks of the names that the suite `quick` takes, with local data."""
    letters, sums = ((task_folder / f"{name}.yaml").read_text() for name in ("letters", "sums"))
    for path in task_folder.glob("*.yaml"):
        path.unlink()
    for name in ("arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc2"):
        (task_folder / f"{name}.yaml").write_text(letters.replace("task: letters", f"task: {name}"))
    text = sums.replace("task: sums", "task: gsm8k") + "fewshot_split: test\nnum_fewshot: 1\n"
    (task_folder / "gsm8k.yaml").write_text(text)
    return task_folder


def quick(folder: Path, **settings) -> LmEval:
    return LmEval(name="lm_eval", suite="quick", include_path=str(folder), **settings)


def test_a_suite_is_measured_with_its_shots_and_metrics_and_averaged(
    byte_tokenizer, make_model, quick_folder
) -> None:
    loaded = lm_eval.load(quick(quick_folder), byte_tokenizer, batch_size=4)
    about = {task.name: task.row.about for task in loaded}
    assert about["arc_challenge"]["metric"] == "acc_norm"
    assert about["winogrande"]["metric"] == "acc"
    assert about["gsm8k"]["suite"]["num_fewshot"] == 5
    assert loaded[-1].task.instances[0].args[0].count("<|user|>") == 6
    models = {name: make_model(seed) for seed, name in enumerate(MODELS)}
    items = [
        item
        for task in loaded
        for name, model in models.items()
        for item in task.score(Subject(name, model, models["original"]))
    ]
    found = results.build(SETTINGS, [task.row for task in loaded], items)
    (suite,) = found["suites"]
    assert (suite["name"], suite["num_tasks"], len(suite["groups"])) == ("quick", 5, 5)
    for model in MODELS:
        rates = [row[model]["value"] for row in found["benchmarks"]]
        assert suite[model]["value"] == pytest.approx(np.mean(rates))
    assert suite["gap"]["value"] == pytest.approx(
        suite["healed"]["value"] - suite["original"]["value"]
    )
    assert "quick: average" in table.screen_table(found)


def test_a_limit_of_the_recipe_takes_the_place_of_the_suites(byte_tokenizer, quick_folder) -> None:
    assert {asked.limit for asked in suites.load("quick")} == {200}
    loaded = lm_eval.load(quick(quick_folder, limit=3), byte_tokenizer, batch_size=4)
    assert {len(task.documents) for task in loaded} == {3}


def test_the_fingerprint_follows_the_suites_settings(quick_folder, monkeypatch) -> None:
    before = lm_eval.inputs(quick(quick_folder))
    changed = [*suites.load("quick")]
    changed[0] = suites.Asked(**{**vars(changed[0]), "num_fewshot": 3})
    monkeypatch.setattr(suites, "load", lambda _name: tuple(changed))
    assert lm_eval.inputs(quick(quick_folder)) != before


def test_items_are_taken_apart_by_their_number_of_options(task_folder) -> None:
    rows = [{"q": f"{i}?", "targets": list("abcde")[: 3 + i % 3], "gold": 0} for i in range(10)]
    path = task_folder / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "mixed",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "targets",
        "doc_to_target": "gold",
    }
    kept = {
        number: [
            document["q"]
            for _, document in task_index.build(
                "mixed", task_index.with_options(settings, "targets", number)
            ).doc_iterator()
        ]
        for number in (3, 4, 5)
    }
    assert kept == {3: ["0?", "3?", "6?", "9?"], 4: ["1?", "4?", "7?"], 5: ["2?", "5?", "8?"]}
    with pytest.raises(InputError, match="cannot be loaded"):
        task_index.build("mixed", task_index.with_options(settings, "targets", 7))


def row(group: str, n: int, values, *, chance: float = 0.0, weight: str = "task") -> dict:
    intervals = {
        key: {"value": v, "low": v - 0.1, "high": v + 0.1}
        for key, v in zip((*MODELS, "damage", "gain", "gap"), values, strict=True)
    }
    standing = {"name": "s", "group": group, "weight": weight, "chance": chance, "num_fewshot": 0}
    return {"n": n, "suite": standing, **intervals}


def test_averages_are_those_of_the_tables() -> None:
    rows = [
        row("a", 100, (0.5, 0.4, 0.45, -0.1, 0.05, -0.05)),
        row("a", 300, (0.7, 0.6, 0.65, -0.1, 0.05, -0.05)),
        row("b", 100, (0.5, 0.5, 0.5, 0, 0, 0), chance=0.25, weight="item"),
        row("b", 300, (0.25, 0.25, 1.0, 0, 0.75, 0.75), chance=0.25, weight="item"),
        {"n": 5, "name": "outside"},
    ]
    (suite,) = averages.suites(rows)
    a, b = suite["groups"]
    assert (a["n"], a["num_tasks"], suite["n"]) == (400, 2, 800)
    assert a["original"]["value"] == pytest.approx(0.6)
    # By item and from chance: a quarter of the items at one third, the others at 0.
    assert b["original"]["value"] == pytest.approx(0.25 / 3)
    assert b["healed"]["value"] == pytest.approx(0.25 / 3 + 0.75)
    assert b["gap"]["value"] == pytest.approx(b["healed"]["value"] - b["original"]["value"])
    assert suite["original"]["value"] == pytest.approx((0.6 + 0.25 / 3) / 2)
    assert a["gap"]["high"] - a["gap"]["value"] == pytest.approx(0.1 / np.sqrt(2))


def test_the_interval_of_an_average_covers_the_truth() -> None:
    """Tasks of different sizes, few flips: the truth lies inside in at least 93 of 100 draws, and not always."""
    generator = np.random.default_rng(0)
    sizes, flips = (40, 100, 250, 60), (0.04, 0.02, 0.05, 0.1)
    inside = 0
    for _ in range(400):
        found = []
        for size, flip in zip(sizes, flips, strict=True):
            before = (generator.random(size) < 0.6).astype(float)
            lost, won = generator.random(size) < flip, generator.random(size) < flip / 2
            after = np.where(before == 1, 1 - lost, won).astype(float)
            change = statistics.paired_difference(after, before, np.arange(size), seed=0)
            found.append({"value": change.value, "low": change.low, "high": change.high})
        average = averages.combine(found, [0.25] * 4, 0.0)
        truth = np.mean([0.4 * flip / 2 - 0.6 * flip for flip in flips])
        inside += average["low"] <= truth <= average["high"]
    assert 0.93 * 400 <= inside < 400


def test_an_evaluation_writes_averages_and_own_questions(finished, quick_folder, tmp_path) -> None:
    own = tmp_path / "own.jsonl"
    lines = [json.dumps({"question": f"{n}?", "answer": str(n)}) for n in range(5)]
    own.write_text("\n".join(lines))
    local = LocalQuestions(
        name="local", task="own", path=str(own), answer="answer", max_new_tokens=3
    )
    section = finished.recipe.eval.model_copy(
        update={
            "benchmarks": (quick(quick_folder), local),
            "accept": {"suites[quick].healed.value": Limit(min=0.0)},
        }
    )
    recipe = finished.recipe.model_copy(update={"eval": section})
    assert stage.check(recipe) == []
    folder, tracker = tmp_path / "eval", Tracker()
    folder.mkdir()
    found = stage.run(recipe, folder, finished.upstream, tracker)
    assert [row["name"] for row in found["benchmarks"]][-1] == "own"
    assert "suite" not in found["benchmarks"][-1]
    assert found["accept"]["passed"]
    assert tracker.summary["suites/quick/healed/value"] == found["suites"][0]["healed"]["value"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "suites[quick].groups[arithmetic].gap" in page


def test_a_gate_on_a_suite_that_is_not_measured_is_a_problem(finished, quick_folder) -> None:
    section = finished.recipe.eval.model_copy(
        update={
            "benchmarks": (quick(quick_folder),),
            "accept": {"suites[nous].healed.value": Limit(min=0.5)},
        }
    )
    (problem,) = stage.check(finished.recipe.model_copy(update={"eval": section}))
    assert problem.startswith("eval.accept.suites[nous].healed.value: the suite nous")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "is empty; name at least one task, or a suite"),
        ({"suite": "nous", "tasks": ["gsm8k"]}, "is given beside tasks"),
        ({"suite": "nous", "num_fewshot": 3}, "a suite has its published shots"),
        ({"suite": "noos"}, "Input should be"),
    ],
)
def test_a_suite_stands_for_itself(settings, reason) -> None:
    with pytest.raises(ValidationError, match=reason):
        LmEval(name="lm_eval", **settings)
