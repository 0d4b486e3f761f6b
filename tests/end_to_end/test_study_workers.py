"""Several workers on one study: every trial is done once, whoever is killed, over a journal file and over PostgreSQL.

The stages only pretend (tests/studying.py): what is asked here is the machinery.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eval.quick  # noqa: F401
import train.study_plan  # noqa: F401  # what workers need, before they are forked
from tests import studying

PARAMETERS = {
    "abliteration.edit.strength": {"choices": [1.0, 2.0]},
    "train.trainer.beta": {"choices": [0.05, 0.1, 0.3, 0.5, 0.7, 1.0]},
}
NUM_TRIALS = 12


class Worker:
    """The main command in a process of its own, forked: it need not import everything again."""

    def __init__(self, recipe: Path, errors: Path, variables: dict[str, object]) -> None:
        """Start it."""
        self.errors = errors
        self.process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(recipe, variables)
        )
        self.process.start()

    def _run(self, recipe: Path, variables: dict[str, object]) -> None:
        os.environ.update({name: str(value) for name, value in variables.items()})
        sys.stdout = sys.stderr = self.errors.open("w", buffering=1)
        logging.basicConfig(stream=sys.stderr, format="%(message)s", force=True)
        studying.install()
        os._exit(studying.run.main([str(recipe)]))

    def wait(self) -> int:
        """Its exit code."""
        self.process.join(timeout=300)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def finish(self) -> str:
        """What it printed, having succeeded."""
        assert self.wait() == 0, self.text
        return self.text

    @property
    def text(self) -> str:
        return self.errors.read_text()


class Workers:
    """Processes that are at work on one study."""

    def __init__(self, folder: Path, name: str = "trying", **study: Any) -> None:
        """Write the recipe."""
        folder.mkdir(exist_ok=True)
        study = {"parameters": PARAMETERS, **study}
        self.recipe = studying.write_recipe(folder, study, name=name)
        self.log, self.folder = folder / "log", folder / "runs" / name
        self.log.touch()
        self.count = 0

    def start(self, seconds: float = 0.0, kill: str = "") -> "Worker":
        self.count += 1
        variables = {"STUDY_LOG": self.log, "STUDY_SECONDS": seconds, "STUDY_KILL": kill}
        return Worker(self.recipe, self.log.with_name(f"worker-{self.count}"), variables)

    def found(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "study.json").read_text())
        return found


def assert_done_once(workers: Workers) -> None:
    found = workers.found()
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * NUM_TRIALS
    settings = Counter(json.dumps(trial["setting"]) for trial in found["trials"])
    assert len(settings) == NUM_TRIALS
    runs = studying.runs_of(workers.log)
    # Of the search, of the two seeds of the confirmation, of the release.
    assert runs == {"abliteration": 2 + 2, "train": 12 + 2, "eval": 12 + 2 + 1, "release": 1}
    assert not list(workers.folder.parent.rglob("half.json"))
    assert not list(workers.folder.rglob("stages.json"))


def choice(found: dict[str, Any]) -> dict[str, Any]:
    by_number = {trial["number"]: trial["setting"] for trial in found["trials"]}
    return {
        "front": [by_number[number] for number in found["front"]],
        "best": by_number[found["best"]],
        "values": {json.dumps(t["setting"]): t["values"] for t in found["trials"]},
        "test": found["test"]["values"],
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The study as one worker does it."""
    workers = Workers(tmp_path_factory.mktemp("alone"))
    workers.start().finish()
    assert_done_once(workers)
    return workers.found()


def run_with_losses(workers: Workers) -> list[str]:
    """Three workers, of which one is killed at the beginning of a stage, and one while it trains."""
    first = workers.start(kill="abliteration")
    assert first.wait() == -signal.SIGKILL
    second = workers.start(seconds=30)
    # The second waits thirty seconds in every stage: it is killed in the middle of one.
    deadline = time.monotonic() + 120
    while not list((workers.folder.parent / ".store").glob("*/*/half.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    second.process.kill()
    second.wait()
    left = [workers.start(seconds=0.05) for _ in range(2)]
    return [worker.finish() for worker in left]


def test_three_workers_of_which_two_are_killed_find_what_one_finds(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    workers = Workers(tmp_path)
    texts = run_with_losses(workers)
    assert_done_once(workers)
    assert choice(workers.found()) == choice(alone)
    assert any("was left by another worker" in text for text in texts)
    assert max(trial["attempts"] for trial in workers.found()["trials"]) >= 2


def test_a_stage_that_is_being_made_is_awaited_and_not_made_twice(tmp_path: Path) -> None:
    workers = Workers(tmp_path)
    both = [workers.start(seconds=0.3) for _ in range(2)]
    for worker in both:
        worker.finish()
    assert_done_once(workers)
    pids = {line.split()[2] for line in workers.log.read_text().splitlines()}
    assert len(pids) == 2, "one worker did everything, so this test shows nothing"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of its own, for as long as the tests take."""
    pytest.importorskip(
        "psycopg", reason="psycopg is not installed: pip install -e '.[postgresql]'"
    )
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if os.name == "posix" else []
    initdb = shutil.which("initdb") or next((str(f / "initdb") for f in folders[::-1]), None)
    if initdb is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    binaries = Path(initdb).resolve().parent
    folder = tmp_path_factory.mktemp("postgres")
    # The server refuses to run as root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if as_user:
        for parent in (folder, *folder.parents[:3]):
            if parent != Path("/tmp"):
                parent.chmod(0o755)
        shutil.chown(folder, "postgres", "postgres")
    data, port = folder / "data", str(20000 + os.getpid() % 20000)

    def command(*words: str) -> None:
        subprocess.run([*as_user, *words], check=True, capture_output=True, cwd=folder)

    command(str(binaries / "initdb"), "-D", str(data), "-U", "healing", "-A", "trust")
    options = f"-p {port} -k {folder} -c listen_addresses="
    start = ("-D", str(data), "-w", "-l", str(folder / "log"), "-o", options)
    command(str(binaries / "pg_ctl"), *start, "start")
    yield f"postgresql+psycopg://healing@/postgres?host={folder}&port={port}"
    command(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def test_the_same_over_postgresql(tmp_path: Path, alone: dict[str, Any], database: str) -> None:
    workers = Workers(tmp_path, storage=database)
    run_with_losses(workers)
    assert_done_once(workers)
    assert choice(workers.found()) == choice(alone)
    assert not (workers.folder / "study.journal").exists()


def test_a_worker_with_another_disk_is_told(tmp_path: Path, database: str) -> None:
    here, there = (Workers(tmp_path / part, "apart", storage=database) for part in ("a", "b"))
    here.start().finish()
    other = there.start()
    assert other.wait() == 2, other.text
    assert "all workers of a study share one" in other.text
    assert not studying.runs_of(there.log)
