"""The launch configurations, as accelerate itself reads them.

python -m pytest tests/unit/test_configs.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# File: distributed type, processes over all machines, machines, on the CPU, precision.
EXPECTED = {
    "cpu": ("NO", 1, 1, True, "no"),
    "cpu-2": ("MULTI_GPU", 2, 1, True, "no"),
    "gpu": ("NO", 1, 1, False, "bf16"),
    "ddp": ("MULTI_GPU", 8, 1, False, "bf16"),
    "fsdp2": ("FSDP", 8, 1, False, "bf16"),
    "fsdp2-1": ("FSDP", 1, 1, False, "bf16"),
    "multi-node-fsdp2": ("FSDP", 16, 2, False, "bf16"),
    "zero2": ("DEEPSPEED", 8, 1, False, "bf16"),
    "zero3": ("DEEPSPEED", 8, 1, False, "bf16"),
    "multi-node": ("MULTI_GPU", 16, 2, False, "bf16"),
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_begins_with_the_command_that_uses_it(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    [command, *_] = [line for line in head if "accelerate launch" in line]
    assert f"--config_file configs/{path.name} " in command
    assert "--quiet" in command
    [recipe] = [word for word in command.split() if word.startswith("recipes/")]
    assert (ROOT / recipe).is_file()


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
