"""What a launch shares out between its processes in training: nothing, the optimizer, or the weights too.

accelerate passes its configuration to each process in environment variables; on a CPU it takes FSDP and DeepSpeed for
plain data parallelism, and says nothing.
"""

import os
from dataclasses import dataclass

from common import distributed


@dataclass(frozen=True)
class Strategy:
    """How training is spread.

    Attributes:
        name: as people call it.
        processes: how many there are.
        shards_weights: each process holds a part of the weights, and gathers a block when it is its turn.
        shards_gradients: each process keeps the gradients of its part.
        shards_optimizer: each process keeps the optimizer's state of its part.
    """

    name: str
    processes: int = 1
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False


def launch_strategy() -> Strategy:
    """The strategy of the launch at hand."""
    processes = distributed.world_size()
    if distributed.device().type == "cpu":
        return _plain(processes)
    return strategy_of(os.environ, processes)


def strategy_of(environment: "os._Environ[str] | dict[str, str]", processes: int) -> Strategy:
    """The strategy that accelerate's variables ask for, on machines that can follow it.

    Args:
        environment: the variables that `accelerate launch` sets.
        processes: how many there are.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        return Strategy(f"ZeRO-{stage}", processes, stage >= 3, stage >= 2, stage >= 1)
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        version = environment.get("FSDP_VERSION", "1")
        return Strategy(f"FSDP{version}", processes, True, True, True)
    return _plain(processes)


def _plain(processes: int) -> Strategy:
    return Strategy("DDP", processes) if processes > 1 else Strategy("one process")
