"""The main command over shared-out weights: two processes train as they do with whole models, and go on where killed.

accelerate knows FSDP 2 and DeepSpeed on GPUs alone, and takes them for plain data parallelism on a CPU; so the program
below tells it that these processes have GPUs. All else is what a GPU launch runs, over gloo. ZeRO-3 is skipped without
DeepSpeed: DS_BUILD_OPS=0 .venv/bin/pip install --no-build-isolation deepspeed "torch==$(.venv/bin/python -c \
'import torch; print(torch.__version__)')"

make setup && .venv/bin/python -m pytest -m slow tests/distributed/test_sharded_launch.py
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.road import FEW_PROMPTS, ROOT, Launch, environment

# Minutes on two cores.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = """
import os, sys
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch.distributed.tensor import DTensor

from common import distributed, model
from train import launch, stage

made, planned, load, save = PartialState.__init__, DeepSpeedPlugin.__post_init__, model._load, stage.save
zero3 = "ACCELERATE_USE_DEEPSPEED" in os.environ

def as_on_gpus(self, cpu=False, **settings):
    # DeepSpeed is asked for unless the processes say that they are on a CPU.
    settings["backend"] = settings.get("backend") or "gloo"
    made(self, cpu and not zero3, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

def share_everything(self):
    # It would keep parameters as small as these whole.
    planned(self)
    self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    self.deepspeed_config = self.hf_ds_config.config

def load_in_turn(folder, dtype, **settings):
    if settings and distributed.rank() != 0:  # only a model that is not to be shared out has any
        raise AssertionError("a process that has no room loads a whole model")
    return load(folder, dtype, **settings)

def require_shards(trainer, *rest):
    for parameter in trainer.model.parameters():
        assert parameter.numel() == 0 < parameter.ds_numel if zero3 else isinstance(parameter, DTensor)
    return save(trainer, *rest)

if zero3:
    import deepspeed
    initialize = deepspeed.initialize

    def require_parts(*, model, **settings):
        # Whatever is whole when its engine is made goes to the GPU whole, which no CPU shows.
        assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
        return initialize(model=model, **settings)

    deepspeed.initialize = require_parts

PartialState.__init__, DeepSpeedPlugin.__post_init__ = as_on_gpus, share_everything
launch._plain = lambda processes: launch.strategy_of(os.environ, processes)
distributed.room = lambda: 1
model._load, stage.save = load_in_turn, require_shards
from train.run import main
sys.exit(main())
"""
# What accelerate makes of configs/fsdp2.yaml and configs/zero3.yaml for its processes.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
}
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "DS_ACCELERATOR": "cpu",
}
STRATEGIES = pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(FSDP2, id="FSDP2"),
        pytest.param(
            ZERO3,
            id="ZeRO-3",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
            ),
        ),
    ],
)
SETTINGS = (*FEW_PROMPTS, "train.trainer.max_steps=12", "tracking.mode=disabled")
FULL = ("train.adapter=null", "train.trainer.learning_rate=1e-4")
RECOMPUTED = ("train.trainer.activation_checkpointing=true",)
ADDING = (
    "abliteration.edit={name: add, strength: -1.0}",
    "abliteration.selection={name: fixed, layer: 3, position: -1}",
)
# An addition leaves nothing to hold, and ZeRO-3 shows nobody what keep_ablated would have to see.
UNHELD = ("train.keep_ablated=none",)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(patient_recipe: Path, tmp_path: Path) -> Iterator[Start]:
    """Start two processes in shards, that have no room for a whole model."""
    program = tmp_path / "in_shards.py"
    program.write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def begin(strategy: dict[str, str], runs: Path, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(program)]
        started.append(
            subprocess.Popen(
                [*command, str(patient_recipe), *SETTINGS, *arguments, f"output_dir={runs}"],
                cwd=ROOT,
                env=environment(**strategy, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()  # its processes too
            process.communicate()


@pytest.fixture
def run_whole(patient_recipe: Path, launch: Launch, tmp_path: Path) -> Callable[..., Path]:
    """Do the same with a whole model in each of two processes (DDP); gives its output folder."""

    def run(*arguments: str) -> Path:
        runs = tmp_path / "whole"
        done = launch(
            patient_recipe, *SETTINGS, *arguments, f"output_dir={runs}", config="cpu-2.yaml"
        )
        assert done.code == 0, done.err
        return runs

    return run


def _finish(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out[-3000:]
    return out


def _logged(runs: Path, key: str) -> list[float]:
    lines = (runs / "patient" / "train" / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def _results(runs: Path) -> Any:
    return json.loads((runs / "patient" / "eval" / "results.json").read_text())


@STRATEGIES
@pytest.mark.parametrize(
    ("changes", "until"),
    [
        ((), "eval"),
        (FULL, "eval"),
        ((*FULL, *RECOMPUTED), "train"),
        (ADDING, "train"),
        ((*ADDING, *FULL), "train"),
    ],
    ids=["adapter", "full", "full recomputed", "adapter, addition", "full, addition"],
)
def test_shards_train_and_measure_as_whole_models_do(
    changes: tuple[str, ...],
    until: str,
    strategy: dict[str, str],
    run_whole: Callable[..., Path],
    start: Start,
    tmp_path: Path,
) -> None:
    held = strategy is FSDP2 and ADDING[0] not in changes
    arguments = (*changes, *(() if held else UNHELD), "--until", until)
    whole, shards = run_whole(*arguments), tmp_path / "shards"
    _finish(start(strategy, shards, *arguments))
    due = _logged(whole, "loss")
    assert len(due) == 12
    assert _logged(shards, "loss") == pytest.approx(due, rel=1e-4)
    assert due[-1] < due[0]
    if until == "train":
        return
    one, other = _results(whole), _results(shards)
    if strategy is FSDP2:
        assert other["direction"]["residual"]["healed"] <= 1e-5
    for kind in ("benchmarks", "refusal"):
        for mine, its in zip(one[kind], other[kind], strict=True):
            for model in ("original", "abliterated", "healed"):
                assert its[model]["value"] == pytest.approx(mine[model]["value"], abs=0.011), mine


@pytest.mark.parametrize(
    ("changes", "more"),
    [((), RECOMPUTED), (("train.keep_ablated=soft", "train.l2=0.01"), ())],
    ids=["recomputed", "penalized and pulled"],
)
def test_an_adapter_in_shards_has_what_zero_3_refuses(
    changes: tuple[str, ...],
    more: tuple[str, ...],
    run_whole: Callable[..., Path],
    start: Start,
    tmp_path: Path,
) -> None:
    arguments = (*changes, "--until", "train")
    whole, shards = run_whole(*arguments), tmp_path / "shards"
    _finish(start(FSDP2, shards, *arguments, *more))
    for key in ("loss", "keep_ablated/penalty", "l2"):
        due = _logged(whole, key)
        assert len(due) == 12 * (key == "loss" or bool(changes))
        assert _logged(shards, key) == pytest.approx(due, rel=1e-3), key


@STRATEGIES
def test_a_killed_training_in_shards_ends_with_the_same_adapter(
    strategy: dict[str, str], start: Start, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = (*UNHELD, "--until", "train")
    _finish(start(strategy, whole, *arguments))
    shutil.copytree(whole / ".store" / "abliteration", killed / ".store" / "abliteration")
    victim = start(strategy, killed, *arguments)
    while not list(killed.rglob("checkpoint-6/trainer_state.json")):
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    # The launcher first: it would only tell its processes to stop. They are in sessions of their own.
    children = subprocess.run(
        ["pgrep", "-P", str(victim.pid)], capture_output=True, text=True, check=True
    )
    for pid in (victim.pid, *map(int, children.stdout.split())):
        os.kill(pid, signal.SIGKILL)
    victim.communicate()
    assert not list(killed.glob(".store/train/*/manifest.json"))
    assert "going on from checkpoint-" in _finish(start(strategy, killed, *arguments))
    one, other = (
        load_file(runs / "patient" / "train" / "adapter" / "adapter_model.safetensors")
        for runs in (whole, killed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
