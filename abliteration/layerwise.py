"""Residual streams of models larger than memory: one block at a time, and all prompts through it.

The model is built without weights. Its own code embeds the prompts and makes masks and position embeddings, while
each block only notes what it is called with; then block after block is read from disk, applied to every prompt, and
dropped. So every weight is read once, and no family needs code of its own.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from abliteration.activations import Accumulator, Activations, my_batches
from common import chat, distributed
from common.architecture import architecture_of, find_blocks
from common.edits import SIDECAR
from common.errors import InputError
from common.model import auto_class, load_config, weight_files

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Batch:
    """Some prompts on their way through the blocks.

    Attributes:
        rows: which prompts of their set.
        sums: of their set.
        hidden: the input of the next block [batch, length, d_model] on the CPU.
        calls: for each block, what else it is called with.
    """

    rows: list[int]
    sums: Accumulator
    hidden: Tensor
    calls: list[Call]


def collect(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_sets: Sequence[Sequence[str]],
    *,
    num_positions: int,
    batch_size: int,
    dtype: str = "auto",
    winsorize: float | None = None,
    keep_samples: Sequence[Path] | None = None,
) -> list[Activations]:
    """Read resid_pre of several sets of prompts with one block in memory at a time.

    Args:
        folder: of the model, with safetensors weights.
        tokenizer: its tokenizer.
        prompt_sets: sets of at least one prompt each; they share the one pass over the weights.
        num_positions: how many positions, counted from the end of the prompt.
        batch_size: prompts per forward pass.
        dtype: a torch dtype by name, or `auto` for the checkpoint's own.
        winsorize: see `abliteration.activations.collect`.
        keep_samples: one file per set.

    Returns:
        For each set what `abliteration.activations.collect` returns. Beside one block, memory holds the prompts'
        hidden states: prompts x length x d_model in `dtype`.

    Raises:
        InputError: if the folder lacks a weight of a block.
        StageError: if the residual stream overflows.
    """
    if (folder / SIDECAR).is_file():
        raise InputError(
            f"{folder / SIDECAR}: vectors are added to this model by hooks, which reading layer by layer leaves out; "
            "set layer_by_layer to false"
        )
    model = build_without_weights(folder, dtype)
    checkpoint = Checkpoint(folder, model)
    blocks, device = find_blocks(model), distributed.device()
    shape = (len(blocks), num_positions, model.config.get_text_config().hidden_size)
    sums = [
        Accumulator(
            len(prompts),
            shape,
            device,
            winsorize=winsorize,
            keep_samples=None if keep_samples is None else keep_samples[index],
        )
        for index, prompts in enumerate(prompt_sets)
    ]
    with checkpoint.loaded(checkpoint.around_blocks):
        batches = [
            batch
            for prompts, its_sums in zip(prompt_sets, sums, strict=True)
            for batch in _embed(model, tokenizer, prompts, batch_size, its_sums)
        ]
    names = [f"{checkpoint.blocks}.{index}" for index in range(len(blocks))]
    for layer, name in enumerate(
        tqdm(names, desc="blocks", disable=not distributed.is_main(), leave=False)
    ):
        for batch in batches:
            streams = batch.hidden[:, None, -num_positions:]
            batch.sums.add(batch.rows, streams, first_layer=layer)
        if layer + 1 < len(blocks):  # nothing is read behind the last block
            with checkpoint.loaded([name]):
                _apply(blocks[layer].to(device), layer, batches, device)
    return [its_sums.finish() for its_sums in sums]


def build_without_weights(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder with all parameters on the meta device, and its buffers computed."""
    config = load_config(folder)
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=wanted)
    model.eval()
    return model


class Checkpoint:
    """The safetensors files of a model, read module by module under the names that the model has in memory.

    transformers' own loader renames, fuses and transposes what the files hold (experts are often one tensor each
    on disk and one for all in memory); here it is given the tensors of a few modules at a time.

    Attributes:
        blocks: path of the list of blocks in the model.
        around_blocks: paths of the modules beside that list: embeddings and the final norm.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Find where each tensor belongs, without reading any."""
        self._folder, self._model = folder, model
        self.blocks = architecture_of(model.config.model_type).blocks
        body, _, own = self.blocks.rpartition(".")
        self.around_blocks = [
            f"{body}.{name}"
            for name, _ in model.get_submodule(body).named_children()
            if name != own
        ]
        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._settings = LoadStateDictConfig(
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=[*renamings, *converters],
        )
        known = model.state_dict()
        self._stored: dict[str, list[tuple[Path, str]]] = defaultdict(list)
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118  # no dictionary
                    name, _ = rename_source_key(
                        stored, renamings, converters, model.base_model_prefix, known
                    )
                    self._stored[name].append((file, stored))

    @contextmanager
    def loaded(self, modules: Sequence[str]) -> Iterator[None]:
        """Hold the weights of some modules in memory while the context lasts.

        Raises:
            InputError: if the folder lacks one of them.
        """
        parts = [self._model.get_submodule(name) for name in modules]
        prefixes = tuple(f"{name}." for name in modules)
        with ExitStack() as files, _no_progress_bar():
            opened: dict[Path, Any] = {}
            tensors = {}
            for name, places in self._stored.items():
                for file, stored in places if name.startswith(prefixes) else ():
                    if file not in opened:
                        opened[file] = files.enter_context(safe_open(file, framework="pt"))
                    tensors[stored] = opened[file].get_slice(stored)
            convert_and_load_state_dict_in_model(self._model, tensors, self._settings)
            del tensors
        missing = [
            f"{name}.{weight}"
            for name, part in zip(modules, parts, strict=True)
            for weight, parameter in part.named_parameters()
            if parameter.is_meta
        ]
        if missing:
            raise InputError(
                f"model: {self._folder} lacks {', '.join(missing[:3])} or holds it in another shape; fetch the "
                "complete checkpoint"
            )
        try:
            yield
        finally:
            for part in parts:
                part.to("meta")


def _embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    sums: Accumulator,
) -> Iterator[_Batch]:
    """Run the model without its blocks, which note what they are called with."""
    encoded = chat.encode(tokenizer, prompts)
    blocks = find_blocks(model)
    for rows in my_batches(encoded, batch_size):
        ids, mask = chat.pad_left(
            [encoded[row] for row in rows], int(tokenizer.pad_token_id), torch.device("cpu")
        )
        with torch.inference_mode(), _noting_calls(blocks) as (inputs, calls):
            model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=chat.positions(mask),
                use_cache=False,
            )
        yield _Batch(rows, sums, inputs[0], calls)


@contextmanager
def _noting_calls(blocks: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], list[Call]]]:
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def note(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        inputs.append(hidden_states)
        calls.append((args, kwargs))
        return hidden_states

    for block in blocks:
        block.forward = note
    try:
        yield inputs, calls
    finally:
        for block in blocks:
            del block.forward


@torch.inference_mode()
def _apply(block: nn.Module, layer: int, batches: Sequence[_Batch], device: torch.device) -> None:
    for batch in batches:
        args, kwargs = send_to_device(batch.calls[layer], device)
        output = block(batch.hidden.to(device), *args, **kwargs)
        batch.hidden = (output[0] if isinstance(output, tuple) else output).cpu()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    # The loader would show a bar of its own for every block.
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
