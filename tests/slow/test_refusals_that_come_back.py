"""What brings refusals back while a model heals, and that training held to the ablation keeps them away.

Run: make setup && .venv/bin/python -m pytest -m slow tests/slow/test_refusals_that_come_back.py
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.road import ROOT, Launch, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def removing(patient_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patient's recipe with the direction removed, and no anchor to what it unlocked."""
    data = yaml.safe_load(patient_recipe.read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("removing")
    data["output_dir"] = str(folder / "runs")
    data["abliteration"]["edit"]["strength"] = 1.0
    data["train"]["anchors"] = [
        anchor for anchor in data["train"]["anchors"] if anchor["to"] == "original"
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def _stages(launch: Launch, recipe: Path, until: str, *changes: str) -> Path:
    done = launch(recipe, "eval.accept={}", *changes, "--until", until, config=None)
    assert done.code == 0, done.err
    return recipe.parent / "runs" / "patient"


def _healed(launch: Launch, recipe: Path, mode: str) -> dict[str, Any]:
    run = _stages(launch, recipe, "eval", f"train.keep_ablated={mode}")
    results: dict[str, Any] = json.loads((run / "eval" / "results.json").read_text())
    return results


def test_healing_on_harmless_answers_writes_the_removed_direction_again_unless_it_is_held(
    launch: Launch, removing: Path
) -> None:
    plain, held = (_healed(launch, removing, mode) for mode in ("none", "hard"))
    for results, low, high in ((plain, 0.2, 1.0), (held, 0.0, 0.03)):
        panel = next(row for row in results["refusal"] if row["name"] == "restricted")
        assert panel["abliterated"]["value"] <= 0.02
        assert low <= panel["healed"]["value"] <= high
    assert plain["direction"]["reestimated"]["healed"]["cosine"] > 0.9
    assert abs(held["direction"]["reestimated"]["healed"]["cosine"]) < 0.05


def test_by_the_time_plain_dpo_has_regained_half_from_poisoned_pairs_hard_has_regained_few(
    launch: Launch, patient: Path, removing: Path
) -> None:
    run = _stages(launch, removing, "abliteration")
    measured = subprocess.run(
        [
            *(sys.executable, "benchmarks/poisoned.py", patient, run / "abliteration"),
            *("--targets", "o_proj", "down_proj", "--seeds", "0"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(measured.stdout.splitlines()[-1])
    refused = {row["mode"]: [one["refused"] for one in row["curve"]] for row in found["rows"]}
    residual = {row["mode"]: row["residual"] for row in found["rows"]}
    assert found["ratio"] > 3
    # At every count, not only at that one, and with soft in between.
    counts = zip(refused["hard"], refused["soft"], refused["none"], strict=True)
    assert all(hard <= soft + 15 and soft <= none + 15 for hard, soft, none in counts)
    assert residual["hard"] < 1e-4 < residual["soft"] < residual["none"] / 2
