"""The plan that `--check` prints: what runs and what is reused, steps, memory, disk, and where defaults differ."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from math import ceil
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common import chat, distributed
from common.architecture import find_blocks
from common.model import load_config, load_tokenizer, resolve
from common.prompts import load_prompts
from common.recipe import OnPolicy, Recipe
from train import damage, settings, stopping
from train.adapter import build_adapter, stored_dtype, without_weights
from train.launch import MODELS_AT_ONCE, Strategy, launch_strategy, models_fit
from train.memory import FLOAT32, TILES_OF_TORCH, TILES_OF_TRITON, Shape, training_memory
from train.stage import source_module

GIB = 2**30
# Of a teacher's likely tokens, as they are stored and as they are looked up.
ID_ON_DISK, ID_IN_MEMORY = 4, 8


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
        held = ""
        if (term := anchor.residual) is not None:
            held = f"; its residual stream, {term.size} numbers a token and block, weight {term.weight:g}"
        batch_size = f"{anchor.batch_size} prompts a step"
        yield f"anchor        to the {anchor.to} model, {batch_size}, weight {anchor.weight:g}{held}"
    if (mix := recipe.train.mix) is not None:
        asked = len(damage.prompts_used(mix))
        yield (
            f"mix           by what the edit damages, after {asked} questions: {mix.floor:.0%} to {mix.cap:.0%} for a "
            "domain"
        )
    if recipe.train.stopping is not None:
        asked = len(stopping.prompts_used(recipe.train.stopping))
        yield f"stopping      {asked} prompts are answered every {recipe.train.stopping.every} steps"
    yield f"memory        {memory_line(recipe, launch_strategy(), distributed.device().type)}"
    if recipe.train.load_in_4bit:
        yield "adapter       trained on weights in 4 bits, merged into the full-precision ones"
    if recipe.release.push_to_hub is not None:
        yield f"upload        to {recipe.release.push_to_hub} on the hub, private, once every gate has passed"


def disk_bytes(recipe: Recipe) -> int:
    """The room that stage two takes: a model trained whole, checkpoints, and what the anchors' teachers say."""
    shape = model_shape(recipe, 1, "cpu")
    model = 0 if shape.adapter else shape.trained * shape.width
    return int(model + _checkpoint_bytes(recipe, shape) + _taught_bytes(recipe, shape, ID_ON_DISK))


def _checkpoint_bytes(recipe: Recipe, shape: Shape) -> float:
    """What is trained and the optimizer's state, as often as they are kept, and once more while the next is written."""
    if recipe.train.trainer.get("save_strategy") == "no":
        return 0
    width = FLOAT32 if shape.adapter else shape.width
    one = shape.trained * (width + shape.moments * (shape.moment_bytes or width))
    limit = settings.OUR_DEFAULTS["save_total_limit"].value
    # null keeps all of them: by default one of each tenth.
    return one * (1 + int(recipe.train.trainer.get("save_total_limit", limit) or 10))


def _taught_bytes(recipe: Recipe, shape: Shape, id_bytes: int) -> float:
    """What the anchors' teachers say if no answer ends early: likely tokens, and of the stream what is kept."""
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    tokenizer = load_tokenizer(base)
    taught = 0.0
    for anchor in recipe.train.anchors:
        prompts = chat.encode(tokenizer, load_prompts(anchor.prompts))
        answers = len(prompts) * anchor.max_new_tokens
        taught += answers * min(anchor.top_k, shape.vocabulary) * (id_bytes + FLOAT32)
        if anchor.residual is not None:
            size = min(anchor.residual.size, shape.hidden)
            tokens = answers + sum(len(prompt) for prompt in prompts)
            taught += tokens * shape.layers * size * shape.width
    return taught


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
        else len(source_module(source.name).load(source)[0])
        for source in recipe.train.preferences
    )


