"""The launch configurations, as accelerate itself reads them.

python -m pytest tests/unit/test_configs.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from common.recipe import load_recipe
from train import constraint, settings, stage
from train.launch import strategy_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# File: distributed type, processes over all machines, machines, on the CPU, precision.
EXPECTED = {
    "cpu": ("NO", 1, 1, True, "no"),
    "cpu-2": ("MULTI_GPU", 2, 1, True, "no"),
    "gpu": ("NO", 1, 1, False, "no"),
    "ddp": ("MULTI_GPU", 8, 1, False, "no"),
    "fsdp2": ("FSDP", 8, 1, False, "no"),
    "fsdp2-1": ("FSDP", 1, 1, False, "no"),
    "multi-node-fsdp2": ("FSDP", 16, 2, False, "no"),
    "zero2": ("DEEPSPEED", 8, 1, False, "no"),
    "zero3": ("DEEPSPEED", 8, 1, False, "no"),
    "multi-node": ("MULTI_GPU", 16, 2, False, "no"),
}

# One write a line: the processes share a pipe, and print() may write a line word by word.
RANKS = """
import os
from accelerate import PartialState
state = PartialState(cpu=True)
line = f"{state.process_index} {state.num_processes} {state.backend} {state.device.type}\\n"
os.write(1, line.encode())
state.destroy_process_group()
"""


def load(name):
    return load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))


def test_every_configuration_is_expected_and_none_is_missing():
    assert {path.stem for path in CONFIGS} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_what_the_name_promises(name):
    config = load(name)
    found = (
        config.distributed_type.value,
        config.num_processes,
        config.num_machines,
        config.use_cpu,
        config.mixed_precision,
    )
    assert found == EXPECTED[name]


def commands(path):
    """The launches of a configuration's head, word by word."""
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return [line.split()[1:] for line in head if "accelerate launch" in line]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_begins_with_the_commands_that_use_it(path):
    found = commands(path)
    assert found
    for command in found:
        assert command[command.index("--config_file") + 1] == f"configs/{path.name}"
        assert "--quiet" in command
        [recipe] = [word for word in command if word.startswith("recipes/")]
        assert (ROOT / recipe).is_file()


def strategy(config):
    """What training is told by a launch with this configuration, as accelerate tells it."""
    environment = {}
    if config.distributed_type.value == "FSDP":
        version = str(config.fsdp_config["fsdp_version"])
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version}
    if config.distributed_type.value == "DEEPSPEED":
        zero = str(config.deepspeed_config["zero_stage"])
        environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero}
    return strategy_of(environment, config.num_processes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipe_and_overrides_of_a_command_pass_under_its_configuration(
    path, monkeypatch, build_model
):
    launch = strategy(load(path.stem))
    for module in (stage, constraint):
        monkeypatch.setattr(module, "launch_strategy", lambda: launch)
    # Every recipe that is named here is over a llama, whose shape is on the hub.
    monkeypatch.setattr(constraint, "without_weights", lambda _recipe: build_model("llama"))
    for command in commands(path):
        [place] = [index for index, word in enumerate(command) if word.startswith("recipes/")]
        train = (recipe := load_recipe(ROOT / command[place], command[place + 1 :])).train
        assert settings.check(train.trainer, train.adapter) == []
        assert stage._four_bit_problems(recipe) == []
        assert constraint.check(recipe) == []
        per_device = train.trainer.get("per_device_train_batch_size")
        settings.share_batch(train.global_batch_size, launch.processes, per_device)
        # Those of bitsandbytes read past the end of what they share of a weight.
        assert not (launch.shards_weights and "8bit" in train.trainer.get("optim", ""))


def test_sharded_loading_cannot_leave_a_stage_without_weights():
    for name in ("fsdp2", "fsdp2-1", "multi-node-fsdp2"):
        assert load(name).fsdp_config["fsdp_version"] == 2
        assert load(name).fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert load("zero2").deepspeed_config["zero_stage"] == 2
    assert load("zero3").deepspeed_config["zero_stage"] == 3
    assert load("zero3").deepspeed_config["zero3_init_flag"] is False
    assert load("zero3").deepspeed_config["zero3_save_16bit_model"] is True


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "ranks"), [("cpu", ["0 1 None cpu"]), ("cpu-2", ["0 2 gloo cpu", "1 2 gloo cpu"])]
)
def test_a_launch_on_the_cpu_starts_the_processes_it_promises(tmp_path, name, ranks):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--quiet",
            "--config_file",
            str(ROOT / "configs" / f"{name}.yaml"),
            # A free port, so that launches side by side do not meet.
            "--main_process_port",
            "0",
            str(script),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert sorted(result.stdout.split("\n")[:-1]) == ranks
