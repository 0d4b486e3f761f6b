"""The plan that `--check` prints: what runs and what is reused, steps, memory, disk, and where defaults differ."""

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from common import chat, distributed
from common.model import auto_class, load_config, load_tokenizer, resolve, weight_files
from common.prompts import load_prompts
from common.recipe import OnPolicy, Recipe
from train import settings
from train.adapter import build_adapter
from train.stage import source_module

GIB = 2**30
# A gradient and Adam's two moments per trained parameter, in float32.
TRAINED_BYTES_PER_PARAMETER = 12
# Activations kept for the backward pass per token and layer, in multiples of the width: about 34 in
# Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1, in bytes at 2 bytes a number, so 17 numbers).
ACTIVATION_NUMBERS = 17


def plan_lines(recipe: Recipe, stages: Sequence[tuple[str, bool, str]]) -> list[str]:
    """The plan in words.

    Args:
        recipe: a checked recipe.
        stages: name, whether it is complete, and fingerprint of each stage up to the last wanted.
    """
    lines = [f"{recipe.name}: {recipe.model.name_or_path} -> {recipe.output_dir}/{recipe.name}"]
    lines += [
        f"  {name:<13} {'reused' if done else 'to run'}  {mark[:12]}" for name, done, mark in stages
    ]
    lines += [f"  {line}" for line in _details(recipe)]
    differences = settings.differences_from_trl(recipe.train)
    if differences:
        lines += ["  defaults that differ from trl's:", *(f"    {line}" for line in differences)]
    return lines


def _details(recipe: Recipe) -> Iterator[str]:
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    config = load_config(base).get_text_config()
    num_positions = chat.num_instruction_end_tokens(load_tokenizer(base))
    yield f"candidates    {config.num_hidden_layers} layers x {num_positions} positions"
    pairs = _most_pairs(recipe)
    batch = recipe.train.global_batch_size
    yield f"pairs         at most {pairs}, {batch} a step, {_num_steps(recipe, pairs)} steps"
    for anchor in recipe.train.anchors:
        yield f"anchor        to the {anchor.to} model, {anchor.batch_size} prompts a step, weight {anchor.weight:g}"
    world = distributed.world_size()
    yield f"memory        about {memory_bytes(recipe) / GIB:.2f} GiB in each of {world} process(es)"
    yield f"disk          about {disk_bytes(recipe) / GIB:.2f} GiB"


def disk_bytes(recipe: Recipe) -> int:
    """The room that a run takes: the edited model and the release, and a fully trained model if there is one."""
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    copies = 2 if recipe.train.adapter is not None else 3
    return copies * sum(file.stat().st_size for file in weight_files(base))


def _num_steps(recipe: Recipe, pairs: int) -> int:
    trainer = recipe.train.trainer
    if int(trainer.get("max_steps", -1)) > 0:
        return int(trainer["max_steps"])
    epochs = float(trainer.get("num_train_epochs", settings.OUR_DEFAULTS["num_train_epochs"].value))
    return ceil(epochs * ceil(pairs / recipe.train.global_batch_size))


def _most_pairs(recipe: Recipe) -> int:
    return sum(
        len(load_prompts(source.prompts))
        if isinstance(source, OnPolicy)
        else len(source_module(source.name).load(source))
        for source in recipe.train.preferences
    )


def memory_bytes(recipe: Recipe) -> int:
    """The larger of stage two (weights, gradients, optimizer, activations) and stage three (two models)."""
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    config = load_config(base)
    with init_empty_weights():
        model: PreTrainedModel = auto_class(config).from_config(config)
    text = config.get_text_config()  # of a vision-language model, the part that holds the layers
    stored = config.dtype or text.dtype or torch.float32
    dtype = stored if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    width: int = dtype.itemsize
    weights: int = width * sum(parameter.numel() for parameter in model.parameters())
    training = weights + TRAINED_BYTES_PER_PARAMETER * _num_trained(recipe, model)
    return max(training + _activation_bytes(recipe, text, width), 2 * weights)


def _activation_bytes(recipe: Recipe, text: PreTrainedConfig, width: int) -> int:
    trainer = recipe.train.trainer
    per_device, _ = settings.share_batch(
        recipe.train.global_batch_size,
        distributed.world_size(),
        trainer.get("per_device_train_batch_size"),
    )
    tokens = 2 * per_device * int(trainer.get("max_length") or 1024)
    checkpointing = trainer.get(
        "gradient_checkpointing", trainer.get("activation_checkpointing", False)
    )
    kept: int = 1 if checkpointing else ACTIVATION_NUMBERS
    num_bytes: int = kept * tokens * text.hidden_size * text.num_hidden_layers * width
    return num_bytes


def _num_trained(recipe: Recipe, model: PreTrainedModel) -> int:
    if recipe.train.adapter is None:
        return sum(parameter.numel() for parameter in model.parameters())
    adapted = get_peft_model(model, build_adapter(recipe.train.adapter), low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
