"""A search that is killed goes on where it was and ends with the same trials, choice and edit.

make setup && .venv/bin/python -m pytest -m slow tests/end_to_end/test_kill_search.py
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.road import ROOT, Launch, environment

ARGUMENTS = (
    "abliteration.selection={name: search, num_trials: 14, trials_per_pass: 2}",
    "abliteration.edit.strength=1.0",
    "abliteration.prompts.harmful.slice=0:64",
    "abliteration.prompts.harmless.slice=0:64",
    "tracking.mode=disabled",
    "--until",
    "abliteration",
)


def _outcome(runs: Path) -> tuple[dict[str, Any], bytes]:
    folder = runs / "patient" / "abliteration"
    candidates: dict[str, Any] = json.loads((folder / "candidates.json").read_text())
    return candidates, (folder / "edit.safetensors").read_bytes()


@pytest.mark.slow
def test_a_search_killed_midway_ends_with_the_same_trials(
    patient_recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch(patient_recipe, *ARGUMENTS, f"output_dir={whole}", config=None)
    assert done.code == 0, done.err

    victim = subprocess.Popen(
        [sys.executable, "train/run.py", str(patient_recipe), *ARGUMENTS, f"output_dir={killed}"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while sum(path.read_bytes().count(b"\n") for path in killed.rglob("trials.jsonl")) < 2:
        assert victim.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (journal,) = killed.glob(".store/abliteration/*/trials.jsonl")
    before = journal.read_bytes()
    assert before.count(b"\n") < 7, "the search ended before it could be killed"
    assert not list(killed.glob(".store/abliteration/*/manifest.json"))
    journal.write_bytes(before + b'[{"number": "par')  # a kill in the middle of a line

    resumed = launch(patient_recipe, *ARGUMENTS, f"output_dir={killed}", config=None)
    assert resumed.code == 0, resumed.err
    assert _outcome(killed) == _outcome(whole)
    assert len(_outcome(whole)[0]["trials"]) == 14
    # What was finished before the kill was not measured again.
    assert journal.read_bytes().startswith(before)
