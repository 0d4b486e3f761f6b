"""The shipped recipe on the patient, run once through the real command, and ways to run it again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Short stages for tests that ask about the machinery, not about quality.
FEW_PROMPTS = (
    "train.preferences.0.prompts.slice=0:64",
    "train.anchors.0.prompts.slice=0:64",
    "train.anchors.1.prompts.slice=0:32",
    "train.anchors.2.prompts.slice=0:32",
    "train.trainer.logging_steps=1",
    "eval.accept={}",
)
SHORT = (*FEW_PROMPTS, "train.trainer.max_steps=12")


class Done(NamedTuple):
    """A finished command: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Demo(NamedTuple):
    """The demo's output folder and recipe, and what its first run printed."""

    runs: Path
    recipe: Path
    first: Done

    @property
    def folder(self) -> Path:
        return self.runs / "patient"


Launch = Callable[..., Done]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would change where a run goes, offline."""
    dropped = ("WANDB_MODE", "WANDB_API_KEY", "WORLD_SIZE", "RANK", "MASTER_ADDR")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **changes}


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run the main command as the README does, or directly."""

    def run(recipe: Path, *arguments: str, config: str | None = "cpu.yaml", **changes: str) -> Done:
        command = [sys.executable]
        if config is not None:
            launcher = "accelerate.commands.accelerate_cli"
            command += ["-m", launcher, "launch", "--quiet", "--config_file", f"configs/{config}"]
        done = subprocess.run(
            [*command, "train/run.py", str(recipe), *arguments],
            cwd=ROOT,
            env=environment(**changes),
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def patient_recipe(patient: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe over the tests' patient."""
    text = (ROOT / "recipes" / "patient.yaml").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("recipe") / "patient.yaml"
    path.write_text(text.replace("runs/patient-model", str(patient)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def demo(launch: Launch, patient_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once per test run."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    return Demo(runs, patient_recipe, launch(patient_recipe, f"output_dir={runs}"))


@pytest.fixture(scope="session")
def read_wandb() -> Callable[[Path], list[dict[str, Any]]]:
    """Read the records of an offline wandb run with wandb's own command."""

    def read(file: Path) -> list[dict[str, Any]]:
        shown = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in shown.stdout.splitlines() if line.strip()]

    return read
