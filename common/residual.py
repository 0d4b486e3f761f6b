"""The residual stream, read by hooks at the input of every block.

`hidden_states[-1]` of transformers is taken behind the final norm and cannot stand for the last block; hooks
read the stream itself. "resid_pre of layer i" below is the input of block i.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.architecture import find_blocks


@contextmanager
def reading(model: nn.Module, num_positions: int) -> Iterator[list[Tensor]]:
    """Collect resid_pre at the last positions during a forward pass with left padding.

    Args:
        model: a causal language model.
        num_positions: how many positions, counted from the end, are kept.

    Yields:
        A list that holds after a forward pass one tensor [batch, num_positions, d_model] per block.
    """
    streams: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        streams.append(hidden[:, -num_positions:].detach())

    handles = [
        block.register_forward_pre_hook(hook, with_kwargs=True) for block in find_blocks(model)
    ]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adding(model: nn.Module, layer: int, vector: Tensor) -> Iterator[None]:
    """Add a vector [d_model] to resid_pre of one block, at every position, while the context lasts.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.4, "activation addition".
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401  # torch's hook type
        if args:
            return (args[0] + vector.to(args[0]), *args[1:]), kwargs
        hidden = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": hidden + vector.to(hidden)}

    handle = find_blocks(model)[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class StreamingMean:
    """The mean of many vectors in float64, in memory that does not grow with their number."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.total: Tensor | None = None
        self.count = 0

    def add(self, batch: Tensor) -> None:
        """Add a batch [batch, ...]; all batches have the same shape behind the first axis."""
        summed = batch.to(torch.float64).sum(dim=0)
        self.total = summed if self.total is None else self.total + summed
        self.count += batch.shape[0]