def memory_line(recipe: Recipe, strategy: Strategy, device: str) -> str:
    """The memory that each process takes in words: the larger of stage two and of stage three's two whole models.

    Where a launch's processes have no room for these, they are told by themselves: the main process holds them.

    Args:
        recipe: a checked recipe.
        strategy: of the launch.
        device: `cpu` or `cuda`, where it is taken.
    """
    shape = model_shape(recipe, strategy.processes, device)
    taught = _taught_bytes(recipe, shape, ID_IN_MEMORY)
    if device == "cpu":
        shape = replace(shape, taught=taught)
    memory, one = training_memory(shape, strategy), shape.weights * shape.width
    parts = ", ".join(
        f"{part.name} {getattr(memory, part.name) / GIB:.2f}" for part in fields(memory)
    )
    models, apart = MODELS_AT_ONCE * one, strategy.processes > 1 and not models_fit(recipe)
    # trl gathers it in one piece, before there is anything else.
    reference = one if strategy.name == "FSDP2" and not shape.adapter else 0
    most = max(memory.total, reference, 0 if apart else models)
    notes = [f"{strategy.name}: {parts}"]
    if apart:
        main = "the main process holds"
        if device != "cpu":
            main = "the first machine's GPUs together hold"
        notes.append(f"{main} whole models, in stage three two that take {models / GIB:.2f}")
    elif models > memory.total:
        notes.append(f"stage three's two models take {models / GIB:.2f}")
    if reference > memory.total:
        notes.append(f"the reference, gathered before training, takes {reference / GIB:.2f}")
    if reference:
        host = shape.weights * FLOAT32 / GIB
        notes.append(
            f"until it is shared out the model takes {host:.2f} of each process's own memory"
        )
    if taught and device != "cpu":
        notes.append(f"what teachers said takes {taught / GIB:.2f} of each process's own memory")
    return f"about {most / GIB:.2f} GiB {_place(strategy, device)} ({'; '.join(notes)})"


def _place(strategy: Strategy, device: str) -> str:
    unit, plural = ("process", "es") if device == "cpu" else ("GPU", "s")
    if strategy.processes > 1:
        return f"on each of {strategy.processes} {unit}{plural}"
    # One process spreads a model over all GPUs that it sees (`common.model.load_model`).
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return f"over {gpus} GPUs together" if gpus > 1 else f"on one {unit}"


def model_shape(recipe: Recipe, processes: int, device: str) -> Shape:
    """What of a recipe and its model's configuration decides memory, without loading a weight."""
    model = without_weights(recipe)
    config: Any = model.config  # each family has a class of its own
    text = config.get_text_config()  # of a vision-language model, the part that holds the layers
    trainer = recipe.train.trainer
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    packed = sum(m.weight.numel() for m in linear if m is not model.get_output_embeddings())
    blocks = [_numel(module) for module in (*find_blocks(model), model.get_input_embeddings())]
    weights, heads = _numel(model), text.num_attention_heads
    moments, moment_bytes = _optimizer_state(str(trainer.get("optim", "")))
    tokens, answers = _tokens(recipe, processes)
    return Shape(
        weights=weights,
        packed=packed if recipe.train.load_in_4bit else 0,
        trained=_num_trained(recipe, model),
        adapter=recipe.train.adapter is not None,
        width=stored_dtype(recipe, config).itemsize,
        largest_block=max(blocks),
        tokens=tokens,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        inner=_inner_width(text),
        vocabulary=text.vocab_size,
        tiles=TILES_OF_TORCH if device == "cpu" else TILES_OF_TRITON,
        checkpointing=bool(
            trainer.get("gradient_checkpointing", trainer.get("activation_checkpointing", False))
        ),
        anchor_tokens=2 * answers,  # as if their prompts were as long as their answers
        anchor_answers=answers,
        pulled=recipe.train.l2 is not None,
        moments=moments,
        moment_bytes=moment_bytes,
    )


def _tokens(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Tokens of a forward pass: both answers of its pairs at full length, and the anchors' answers beside them."""
    trainer = recipe.train.trainer
    per_device, accumulation = settings.share_batch(
        recipe.train.global_batch_size, processes, trainer.get("per_device_train_batch_size")
    )
    pairs = 2 * per_device * int(trainer.get("max_length") or 1024)
    return pairs, sum(
        ceil(anchor.batch_size / (processes * accumulation)) * anchor.max_new_tokens
        for anchor in recipe.train.anchors
    )


def _inner_width(text: PreTrainedConfig) -> int:
    """What an MLP computes inside for one token: in all experts that it goes through."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner")
    width = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return int(width or 4 * text.hidden_size) * int(experts)


def _optimizer_state(name: str) -> tuple[int, int]:
    """How many numbers an optimizer keeps per trained one, and their bytes (0: as many as the trained one's)."""
    if name.startswith(("sgd", "adafactor")):
        return 0, 0
    return 1 if "lion" in name else 2, 1 if "8bit" in name else 0


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _num_trained(recipe: Recipe, model: PreTrainedModel) -> int:
    if recipe.train.adapter is None:
        return _numel(model)
    adapted = get_peft_model(model, build_adapter(recipe.train.adapter), low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
