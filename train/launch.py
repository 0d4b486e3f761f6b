"""What a launch shares out between its processes: in training nothing, the optimizer, or the weights too; else prompts.

Outside training every process has a whole model, where there is room for it.

accelerate passes its configuration to each process in environment variables; on a CPU it takes FSDP and DeepSpeed for
plain data parallelism, and says nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from common import distributed
from common.recipe import Recipe
from train.adapter import num_parameters

Result = TypeVar("Result")

# Stage three has two models at once; the rest is for what they compute.
MODELS_AT_ONCE: Final = 2
FOR_WEIGHTS: Final = 0.9


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


def models_fit(recipe: Recipe) -> bool:
    """Whether a process like this one has room for the whole models that it needs outside training."""
    number, width = num_parameters(recipe)
    return MODELS_AT_ONCE * number * width <= FOR_WEIGHTS * distributed.room()


def with_whole_models(recipe: Recipe, work: Callable[[], Result]) -> Result:
    """Do work that takes whole models, on all processes if they have room for them, else by the main one.

    There a model is spread over every GPU of the machine (`common.model.load_model`): so a launch can train a model in
    shards that no GPU holds.
    """
    if distributed.world_size() == 1 or distributed.broadcast(models_fit(recipe)):
        return work()
    return distributed.by_main(work)


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
