"""Residual streams of prompts: all layers and end-of-instruction positions in one pass over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat, distributed, residual
from common.errors import StageError

# A shorter opening costs more than it saves: behind it attention needs an explicit mask, which is slower.
MIN_OPENING = 8


@dataclass(frozen=True)
class Activations:
    """resid_pre of a set of prompts at every layer and end-of-instruction position.

    Attributes:
        mean: over the prompts [layers, positions, d_model] in float64.
        count: how many prompts.
        samples: one row per prompt, in their order [prompts, layers, positions, d_model], float32 on the CPU and
            mapped from disk; None unless they were asked for.
    """

    mean: Tensor
    count: int
    samples: Tensor | None = None

    def samples_at(self, layer: int) -> Tensor:
        """The rows of one layer [prompts, positions, d_model] in float64.

        Raises:
            ValueError: if no samples were kept.
        """
        if self.samples is None:
            raise ValueError("no samples were kept; collect them with keep_samples")
        return self.samples[:, layer].to(torch.float64)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_positions: int,
    batch_size: int,
    winsorize: float | None = None,
    keep_samples: Path | None = None,
) -> Activations:
    """Read resid_pre of prompts, in memory that does not grow with their number.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: at least one; the processes of the launch share them.
        num_positions: how many positions, counted from the end of the prompt.
        batch_size: prompts per forward pass.
        winsorize: clip each prompt's vector at this quantile of its own magnitudes, see `clip_outliers`.
        keep_samples: a file to keep every prompt's vectors in, on a disk that all processes see.

    Returns:
        The same on every process, for any number of them, any batch size and any order of the prompts.

    Raises:
        StageError: if the residual stream overflows.
    """
    encoded = chat.encode(tokenizer, prompts)
    config = model.config.get_text_config()
    shape = (config.num_hidden_layers, num_positions, config.hidden_size)
    sums = Accumulator(
        len(prompts), shape, model.device, winsorize=winsorize, keep_samples=keep_samples
    )
    opening, rest = None, encoded
    shared = shared_opening(encoded, num_positions)
    if shared >= MIN_OPENING and residual.can_share_opening(model, max(map(len, encoded))):
        opening = residual.read_opening(model, encoded[0][:shared])
        rest = [ids[shared:] for ids in encoded]
    for rows in tqdm(
        my_batches(encoded, batch_size),
        desc="residual stream",
        disable=not distributed.is_main(),
        leave=False,
    ):
        ids, mask = chat.pad_left(
            [rest[row] for row in rows], int(tokenizer.pad_token_id), model.device
        )
        sums.add(rows, residual.read(model, ids, mask, num_positions, opening))
    return sums.finish()


def shared_opening(encoded: Sequence[list[int]], num_positions: int) -> int:
    """How many tokens all prompts begin with (a template's opening, often a system prompt), for computing them once.

    At least `num_positions` tokens of each prompt are left to be read.
    """
    # The first and the last in order differ as early as any two do.
    first, last = min(encoded), max(encoded)
    shared = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        shared += 1
    return max(min(shared, min(map(len, encoded)) - num_positions), 0)


def my_batches(encoded: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """This process's share of prompts, as indices in batches of similar length.

    Sorted by their tokens, so that on one process the order in which prompts came does not change a bit.
    """
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), encoded[index]))
    mine = order[distributed.rank() :: distributed.world_size()]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


class Accumulator:
    """Takes what forward passes read, in any order, and makes `Activations` of it."""

    def __init__(
        self,
        num_prompts: int,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        winsorize: float | None = None,
        keep_samples: Path | None = None,
    ) -> None:
        """Begin with nothing.

        Args:
            num_prompts: over all processes.
            shape: layers, positions, d_model.
            device: where sums are held.
            winsorize: see `clip_outliers`.
            keep_samples: file of the samples; the main process creates it.
        """
        self._count = num_prompts
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._winsorize = winsorize
        self._path = keep_samples
        if keep_samples is not None:
            if distributed.is_main():
                np.lib.format.open_memmap(
                    keep_samples, mode="w+", dtype=np.float32, shape=(num_prompts, *shape)
                )
            distributed.barrier()
            self._file = np.lib.format.open_memmap(keep_samples, mode="r+")

    def add(self, rows: Sequence[int], streams: Tensor, first_layer: int = 0) -> None:
        """Add prompts.

        Args:
            rows: which prompts.
            streams: their resid_pre [batch, layers, positions, d_model], of some or all layers.
            first_layer: the layer that `streams` begins with.
        """
        streams = streams.to(self._total)
        if self._winsorize is not None:
            streams = clip_outliers(streams, self._winsorize)
        layers = slice(first_layer, first_layer + streams.shape[1])
        self._total[layers] += streams.sum(dim=0)
        if self._path is not None:
            self._file[list(rows), layers] = streams.to(torch.float32).cpu().numpy()

    def finish(self) -> Activations:
        """Put together what all processes have added.

        Raises:
            StageError: if a mean is not finite, naming the first such layer.
        """
        mean = distributed.sum_over_processes(self._total).cpu() / self._count
        finite = mean.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise StageError(
                f"abliteration: the residual stream at the input of block {int(finite.logical_not().nonzero()[0])} "
                "holds values that are no finite numbers, so no direction can be read there; load the model in "
                "bfloat16 or float32 (model.dtype), or check its weights"
            )
        if self._path is None:
            return Activations(mean, self._count)
        self._file.flush()
        distributed.barrier()
        # Copy on write: nothing that is done to the tensor reaches the file.
        samples = np.load(self._path, mmap_mode="c")
        return Activations(mean, self._count, torch.from_numpy(samples))


def clip_outliers(vectors: Tensor, quantile: float) -> Tensor:
    """Clip each vector at a quantile of the magnitudes of its own components (winsorizing).

    A few coordinates of the residual stream are hundreds of times larger than the rest in many models, and
    largest in few prompts; they would decide the mean. Each vector is clipped by itself: a quantile over the
    batch would make the result depend on what else is in it.

    Args:
        vectors: [..., d_model], floating point.
        quantile: in (0, 1]; 1 changes nothing.

    Returns:
        The clipped vectors; their signs and all components below the quantile are unchanged.
    """
    place = quantile * (vectors.shape[-1] - 1)
    below = math.floor(place)
    # The quantile is linear between two order statistics, and only the largest few are sorted for it.
    largest = vectors.abs().topk(vectors.shape[-1] - below, dim=-1).values
    low, high = largest[..., -1:], largest[..., -2:][..., :1]
    limit = low + (place - below) * (high - low)
    return vectors.clamp(-limit, limit)
