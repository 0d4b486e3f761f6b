"""The recipe's pass-through blocks, checked against the installed trl and peft.

`train.trainer` and `train.adapter` keep the libraries' own names. What the libraries would accept
and then ignore, or silently undo, is an error here, and a name that is gone is answered with its
successor. The checked trainer block becomes a DPOConfig.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from peft import LoraConfig
from trl import DPOConfig

from common.errors import InputError, RecipeError
from common.recipe import Recipe
from common.schema import TrainSection, nearest

TRAINER: Final = "train.trainer"
ADAPTER: Final = "train.adapter"


class Default(NamedTuple):
    """A value that we choose otherwise than TRL, and why."""

    value: object
    reason: str


OUR_DEFAULTS: Final[Mapping[str, Default]] = {
    "num_train_epochs": Default(
        1.0, "healing is light: more epochs on the same pairs overfit them"
    ),
    "lr_scheduler_type": Default("cosine", "as in the published healing recipes"),
    "warmup_steps": Default(0.1, "a ratio: the first steps move a model the most"),
    "activation_checkpointing": Default(
        False, "costs a fifth of the time; ask for it when memory is short"
    ),
    "precompute_ref_log_probs": Default(
        True, "the reference never changes, so it runs once instead of each step"
    ),
    "save_steps": Default(0.1, "a ratio: a killed training goes on from its last full tenth"),
    "save_total_limit": Default(1, "a checkpoint is for going on after an interruption"),
    "logging_first_step": Default(True, "the first loss shows whether the reference is right"),
}
ADAPTER_DEFAULTS: Final[Mapping[str, Default]] = {
    "learning_rate": Default(1e-5, "an adapter takes about ten times the rate of full training"),
}
PER_DEVICE_BATCH: Final = 8

# Names of earlier versions and of other tools, and what takes their place.
GONE: Final[Mapping[str, str]] = {
    "warmup_ratio": "use warmup_steps, which takes a ratio below 1 too",
    "group_by_length": "DPO has no batches by length; delete it",
    "overwrite_output_dir": "the run folder goes on or is reused by itself; delete it",
    "save_safetensors": "weights are always saved as safetensors; delete it",
    "no_cuda": "launch with configs/cpu.yaml instead",
    "evaluation_strategy": "stage 3 measures, see eval.benchmarks; delete it",
    "logging_dir": "use tracking; delete it",
    "max_prompt_length": "use max_length, which counts prompt and answer together",
    "max_completion_length": "use max_length, which counts prompt and answer together",
    "max_target_length": "use max_length, which counts prompt and answer together",
    "rpo_alpha": "use loss_type: [sigmoid, sft] with loss_weights: [1.0, <rpo_alpha>]",
    "reference_free": "the reference is always the abliterated model; delete it",
    "generate_during_eval": "stage 3 generates, see eval.benchmarks; delete it",
    "model_adapter_name": "train.adapter makes the only adapter; delete it",
    "ref_adapter_name": "the reference is the model with its adapter off; delete it",
    "force_use_ref_model": "the reference is the abliterated model by itself; delete it",
    "ref_model_init_kwargs": "the reference is the abliterated model by itself; delete it",
    "use_logits_to_keep": "full logits are never made any more; delete it",
    "tools": "put a tools column into the preference data",
    "label_pad_token_id": "padding is up to the trainer; delete it",
    "padding_value": "padding is up to the trainer; delete it",
    "is_encoder_decoder": "only decoders are trained; delete it",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "include_tokens_per_second": "use include_num_input_tokens_seen",
    "fp16_backend": "use fp16: true",
    "adafactor": "use optim: adafactor",
    "torchdynamo": "use torch_compile: true",
    "lr": "use learning_rate",
    "epochs": "use num_train_epochs",
    "num_epochs": "use num_train_epochs",
    "micro_batch_size": "use per_device_train_batch_size",
    "batch_size": "use train.global_batch_size",
    "lora_r": "use train.adapter: {r: ...}",
    "use_peft": "use train.adapter",
}

_LAUNCH: Final = (
    "the launch decides; choose a file of configs/ with accelerate launch --config_file"
)
_NO_EVALUATION: Final = "training has no evaluation set; stage 3 measures, see eval.benchmarks"
_STOPPING: Final = "use train.stopping, which evaluates during training and keeps the best weights"
_NO_UPLOAD: Final = "training uploads nothing; upload the finished release folder"
_TRACKING: Final = "use tracking of the recipe"

# Settings that exist, but are this program's to set, or have no effect in it.
OWNED: Final[Mapping[str, str]] = {
    "output_dir": "use name and output_dir of the recipe",
    "seed": "use seed of the recipe",
    "data_seed": "use seed of the recipe",
    "run_name": "use name of the recipe",
    "report_to": _TRACKING,
    "project": "use tracking.project",
    "trackio_space_id": _TRACKING,
    "trackio_bucket_id": _TRACKING,
    "trackio_static_space_id": _TRACKING,
    "resume_from_checkpoint": "an interrupted run goes on by itself when it is started again",
    "gradient_accumulation_steps": "it follows from train.global_batch_size",
    "restore_callback_states_from_checkpoint": "an interrupted run goes on by itself when it is started again",
    "auto_find_batch_size": "it would change train.global_batch_size",
    "remove_unused_columns": "the columns are this program's",
    "push_to_hub": _NO_UPLOAD,
    "hub_token": _NO_UPLOAD,
    "hub_private_repo": _NO_UPLOAD,
    "hub_model_id": _NO_UPLOAD,
    "hub_strategy": _NO_UPLOAD,
    "hub_always_push": _NO_UPLOAD,
    "hub_revision": _NO_UPLOAD,
    "do_train": "a stage of the recipe trains",
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
    "eval_strategy": _STOPPING,
    "eval_steps": _STOPPING,
    "eval_delay": _NO_EVALUATION,
    "eval_on_start": _STOPPING,
    "eval_accumulation_steps": _NO_EVALUATION,
    "eval_do_concat_batches": _NO_EVALUATION,
    "eval_use_gather_object": _NO_EVALUATION,
    "per_device_eval_batch_size": _NO_EVALUATION,
    "prediction_loss_only": _NO_EVALUATION,
    "include_for_metrics": _NO_EVALUATION,
    "batch_eval_metrics": _NO_EVALUATION,
    "bf16_full_eval": _NO_EVALUATION,
    "fp16_full_eval": _NO_EVALUATION,
    "load_best_model_at_end": _STOPPING,
    "metric_for_best_model": _STOPPING,
    "greater_is_better": _STOPPING,
    "label_names": _NO_EVALUATION,
    "label_smoothing_factor": "DPO does not read it; its own is label_smoothing",
    "length_column_name": "DPO has no batches by length",
    "padding_free": "this version of TRL accepts it and does nothing",
    "pad_token": "the tokenizer has its own",
    "use_cpu": _LAUNCH,
    "local_rank": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "model_init_kwargs": "use model.dtype and model.revision of the recipe",
    "trust_remote_code": "code of a model folder is never run",
}

_NO_INIT: Final = "it is for an initialisation that train.adapter.init_lora_weights refuses"
OWNED_ADAPTER: Final[Mapping[str, str]] = {
    "task_type": "it is always CAUSAL_LM",
    "peft_type": "it is always LORA",
    "base_model_name_or_path": "it is always the abliterated model",
    "revision": "it is always the abliterated model",
    "inference_mode": "the adapter is trained",
    "auto_mapping": "it is for models without a task",
    "peft_version": "peft writes it",
    "megatron_config": "Megatron is not supported",
    "megatron_core": "Megatron is not supported",
    "layer_replication": "the edit would not know the repeated layers",
    "lora_bias": "it cannot be merged into layers without biases",
    "runtime_config": "it is not saved with an adapter, so a release could not be rebuilt",
    "loftq_config": _NO_INIT,
    "eva_config": _NO_INIT,
    "corda_config": _NO_INIT,
    "lora_ga_config": _NO_INIT,
    "kasa_config": "it cuts the base's smallest singular values off, so the reference is not the abliterated model",
    "monteclora_config": "its noise gives the same model other answers each time, so the reference is none",
    "arrow_config": "it routes between adapters that are trained already",
    "alora_invocation_tokens": "it works behind some tokens only, so it cannot be merged",
    "use_qalora": "it is for GPTQ weights and cannot be merged; use train.load_in_4bit",
    "qalora_group_size": "it is for GPTQ weights; use train.load_in_4bit",
}
GONE_ADAPTER: Final[Mapping[str, str]] = {
    "lora_r": "use r",
    "rank": "use r",
    "alpha": "use lora_alpha",
    "dropout": "use lora_dropout",
    "lora_target_modules": "use target_modules",
    "lora_target_linear": "use target_modules: all-linear",
    "lora_modules_to_save": "use modules_to_save",
}

# Initialisations with which an untrained adapter changes nothing and the base stays as it is.
_SAFE_INITS: Final = (True, "gaussian", "orthogonal")
_REWRITES: Final = (
    "rewrites the base's weights, so with the adapter off the reference is not the abliterated model (the first loss "
    "is not ln 2)"
)
# Why each of peft's others is refused; pissa_niter_16 is a kind of pissa.
REFUSED_INITS: Final[Mapping[str, str]] = {
    "pissa": _REWRITES,
    "olora": _REWRITES,
    "corda": _REWRITES,
    "lora_ga": _REWRITES,
    "loftq": _REWRITES,
    "eva": "needs activations of the training data, which peft is not handed here",
    "mica": "writes along the base's weakest directions only, and what the edit removed is the first of them",
    "false": "begins with a random change, so the first loss is not ln 2",
}
# Preference losses of other trainers, and how to come near them here: TRL 1.16 has KTO as a trainer of its own, and
# ORPO and CPO (with SimPO and AlphaPO) as experiments that may change without notice.
OTHER_TRAINERS: Final[Mapping[str, str]] = {
    "orpo": "has no reference, and TRL keeps it as an experiment; use [sigmoid_norm, sft] with loss_weights",
    "simpo": "has no reference, and TRL keeps it as an experiment (CPO); use sigmoid_norm, which is DPO by length",
    "alphapo": "has no reference, and TRL keeps it as an experiment (CPO); use sigmoid_norm",
    "cpo": "has no reference, and TRL keeps it as an experiment; use [sigmoid, sft] with loss_weights",
    "kto": "is for answers without a partner, in a trainer of its own; use apo_zero or bco_pair on the pairs",
    "kto_pair": "is gone from TRL; use apo_zero or bco_pair",
    "rpo": "is two losses; use [sigmoid, sft] with loss_weights",
    "dpo": "is called sigmoid",
    "dpo_norm": "is called sigmoid_norm",
    "nll": "is called sft",
}
_USED_BY: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "label_smoothing": ("loss_type", frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})),
    "discopop_tau": ("loss_type", frozenset({"discopop"})),
    "f_alpha_divergence_coef": ("f_divergence_type", frozenset({"alpha_divergence"})),
}
_POSITIVE: Final = (
    "learning_rate",
    "beta",
    "num_train_epochs",
    "per_device_train_batch_size",
    "precompute_ref_batch_size",
    "max_length",
    "logging_steps",
    "save_steps",
    "discopop_tau",
)


def check(trainer: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> list[str]:
    """Return what is wrong with both pass-through blocks of a recipe, in words."""
    problems = check_trainer(trainer, adapter=adapter is not None)
    if adapter is not None:
        problems += check_adapter(adapter, trainer=trainer)
    return problems


def check_trainer(block: Mapping[str, Any], *, adapter: bool = True) -> list[str]:
    """Return what is wrong with a `train.trainer` block, each beginning with its dotted key.

    Args:
        block: Settings of trl.DPOConfig by its own names.
        adapter: Whether an adapter is trained, and not all weights.
    """
    known = _fields(DPOConfig)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in block.items():
        name = f"{TRAINER}.{key}"
        if key in OWNED:
            problems.append(f"{name}: has no place here: {OWNED[key]}; delete it")
        elif key not in known:
            problems.append(f"{name}: {_unknown(key, GONE, known, ADAPTER, _fields(LoraConfig))}")
        else:
            try:
                values[key] = _coerce(value, known[key], _words(key))
            except ValueError as error:
                problems.append(f"{name}: {_elsewhere(key, value) or error}")
    problems += [
        f"{TRAINER}.{key}: {text}" for key, text in _contradictions(values, adapter=adapter)
    ]
    return problems


def _elsewhere(key: str, value: object) -> str | None:
    """Say what comes near a loss that another trainer has."""
    losses = value if isinstance(value, list | tuple) else [value]
    named = [str(loss).lower() for loss in losses if str(loss).lower() in OTHER_TRAINERS]
    if key != "loss_type" or not named:
        return None
    return "; ".join(f"{loss} {OTHER_TRAINERS[loss]}" for loss in named)


def check_adapter(
    block: Mapping[str, Any], *, trainer: Mapping[str, Any] | None = None
) -> list[str]:
    """Return what is wrong with a `train.adapter` block, each beginning with its dotted key.

    Args:
        block: Settings of peft.LoraConfig by its own names.
        trainer: The `train.trainer` block, which decides whether dropout is on.
    """
    known = _fields(LoraConfig)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in block.items():
        name = f"{ADAPTER}.{key}"
        if key in OWNED_ADAPTER:
            problems.append(f"{name}: has no place here: {OWNED_ADAPTER[key]}; delete it")
        elif key not in known:
            problems.append(
                f"{name}: {_unknown(key, GONE_ADAPTER, known, TRAINER, _fields(DPOConfig))}"
            )
        elif key == "init_lora_weights":
            values[key] = value
        else:
            try:
                values[key] = _coerce(value, known[key], None)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    problems += [f"{ADAPTER}.{key}: {text}" for key, text in _adapter_faults(values, trainer or {})]
    return problems


def build_trainer_settings(
    recipe: Recipe,
    *,
    output_dir: Path,
    world_size: int,
    use_cpu: bool,
    bf16: bool,
    report_to: str = "none",
) -> DPOConfig:
    """Make the DPOConfig of a recipe: TRL's defaults, over them ours, over them the recipe's.

    Args:
        recipe: Its `train`, `seed` and `name` are read.
        output_dir: Where checkpoints go.
        world_size: Number of processes; the global batch is the same for any.
        use_cpu: Whether training runs on the CPU.
        bf16: Whether to compute in bfloat16 where the recipe says neither bf16 nor fp16.
        report_to: Trackers of the trainer: "wandb" or "none".

    Raises:
        RecipeError: if `train.trainer` does not fit the installed TRL.
        InputError: if the processes cannot share the global batch.
    """
    train = recipe.train
    problems = check_trainer(train.trainer, adapter=train.adapter is not None)
    if problems:
        raise RecipeError(problems)
    known = _fields(DPOConfig)
    given = {key: _coerce(value, known[key], _words(key)) for key, value in train.trainer.items()}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if old in given:
            # transformers 5 renamed them and keeps the old names as aliases that warn.
            given[old.replace("gradient", "activation")] = given.pop(old)
    per_device, accumulation = share_batch(
        train.global_batch_size, world_size, given.get("per_device_train_batch_size")
    )
    settings = {
        **{key: default.value for key, default in _our_defaults(train).items()},
        "bf16": bf16 and not given.get("fp16", False),
        "dataloader_pin_memory": not use_cpu,
        **given,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "output_dir": str(output_dir),
        "run_name": recipe.name,
        "seed": recipe.seed,
        "use_cpu": use_cpu,
        "report_to": report_to,
    }
    # Where both bf16 and fp16 are off, transformers would take the launch's word for it: a float32 recipe would train
    # in bfloat16, and say it did not.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    try:
        return DPOConfig(**settings)
    except ValueError as error:
        raise RecipeError([f"{TRAINER}: {error}"]) from error


def share_batch(
    global_batch_size: int, world_size: int, per_device: int | None = None
) -> tuple[int, int]:
    """Split the pairs of a step over processes and accumulation steps, exactly.

    Returns:
        Pairs per forward pass and process, and forward passes per optimizer step.

    Raises:
        InputError: if no whole number of forward passes gives the global batch.
    """
    if global_batch_size % world_size:
        raise InputError(
            f"train.global_batch_size: {global_batch_size} pairs cannot be shared by {world_size} "
            f"processes; choose a multiple of {world_size}"
        )
    share = global_batch_size // world_size
    if per_device is None:
        per_device = max(size for size in range(1, PER_DEVICE_BATCH + 1) if share % size == 0)
    per_device = min(per_device, share)
    if share % per_device:
        raise InputError(
            f"{TRAINER}.per_device_train_batch_size: {per_device} pairs do not divide the {share} "
            f"of each process (train.global_batch_size {global_batch_size} over {world_size} "
            "processes); "
            f"choose a divisor of {share}"
        )
    return per_device, share // per_device


def differences_from_trl(train: TrainSection) -> list[str]:
    """Return, for the plan, where our defaults stand in for DPOConfig's.

    Each line is `key: ours (TRL: theirs): why`.
    """
    theirs = {field.name: _default(field) for field in dataclasses.fields(DPOConfig)}
    theirs["activation_checkpointing"] = theirs["gradient_checkpointing"]
    lines = []
    for key, (value, reason) in _our_defaults(train).items():
        if key not in train.trainer and value != theirs[key]:
            lines.append(f"{key}: {_show(value)} (TRL: {_show(theirs[key])}): {reason}")
    if not {"bf16", "fp16"} & train.trainer.keys():
        lines.append(
            "bf16: where the model is (TRL: true): it is trained in the precision that it answers in"
        )
    return lines


def _our_defaults(train: TrainSection) -> dict[str, Default]:
    """Return the defaults that the recipe leaves standing."""
    defaults = {**OUR_DEFAULTS, **(ADAPTER_DEFAULTS if train.adapter is not None else {})}
    if "gradient_checkpointing" in train.trainer:
        del defaults["activation_checkpointing"]
    if "max_steps" in train.trainer:
        del defaults["num_train_epochs"]
    if train.trainer.get("save_strategy", "steps") != "steps":
        del defaults["save_steps"]
    return defaults


def _contradictions(values: Mapping[str, Any], *, adapter: bool) -> Iterator[tuple[str, str]]:
    """Find settings of DPOConfig that the trainer would refuse or ignore beside the others."""
    yield from _ranges(values)
    yield from _loss_faults(values)
    if "max_steps" in values and "num_train_epochs" in values:
        yield "num_train_epochs", "has no effect beside max_steps; delete one of the two"
    if "gradient_checkpointing" in values and "activation_checkpointing" in values:
        yield (
            "gradient_checkpointing",
            "is the old name of activation_checkpointing; keep one of the two",
        )
    if values.get("bf16") and values.get("fp16"):
        yield "fp16", "is set beside bf16; keep one of the two"
    if values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        yield "lr_scheduler_type", f"follows an evaluation, but {_NO_EVALUATION}; choose another"
    if values.get("train_sampling_strategy") == "group_by_length":
        yield "train_sampling_strategy", "group_by_length fails with DPO; delete it"
    precomputed = values.get(
        "precompute_ref_log_probs", OUR_DEFAULTS["precompute_ref_log_probs"].value
    )
    if not precomputed and "precompute_ref_batch_size" in values:
        yield (
            "precompute_ref_batch_size",
            "has no effect without precompute_ref_log_probs; delete it",
        )
    if values.get("sync_ref_model"):
        if adapter:
            yield (
                "sync_ref_model",
                "cannot work with an adapter, whose reference is the model without it; delete it",
            )
        elif precomputed:
            yield (
                "sync_ref_model",
                "moves the reference; set precompute_ref_log_probs: false with it",
            )
    else:
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if key in values:
                yield key, "has no effect without sync_ref_model: true; delete it"
    if not values.get("dataloader_num_workers") and "dataloader_prefetch_factor" in values:
        yield (
            "dataloader_prefetch_factor",
            "has no effect without dataloader_num_workers; delete it",
        )


def _ranges(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find numbers outside of what can be trained with."""
    for key in _POSITIVE:
        value = values.get(key)
        if value is not None and value <= 0:
            yield key, f"is {value}, but must be greater than 0"
    steps = values.get("max_steps")
    if steps is not None and steps <= 0:
        yield (
            "max_steps",
            f"is {steps}; give a number of steps above 0, or delete it and use num_train_epochs",
        )
    if values.get("warmup_steps", 0) < 0:
        yield (
            "warmup_steps",
            f"is {values['warmup_steps']}, but must be 0 or more (a ratio below 1, or steps)",
        )
    alpha = values.get("ld_alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        yield "ld_alpha", f"is {alpha}, but must lie between 0 and 1"


def _loss_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find losses and their settings that do not go together."""
    losses = values.get("loss_type", ["sigmoid"])
    weights = values.get("loss_weights")
    if not losses:
        yield "loss_type", "is empty; name at least one loss"
    if weights is not None and len(weights) != len(losses):
        yield (
            "loss_weights",
            f"has {len(weights)} weights for {len(losses)} losses; give one weight for each loss",
        )
    elif weights is not None and (min(weights, default=1) < 0 or not any(weights)):
        yield "loss_weights", f"is {weights}; weights must be 0 or more, and one above 0"
    for key, (switch, users) in _USED_BY.items():
        setting = losses if switch == "loss_type" else [values.get(switch)]
        if key in values and not users & set(setting):
            yield key, f"has no effect without {switch}: {' or '.join(sorted(users))}; delete it"
    smoothing = values.get("label_smoothing", 0.0)
    if "exo_pair" in losses and not smoothing:
        yield "label_smoothing", "must be greater than 0 with exo_pair; its paper takes 1e-3"
    if "robust" in losses and not 0 <= smoothing < 0.5:
        yield "label_smoothing", f"is {smoothing}, but must lie in [0, 0.5) with robust"
    if values.get("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        yield (
            "use_weighting",
            "cannot work with aot or aot_unpaired, which sort the pairs; delete it",
        )
    difference = {
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "exo_pair",
        "robust",
        "discopop",
        "sft",
    }
    odd = sorted(set(losses) - difference)
    if odd and values.get("f_divergence_type", "reverse_kl") != "reverse_kl":
        yield "f_divergence_type", f"cannot work with {', '.join(odd)}; delete it"


def _adapter_faults(
    values: Mapping[str, Any], trainer: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Find adapters that are not trained, or whose reference is not the abliterated model."""
    for key in ("r", "lora_alpha"):
        if key in values and values[key] < 1:
            yield key, f"is {values[key]}, but must be 1 or more"
    if reason := _init_fault(values.get("init_lora_weights", True)):
        yield "init_lora_weights", reason
    for key in ("target_modules", "modules_to_save"):
        if _names_head(values.get(key)):
            yield (
                key,
                "names lm_head, which TRL's loss reads past any adapter, so it would never be "
                "trained; leave it out",
            )
    if values.get("bias", "none") != "none":
        yield (
            "bias",
            "trains biases of the base, so with the adapter off the reference has changed; "
            "delete it",
        )
    dropout = values.get("lora_dropout", 0)
    if dropout and trainer.get("disable_dropout", True) is not False:
        yield (
            "lora_dropout",
            f"is {dropout}, but TRL switches dropout off; set {TRAINER}.disable_dropout: false too",
        )
    if not 0 <= dropout < 1:
        yield "lora_dropout", f"is {dropout}, but must lie in [0, 1)"


def _init_fault(init: object) -> str | None:
    """Say why an initialisation of peft cannot be used, or None."""
    if any(init is safe or (isinstance(init, str) and init == safe) for safe in _SAFE_INITS):
        return None
    word = _show(init).lower()
    kind = "pissa" if re.fullmatch(r"pissa_niter_\d+", word) else word
    reason = REFUSED_INITS.get(kind, "is none of peft's")
    return f"{_show(init)} {reason}; use one of: {', '.join(_show(safe) for safe in _SAFE_INITS)}"


def _names_head(modules: object) -> bool:
    """Tell whether module names, or a regular expression as peft reads it, take in lm_head."""
    if isinstance(modules, str):
        try:
            return modules != "all-linear" and re.fullmatch(modules, "lm_head") is not None
        except re.error:
            return False
    return isinstance(modules, list) and any(
        str(name).rpartition(".")[2] == "lm_head" for name in modules
    )


def _unknown(
    key: str,
    gone: Mapping[str, str],
    known: Mapping[str, object],
    other_block: str,
    other: Mapping[str, object],
) -> str:
    """Say where an unknown setting went, where it belongs, or what it is near to."""
    if key in gone:
        return f"is not a setting of the installed version: {gone[key]}"
    if key in other:
        return f"belongs into {other_block}; move it there"
    close = nearest(key, known).partition(" (known")[0]
    return f'"{key}" is not a setting of the installed version{close or "; delete it"}'


def _fields(kind: type) -> dict[str, Any]:
    """Return the settings of a dataclass and their types."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _words(key: str) -> list[str] | None:
    """Return the words that the installed DPOConfig lists for a setting, or None."""
    metadata = next(field.metadata for field in dataclasses.fields(DPOConfig) if field.name == key)
    if metadata.get("choices"):
        return [str(word) for word in metadata["choices"]]
    listing = re.search(r"Possible values are: ([^.]*)", str(metadata.get("help", "")))
    return re.findall(r"`'?([a-z_]+)'?`", listing[1]) if listing else None


def _default(field: "dataclasses.Field[Any]") -> object:
    """Return the default of a dataclass field."""
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _coerce(
    value: object,
    hint: object,
    words: list[str] | None,
) -> Any:  # noqa: ANN401  # as many types as settings
    """Bring a YAML value to the type of its setting; text may be a number (`5e-7`).

    Raises:
        ValueError: with a message that says what belongs there.
    """
    options = _options(hint)
    lists = [option for option in options if get_origin(option) is list or option is list]
    if value is None and NoneType in options:
        return None
    if lists and (
        isinstance(value, list | tuple) or (str not in options and isinstance(value, str))
    ):
        inner = (get_args(lists[0]) or (object,))[0]
        items = value if isinstance(value, list | tuple) else [value]
        return [_coerce(item, inner, words) for item in items]
    if isinstance(value, dict) and any(
        option is dict or get_origin(option) is dict for option in options
    ):
        return value
    if object in options or Any in options:
        return value
    return _coerce_scalar(value, options, words)


def _coerce_scalar(value: object, options: list[Any], words: list[str] | None) -> object:
    """Bring a single value to one of the types of its setting."""
    known = _known_words(options, words)
    if isinstance(value, bool):
        if bool in options or value in [
            word for word in _literals(options) if isinstance(word, bool)
        ]:
            return value
    elif isinstance(value, str) and known is not None:
        if value in known:
            return value
        raise ValueError(f'"{value}" is not possible here{nearest(value, known)}')
    elif isinstance(value, str) and str in options:
        return value
    elif isinstance(value, int | float | str) and (number := _number(value, options)) is not None:
        return number
    wanted = f"one of: {', '.join(known)}" if known else _describe(options)
    raise ValueError(f"is {_show(value)}, but {wanted} belongs here")


def _number(value: float | str, options: list[Any]) -> int | float | None:
    """Read a number as its setting wants it, or return None."""
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if int in options and number.is_integer():
        return int(number)
    return number if float in options else None


def _options(hint: object) -> list[Any]:
    """Return the members of a union of types."""
    if get_origin(hint) in (Union, UnionType):
        return [option for member in get_args(hint) for option in _options(member)]
    return [hint]


def _literals(options: list[Any]) -> list[object]:
    """Return the values of the literal types among some."""
    return [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]


def _known_words(options: list[Any], words: list[str] | None) -> list[str] | None:
    """Return the words a text may be, or None where it is free."""
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    found = list(words or [])
    found += [str(member.value) for enum in enums for member in enum]
    if str not in options:
        found += [word for word in _literals(options) if isinstance(word, str)]
    return found or None


def _describe(options: list[Any]) -> str:
    """Name types in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    found = [names[option] for option in options if option in names]
    found += ["a list" for option in options if get_origin(option) is list]
    found += ["a mapping" for option in options if option is dict or get_origin(option) is dict]
    return " or ".join(dict.fromkeys(found)) or "another type"


def _show(value: object) -> str:
    """Write a value as YAML does."""
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=1000)
        if _is_plain(value)
        else str(value)
    )
    return text.removesuffix("...\n").strip()


def _is_plain(value: object) -> bool:
    """Tell what YAML can write from objects of a library."""
    return isinstance(value, bool | int | float | str | list | dict | NoneType) and not isinstance(
        value, Enum
    )
