"""The processes of one launch: who they are, how they share work, and whether they are as many as was asked.

Every process takes part in every stage: lists are dealt out, results gathered on all. Written on
accelerate's PartialState, so the same code runs in one process and in many. What takes more room than a process has
is left to the main one (`by_main`), which works as if it were alone.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
import torch.distributed
from tqdm import tqdm

from common.errors import HealingError, InputError

if (
    TYPE_CHECKING
):  # imported where it is used: commands that need one process only are not to wait for it
    from accelerate import PartialState

Item = TypeVar("Item")
Result = TypeVar("Result")

# One process may work for hours while the others wait at a barrier; torch's default of 30 minutes would end them.
TIMEOUT = timedelta(days=7)


class _Others:
    """Whether this process may ask the others for anything: they wait while it works `by_main`."""

    are_waiting = False


def start(expected: int | None = None) -> "PartialState":
    """Join the other processes of this launch, on the GPU where there is one.

    Args:
        expected: the number of processes that the recipe asks for, if it does.

    Raises:
        InputError: if there are fewer processes than the launcher or the recipe asked for.
    """
    from accelerate import PartialState  # noqa: PLC0415

    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # `accelerate launch --cpu --num_processes 2` starts one process only, and says nothing.
        raise InputError(
            "launch: several processes were asked for, but only one was started (MASTER_ADDR is set, WORLD_SIZE is "
            "not); pass --config_file configs/cpu-2.yaml or another file of configs/ to accelerate launch"
        )
    use_cpu = not torch.cuda.is_available()
    state = (
        PartialState(cpu=use_cpu, timeout=TIMEOUT)
        if _launched_with_others()
        else PartialState(cpu=use_cpu)
    )
    promised = expected if expected is not None else int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != promised:
        raise InputError(
            f"launch: {promised} processes were asked for, but {state.num_processes} started; launch with "
            f"--num_processes {promised} and a file of configs/, or correct `processes` in the recipe"
        )
    return state


def leave() -> None:
    """Part from the other processes when all is done.

    Left to the end of Python, gloo's threads are now and then still running: the process is aborted, and a launch
    that did all its work is reported as failed.
    """
    if world_size() > 1:
        torch.distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    state = _state()
    return state.process_index if state is not None else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    state = _state()
    return state.num_processes if state is not None and not _Others.are_waiting else 1


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    state = _state()
    return state.device if state is not None else torch.device("cpu")


def barrier() -> None:
    """Wait for the other processes."""
    state = _state()
    if state is not None and not _Others.are_waiting:
        state.wait_for_everyone()


def room() -> int:
    """The bytes that this process has for itself: its GPU's memory, or its share of the machine's."""
    if device().type == "cuda":
        return torch.cuda.get_device_properties(device()).total_memory
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def by_main(work: Callable[[], Result]) -> Result:
    """Let the main process work as if it were the only one, with every GPU of its machine, while the others wait.

    Args:
        work: what takes models that no process has room for by itself.

    Returns:
        What came of it, on every process.

    Raises:
        HealingError: what it raised of these, on every process.
    """
    if world_size() == 1:
        return work()
    # Not NCCL: it waits in a kernel, and that would take turns with the main process's on the same GPU.
    group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
    _free_cached_memory()
    # The others' memory is free once all are here.
    torch.distributed.barrier(group)
    outcome: list[tuple[Result | None, HealingError | None]] = [(None, None)]
    if is_main():
        try:
            with _as_the_only_one():
                outcome = [(work(), None)]
        except HealingError as error:
            outcome = [(None, error)]
    torch.distributed.broadcast_object_list(outcome, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # the main process's


@contextmanager
def _as_the_only_one() -> Iterator[None]:
    _Others.are_waiting = True
    try:
        yield
    finally:
        _Others.are_waiting = False
        _free_cached_memory()


def _free_cached_memory() -> None:
    """Give back what models left on the GPUs, where another process may need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.to(device())
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(value: Item) -> Item:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list  # noqa: PLC0415

    values = [value]
    broadcast_object_list(values, from_process=0)
    return values[0]


def share(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """Deal items out to the processes, let each work on its part, and return all results in the items' order.

    Args:
        items: the same sequence on every process.
        work: maps a part to as many results, in order.

    Returns:
        One result per item, on every process.
    """
    if world_size() == 1:
        return list(work(items))
    from accelerate.utils import gather_object  # noqa: PLC0415

    mine = items[rank() :: world_size()]
    parts: list[list[Result]] = gather_object([list(work(mine))])
    results: list[Result | None] = [None] * len(items)
    for process, part in enumerate(parts):
        results[process :: world_size()] = part
    return results  # type: ignore[return-value]  # every place is filled: the strides cover all items


def share_batches(
    batches: Sequence[Item], work: Callable[[Item], Result], description: str
) -> list[Result]:
    """Like `share`, with work that takes one batch, under a progress bar.

    Args:
        batches: the same sequence on every process.
        work: maps a batch to what is made of it.
        description: label of the progress bar, which counts the main process's own batches.
    """

    def work_on(part: Sequence[Item]) -> list[Result]:
        bar = tqdm(part, desc=description, unit="batch", disable=not is_main(), leave=False)
        return [work(batch) for batch in bar]

    return share(batches, work_on)


def _state() -> "PartialState | None":
    """The launch as accelerate knows it, if somebody has joined it: until then accelerate may not even be imported."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.PartialState._shared_state:
        return None
    state: PartialState = accelerate.PartialState()
    return state


def _launched_with_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
