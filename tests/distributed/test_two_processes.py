"""One process and two on the same recipe: the same directions, scores and first loss, and healed rates that agree.

make setup && .venv/bin/python -m pytest tests/distributed
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.edits import load_edit
from tests.road import Demo, Launch

pytestmark = pytest.mark.distributed
# The same short training on both sides; the gates are the demo's business.
SHORTER = (
    "train.trainer.max_steps=20",
    "train.trainer.logging_steps=1",
    "eval.benchmarks.0.tasks=[addition, kinds]",
    "eval.accept={}",
)


@pytest.fixture(scope="module")
def both(demo: Demo, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folders of one process and of two."""
    folders = []
    for config in ("cpu.yaml", "cpu-2.yaml"):
        runs = tmp_path_factory.mktemp("runs")
        arguments = (*SHORTER, f"output_dir={runs}", "tracking.mode=disabled", "--until", "eval")
        done = launch(demo.recipe, *arguments, config=config)
        assert done.code == 0, done.err
        # One speaks for both.
        assert done.err.count("trainable parameters") == 1
        folders.append(runs / "patient")
    return folders[0], folders[1]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_there_really_were_two_processes(both: tuple[Path, Path]) -> None:
    assert [read(folder, "train/manifest.json")["processes"] for folder in both] == [1, 2]


def test_the_direction_and_every_score_are_the_same(both: tuple[Path, Path]) -> None:
    one, two = (load_edit(folder / "abliteration" / "edit.safetensors") for folder in both)
    assert torch.allclose(one.direction, two.direction, atol=1e-5)
    one_scores, two_scores = (read(folder, "abliteration/candidates.json") for folder in both)
    assert one_scores["chosen"]["layer"] == two_scores["chosen"]["layer"]
    for mine, other in zip(one_scores["candidates"], two_scores["candidates"], strict=True):
        for score in ("norm", "bypass", "induce", "kl"):
            if mine[score] is not None:
                assert mine[score] == pytest.approx(other[score], abs=1e-5), (mine, other)


def test_the_first_loss_is_the_same(both: tuple[Path, Path]) -> None:
    first = [
        json.loads((folder / "train" / "log.jsonl").read_text().splitlines()[0]) for folder in both
    ]
    assert first[0]["step"] == first[1]["step"] == 1
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-5)


def test_the_healed_rates_agree_within_their_intervals(both: tuple[Path, Path]) -> None:
    one, two = (read(folder, "eval/results.json") for folder in both)
    for kind in ("benchmarks", "refusal"):
        for mine, other in zip(one[kind], two[kind], strict=True):
            assert mine["original"] == other["original"]
            assert mine["abliterated"] == other["abliterated"]
            assert mine["healed"]["low"] <= other["healed"]["value"] <= mine["healed"]["high"]


@pytest.mark.slow
def test_a_mix_a_soft_constraint_and_stopping_are_the_same(
    patient: Path, patient_recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    prompts = patient / "prompts"

    def tagged(rows: str) -> str:
        return f"{{path: {prompts}/healing.jsonl, domain: domain, slice: '{rows}'}}"

    def first(name: str) -> str:
        return f"{{path: {prompts}/{name}.jsonl, slice: '0:32'}}"

    quick = "max_new_tokens: 48, every: 8"
    panels = f"harmful: {first('harmful_validation')}, harmless: {first('harmless_validation')}"
    arguments = (
        f"train.preferences.0.prompts={tagged('0:200')}",
        f"train.anchors.0.prompts={tagged('0:200')}",
        "train.anchors.1.prompts.slice=0:32",
        "train.anchors.2.prompts.slice=0:32",
        f"train.mix={{questions: {tagged('2000:2300')}, max_new_tokens: 48}}",
        f"train.stopping={{questions: {tagged('2300:2500')}, {panels}, {quick}}}",
        "train.keep_ablated=soft",
        "train.trainer.max_steps=24",
        "train.trainer.logging_steps=1",
        "tracking.mode=disabled",
    )
    found = []
    for config in ("cpu.yaml", "cpu-2.yaml"):
        runs = tmp_path / config
        done = launch(
            patient_recipe, *arguments, f"output_dir={runs}", "--until", "train", config=config
        )
        assert done.code == 0, done.err
        folder = runs / "patient"
        lines = (folder / "train" / "log.jsonl").read_text().splitlines()
        found.append((read(folder, "train/summary.json"), list(map(json.loads, lines))))
    (one, its_log), (two, other_log) = found
    assert one["mix"] == two["mix"]
    assert any(domain["significant"] for domain in one["mix"]["damage"].values())

    def logged(log: list[dict[str, float]], key: str) -> list[float]:
        return [row[key] for row in log if key in row]

    assert len(logged(its_log, "quick/recovery")) == 4  # at the beginning, and every 8 steps
    # Sums in another order: a question or two may come out otherwise.
    for key, near in (
        ("quick/recovery", {"abs": 0.05}),
        ("quick/refusal", {"abs": 0.05}),
        ("quick/over_refusal", {"abs": 0.05}),
        ("quick/kl", {"rel": 0.02}),
        ("keep_ablated/penalty", {"rel": 0.01}),
    ):
        assert logged(other_log, key) == pytest.approx(logged(its_log, key), **near), key
    assert max(logged(its_log, "keep_ablated/penalty")) > 0


def test_healing_writes_nothing_along_the_direction_on_one_process_or_two(
    both: tuple[Path, Path],
) -> None:
    # The recipe holds it (keep_ablated: hard) while anchors pull to the original, who writes there.
    for folder in both:
        assert read(folder, "eval/results.json")["direction"]["residual"]["healed"] <= 1e-5
