"""The residual stream, read by hooks at the input of every block.

`hidden_states[-1]` of transformers is taken behind the final norm and cannot stand for the last block; hooks
read the stream itself. "resid_pre of layer i" below is the input of block i.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from common import chat
from common.architecture import MLP_MODULE, find_blocks

# Keys and values [1, heads, length, head size] of each block but the last.
Opening = list[tuple[Tensor, Tensor]]


class _AllRead(Exception):
    """Ends a forward pass once the input of the last block was seen."""


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    num_positions: int,
    opening: Opening | None = None,
) -> Tensor:
    """Read resid_pre of every block at the last positions, and compute nothing that they do not need.

    The pass ends at the last block: neither that block nor the final norm and the unembedding run. The MLP of the
    block before it works on the positions that are read, since nothing reads the others any more.

    Args:
        model: a causal language model.
        ids: token ids [batch, length], padded on the left.
        mask: attention mask [batch, length].
        num_positions: how many positions, counted from the end.
        opening: what `read_opening` gave for tokens that stand before `ids` in every row.

    Returns:
        [batch, layers, num_positions, d_model] in the model's dtype.

    Raises:
        ValueError: if one of these positions is padding in some row; what is read there means nothing.
    """
    if ids.shape[1] < num_positions or not mask[:, -num_positions:].all():
        raise ValueError(
            f"the last {num_positions} positions of a row hold padding; pad on the left, and ask for no more "
            "positions than the shortest prompt has tokens"
        )
    cache = None
    if opening is not None:
        cache = DynamicCache(config=model.config)
        for block, (keys, values) in enumerate(opening):
            cache.update(
                keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), block
            )
        mask = torch.cat([mask.new_ones(len(mask), cache.get_seq_length()), mask], dim=1)
    with reading(model, num_positions) as streams, _last_mlp_at(model, num_positions):
        _run_blocks(model, ids, mask, cache)
    return torch.stack([stream.to(ids.device) for stream in streams], dim=1)


@torch.inference_mode()
def read_opening(model: PreTrainedModel, ids: Sequence[int]) -> Opening:
    """The keys and values of tokens that many rows begin with, for `read`."""
    cache = DynamicCache(config=model.config)
    rows = torch.tensor([list(ids)], device=model.device)
    _run_blocks(model, rows, torch.ones_like(rows), cache)
    return [(keys, values) for keys, values, _ in cache if keys is not None]


def can_share_opening(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows may be read behind an opening that is computed once, without a difference to the result.

    Padding then lies between the opening and the rest. It is masked, but a sliding window counts it, so a window
    must not be shorter than the longest row; layers that keep a state instead of keys and values cannot skip it.
    """
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return types <= {"full_attention", "sliding_attention"} and (not window or longest <= window)


def _run_blocks(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None
) -> None:
    """Run the model up to the input of its last block."""

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _AllRead

    handle = find_blocks(model)[-1].register_forward_pre_hook(stop)  # behind the hooks that read
    try:
        with suppress(_AllRead):
            model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=chat.positions(mask)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
            )
    finally:
        handle.remove()


@contextmanager
def _last_mlp_at(model: PreTrainedModel, num_positions: int) -> Iterator[None]:
    """Let the MLP of the last block that `_run_blocks` runs compute the last positions only; the others get zeros."""

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lengths.append(args[0].shape[1])
        return tuple(arg[:, -num_positions:].contiguous() for arg in args)

    def fill(_module: nn.Module, _args: tuple[Tensor, ...], output: Any) -> Any:  # noqa: ANN401  # torch's hook type
        if isinstance(output, tuple):  # with the router's scores behind it
            return (fill(_module, _args, output[0]), *output[1:])
        return nn.functional.pad(output, (0, 0, lengths.pop() - output.shape[1], 0))

    lengths: list[int] = []
    handles = []
    for block in find_blocks(model)[-2:-1]:
        mlp = block.get_submodule(MLP_MODULE)
        handles += [mlp.register_forward_pre_hook(keep), mlp.register_forward_hook(fill)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reading(
    model: nn.Module, num_positions: int | None = None, *, gradients: bool = False
) -> Iterator[list[Tensor]]:
    """Collect resid_pre at the last positions during a forward pass with left padding.

    Args:
        model: a causal language model.
        num_positions: how many positions, counted from the end, are kept; all if None.
        gradients: whether a loss on what was read may flow back into the model.

    Yields:
        A list that holds after a forward pass one tensor [batch, num_positions, d_model] per block.
    """
    streams: list[Tensor] = []
    kept = slice(None) if num_positions is None else slice(-num_positions, None)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        streams.append(hidden[:, kept] if gradients else hidden[:, kept].detach())

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
