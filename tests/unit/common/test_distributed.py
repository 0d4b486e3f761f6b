"""Processes of one launch share work and results, and fewer than were asked for is an error.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_distributed.py
"""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate import PartialState

from common import distributed
from common.errors import InputError, RecipeError

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")

# Each process prints what it sees; the asserts are on the outside.
PROCESS = """
import json
import torch
from common import distributed
from common.errors import StageError
distributed.start(2)
calls, alone = [], []
def work(part):
    calls.append(list(part))
    return [item * 10 for item in part]
def work_alone():
    # Each of these would wait for the other process, who takes no part.
    distributed.barrier()
    alone.append(distributed.world_size())
    total = distributed.sum_over_processes(torch.tensor([4.0])).item()
    return distributed.broadcast(total), distributed.share([1, 2, 3], lambda part: [-item for item in part])
def fail():
    raise StageError(f"found by {distributed.rank()}")
def failure():
    try:
        distributed.by_main(fail)
    except StageError as error:
        return str(error)
seen = {
    "by main": distributed.by_main(work_alone),
    "alone": alone,
    "failure": failure(),
    "rank": distributed.rank(),
    "world": distributed.world_size(),
    "main": distributed.is_main(),
    "odd": distributed.share([1, 2, 3, 4, 5], work),
    "one": distributed.share([7], work),
    "none": distributed.share([], work),
    "mine": calls,
    "batches": distributed.share_batches([[1, 2], [3], [4]], sum, "sums"),
    "sum": distributed.sum_over_processes(torch.tensor([1.0 + distributed.rank()], dtype=torch.float64)).tolist(),
    "broadcast": distributed.broadcast(f"of {distributed.rank()}"),
}
distributed.barrier()
distributed.leave()
print(json.dumps(seen))
"""


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    yield
    PartialState._reset_state()


def test_one_process_does_everything_itself():
    assert distributed.world_size() == 1
    assert distributed.is_main()
    seen = []

    def work(part):
        seen.extend(part)
        return [item + 1 for item in part]

    assert distributed.share([1, 2, 3], work) == [2, 3, 4]
    assert seen == [1, 2, 3]
    assert distributed.share_batches([[1, 2], [3], []], sum, "sums") == [3, 3, 0]
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    assert distributed.by_main(lambda: "done") == "done"
    distributed.barrier()


def test_a_wrong_recipe_tells_other_processes_the_same():
    error = RecipeError(["one", "two"])
    told = pickle.loads(pickle.dumps(error))
    assert (str(told), told.problems) == (str(error), ["one", "two"])


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    whole = psutil.virtual_memory().total
    assert distributed.room() == whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.room() == whole // 4


def test_fewer_processes_than_the_recipe_asks_for_are_refused():
    with pytest.raises(InputError, match=r"4 processes were asked for, but 1 started"):
        distributed.start(expected=4)
    assert distributed.start(expected=1).num_processes == 1


def test_a_launcher_that_starts_one_process_instead_of_several_is_found_out(monkeypatch):
    # What `accelerate launch --cpu --num_processes 2` leaves behind.
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(
        InputError, match=r"only one was started.*--config_file configs/cpu-2\.yaml"
    ):
        distributed.start()


@pytest.mark.distributed
def test_two_processes_share_work_and_all_get_all_results():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        environment = {
            **os.environ,
            **launch,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", PROCESS]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["main"], second["main"]) == (True, False)
    for seen in (first, second):
        assert seen["world"] == 2
        assert seen["odd"] == [10, 20, 30, 40, 50]
        assert seen["one"] == [70]
        assert seen["none"] == []
        assert seen["batches"] == [3, 3, 4]
        assert seen["sum"] == [3.0]
        assert seen["broadcast"] == "of 0"
        assert seen["by main"] == [4.0, [-1, -2, -3]]
        assert seen["failure"] == "found by 0"
    assert (first["alone"], second["alone"]) == ([1], [])
    assert first["mine"] == [[1, 3, 5], [7], []]
    assert second["mine"] == [[2, 4], [], []]
