"""A study whose trials each take two processes: the main one speaks with the storage, both do every stage.

The stages only pretend (tests/studying.py).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import studying
from tests.road import environment

pytestmark = pytest.mark.distributed


def launch(recipe: Path, log: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command = [sys.executable, "-m", *launcher, "--config_file", "configs/cpu-2.yaml"]
    return subprocess.run(
        [*command, "tests/studying.py", str(recipe)],
        cwd=studying.ROOT,
        env=environment(STUDY_LOG=str(log), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "trying" / "study.json").read_text())


def test_two_processes_do_each_trial_together_and_once(tmp_path: Path) -> None:
    """A trial that fails ends both, since one may wait for the other; the next launch goes on behind it."""
    study = {"parameters": {"train.trainer.beta": {"choices": [0.1, 9, 0.3]}}}
    recipe, log = studying.write_recipe(tmp_path, study), tmp_path / "log"
    first = launch(recipe, log)
    assert first.returncode != 0
    assert "beta 9 breaks it" in first.stderr
    second = launch(recipe, log)
    assert second.returncode == 0, second.stderr
    states = {t["setting"]["train.trainer.beta"]: t["state"] for t in found(tmp_path)["trials"]}
    assert states == {0.1: "complete", 9: "failed", 0.3: "complete"}
    assert studying.runs_of(log) == {
        "abliteration": 1 + 2,
        "train": 2 + 2,
        "eval": 2 + 2 + 1,
        "release": 1,
    }
    manifest = next((tmp_path / "runs" / ".store" / "train").glob("*/manifest.json"))
    assert json.loads(manifest.read_text())["processes"] == 2
