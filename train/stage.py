"""Stage two: from the abliterated model to a healed one: an adapter, or a whole model."""

import importlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import wandb
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from common import artifacts, distributed
from common.artifacts import Stopwatch
from common.edits import SIDECAR, load_edit
from common.errors import InputError
from common.lora import merge_adapter
from common.model import (
    check_model,
    load_model,
    load_to_shard,
    load_tokenizer,
    resolve,
    tokenizer_files,
)
from common.prompts import load_prompts
from common.questions import check_questions, load_questions
from common.recipe import QuickQuestions, Recipe
from common.tracking import tracking_mode
from train import constraint, damage, pairs, pull, settings, stopping
from train.adapter import (
    answer_logits,
    build_adapter,
    carried_over,
    keep_adapter_in_float32,
    merge_tolerance,
    require_same_answers,
)
from train.anchors import AnchorBatches
from train.constraint import keep_ablated
from train.damage import DamageAwareMix
from train.launch import launch_strategy, with_whole_models
from train.layout import Layout
from train.material import Material, prepare
from train.progress import StepBar
from train.pull import Distance
from train.quick import QuickEvaluation
from train.references import References
from train.shards import numel
from train.shelf import Shelf, shelf_of
from train.stopping import Baseline, StopWhenHealed
from train.trainer import HealingTrainer, WeightedAnchor

VERSION = 6
# Settings of the trainer that change what is written down or how fast, and never the result.
NO_INFLUENCE = frozenset(
    {
        "disable_tqdm",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "enable_jit_checkpoint",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "save_on_each_node",
        "save_only_model",
        "save_steps",
        "save_strategy",
        "save_total_limit",
    }
)

# What the merged model is asked: pairs, and tokens of each.
MERGE_ROWS, MERGE_TOKENS = 8, 512

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    problems = settings.check(recipe.train.trainer, recipe.train.adapter)
    problems += _four_bit_problems(recipe)
    problems += _checkpointing_problems(recipe)
    problems += pull.check(recipe)
    for index, source in enumerate(recipe.train.preferences):
        problems += source_module(source.name).check(source, f"train.preferences[{index}]")
    problems += pairs.check(recipe)
    for index, anchor in enumerate(recipe.train.anchors):
        problems += check_questions(anchor.prompts, f"train.anchors[{index}].prompts")
    try:
        settings.share_batch(
            recipe.train.global_batch_size,
            distributed.world_size(),
            recipe.train.trainer.get("per_device_train_batch_size"),
        )
    except InputError as error:
        problems.append(str(error))
    # What cannot be loaded has been told; what can is compared.
    problems += damage.check(recipe) if not problems else []
    if not problems and not check_model(resolve(recipe.model.name_or_path, recipe.model.revision)):
        problems += constraint.check(recipe)
    problems += stopping.check(recipe, [] if problems else _trained_on(recipe))
    return problems


def _four_bit_problems(recipe: Recipe) -> list[str]:
    if not recipe.train.load_in_4bit:
        return []
    key = "train.load_in_4bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        return [
            f"{key}: needs bitsandbytes, which is not installed; run `pip install -e '.[quantized]'`"
        ]
    strategy = launch_strategy()
    if strategy.shards_weights:
        return [
            f"{key}: {strategy.name} would share out weights that are packed; launch with configs/gpu.yaml or "
            "configs/ddp.yaml, or train on full precision"
        ]
    return []


def _checkpointing_problems(recipe: Recipe) -> list[str]:
    keys = ("activation_checkpointing", "gradient_checkpointing")
    used = [key for key in keys if recipe.train.trainer.get(key)]
    if not used or recipe.train.adapter is None or launch_strategy().name != "ZeRO-3":
        return []
    return [
        f"train.trainer.{used[0]}: with an adapter ZeRO-3 has put away weights by the time that a block is computed "
        "again, and training breaks off; launch with configs/fsdp2.yaml, or leave it out"
    ]


def inputs(recipe: Recipe, excluded: frozenset[str]) -> dict[str, object]:
    """What the result depends on besides stage one: settings, and data by content instead of paths.

    Args:
        recipe: its `train` section.
        excluded: normalized items of the benchmarks; only those that meet a pair count, so that another
            benchmark does not mean another training.
    """
    section = recipe.train
    return {
        "settings": section.model_dump(
            mode="json", exclude={"preferences", "anchors", "trainer", "mix", "stopping"}
        ),
        "trainer": {
            key: value for key, value in section.trainer.items() if key not in NO_INFLUENCE
        },
        "preferences": [
            source_module(source.name).inputs(source, excluded) for source in section.preferences
        ],
        "anchors": [
            {
                **anchor.model_dump(mode="json", exclude={"prompts"}),
                "prompts": artifacts.hash_data(load_prompts(anchor.prompts)),
                "domains": artifacts.hash_data([q.domain for q in load_questions(anchor.prompts)]),
            }
            for anchor in section.anchors
        ],
        "mix": damage.inputs(section.mix),
        "stopping": stopping.inputs(section.stopping),
    }


def prompts_used(recipe: Recipe) -> list[str]:
    """Every prompt that training takes, is mixed or stopped by, for the overlap check against the benchmarks."""
    section = recipe.train
    return [
        *_trained_on(recipe),
        *damage.prompts_used(section.mix),
        *stopping.prompts_used(section.stopping),
    ]


def _trained_on(recipe: Recipe) -> list[str]:
    texts = [text for anchor in recipe.train.anchors for text in load_prompts(anchor.prompts)]
    for source in recipe.train.preferences:
        texts += source_module(source.name).prompts_used(source)
    return texts


def run(
    recipe: Recipe,
    folder: Path,
    upstream: Mapping[str, Path],
    tracker: wandb.Run,
    excluded: frozenset[str],
    quick: Callable[[QuickQuestions, int], QuickEvaluation],
    observe: Callable[[int, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Make the material, train, and save the adapter or model.

    Args:
        recipe: its `train` section.
        folder: of this stage.
        upstream: folders of finished stages.
        tracker: this stage's wandb run; trl's metrics go there too.
        excluded: normalized questions of the benchmarks: pairs about them are dropped.
        quick: stage three's quick evaluation, made from `train.mix` or `train.stopping` and the seed.
        observe: told step and scores of every evaluation of `train.stopping`; what it raises ends training.

    Returns:
        What belongs into the manifest: the damage-aware mix as it was chosen, where there is one.
    """
    watch = Stopwatch()
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    base = upstream["abliteration"] / "model"
    shelf = shelf_of(recipe, base, load_tokenizer(base))
    by_damage = baseline = None
    if (mix := recipe.train.mix) is not None:
        by_damage = DamageAwareMix(mix, quick(mix, recipe.seed), shelf, recipe.seed)
    if (halt := recipe.train.stopping) is not None:
        baseline = Baseline(halt, quick(halt, recipe.seed), shelf)
    more = [*baseline.pieces] if baseline is not None else []
    layout = Layout(shelf) if recipe.train.engine == "shared" and _in_shards() else None
    more += [layout.piece] if layout is not None else []
    material = prepare(recipe, shelf, upstream, excluded, more, by_damage)
    chosen = {"mix": by_damage.record()} if by_damage is not None else {}
    if distributed.is_main():
        artifacts.write_jsonl(folder / "pairs.jsonl", [pair.as_row() for pair in material.pairs])
    distributed.barrier()

    try:
        trainer = _build_trainer(recipe, folder, upstream, material, shelf, layout)
        stopper = StopWhenHealed(baseline, trainer.log, work, watch, observe) if baseline else None
        if stopper is not None:
            trainer.add_callback(stopper)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work / "checkpoints"))
        save(trainer, base, folder)
    finally:
        # accelerate keeps ZeRO-3's settings for good, under which whole models generate in step with other processes.
        unset_hf_deepspeed_config()
    if recipe.train.adapter is not None:
        with_whole_models(recipe, partial(_check_merge, recipe, trainer, base, folder / "adapter"))
    if distributed.is_main():
        stopped = {"stopping": stopper.summary()} if stopper is not None else {}
        _record(recipe, trainer, material, folder, tracker, chosen | stopped)
        shutil.rmtree(work)
    distributed.barrier()
    return chosen


def _build_trainer(
    recipe: Recipe,
    folder: Path,
    upstream: Mapping[str, Path],
    material: Material,
    shelf: Shelf,
    layout: Layout | None,
) -> HealingTrainer:
    base = upstream["abliteration"] / "model"
    model, reference = _load_student(recipe, base)
    if layout is not None:
        layout.give(model)
    arguments = settings.build_trainer_settings(
        recipe,
        output_dir=folder / "work" / "checkpoints",
        world_size=distributed.world_size(),
        use_cpu=distributed.device().type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        report_to="wandb"
        if distributed.is_main() and tracking_mode(recipe) != "disabled"
        else "none",
    )
    edit = load_edit(upstream["abliteration"] / "edit.safetensors")
    trainer = HealingTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=_dataset(folder),
        processing_class=load_tokenizer(base),
        peft_config=build_adapter(recipe.train.adapter)
        if recipe.train.adapter is not None
        else None,
        anchors=_weighted_anchors(recipe, material),
        share_prompts=recipe.train.engine == "shared",
        references=_references(recipe, shelf, arguments.mixed_precision),
    )
    if arguments.precompute_ref_log_probs:
        trainer.ref_model = None  # what it says is known
    keep_ablated(trainer, edit, recipe.train.keep_ablated)
    if recipe.train.l2 is not None:
        trainer.pull = (recipe.train.l2, Distance(trainer.model))
    if recipe.train.load_in_4bit:
        keep_adapter_in_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepBar())
    _log_plan(trainer, material)
    return trainer


def _in_shards() -> bool:
    """Whether the model is shared out from the CPU, part by part."""
    return launch_strategy().name in ("FSDP2", "ZeRO-3")


def _load_student(recipe: Recipe, base: Path) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model that is trained, and its reference where trl would load one: that would lack what an edit adds."""
    if not _in_shards():
        model = load_model(base, dtype=recipe.model.dtype, in_4bit=recipe.train.load_in_4bit)
        return model, None
    model = load_to_shard(base, dtype=recipe.model.dtype)
    if launch_strategy().name == "ZeRO-3" or recipe.train.adapter is not None:
        return model, None
    return model, load_to_shard(base, dtype=recipe.model.dtype)


def _references(recipe: Recipe, shelf: Shelf, precision: str) -> References:
    """The folder of what was computed under this reference in this precision, by whomever: see `train.references`."""
    depends = {
        "engine": recipe.train.engine,
        "precision": precision,
        "ld_alpha": recipe.train.trainer.get("ld_alpha"),
        "load_in_4bit": recipe.train.load_in_4bit,
    }
    return References(shelf.path("references", "abliterated", depends))


def _dataset(folder: Path) -> datasets.Dataset:
    """The pairs as a data set on disk: trl shares its cached reference log-probabilities between ranks by file."""
    return datasets.load_dataset(
        "json",
        data_files=str(folder / "pairs.jsonl"),
        cache_dir=str(folder / "work" / "cache"),
        split="train",
    )


def _weighted_anchors(recipe: Recipe, material: Material) -> list[WeightedAnchor]:
    names: list[str] = []
    for anchor in recipe.train.anchors:
        same = sum(name.split(" ")[0] == anchor.to for name in names)
        names.append(anchor.to if same == 0 else f"{anchor.to} {same + 1}")
    return [
        WeightedAnchor(
            name,
            AnchorBatches(rows, anchor.batch_size, recipe.seed),
            anchor.weight,
            lessons.sketch(),
            anchor.residual.weight if anchor.residual is not None else 0.0,
        )
        for name, anchor, rows, lessons in zip(
            names, recipe.train.anchors, material.anchors, material.lessons, strict=True
        )
    ]


def save(trainer: HealingTrainer, base: Path, folder: Path) -> None:
    """Save an adapter or a whole model, with the tokenizer's files as its base has them.

    What loading changed of the tokenizer (padding side, a template that opens answers behind an empty thought)
    belongs to this project's prompts, not to the model.

    Args:
        trainer: after training.
        base: folder of the abliterated model.
        folder: of this stage; gets `adapter` or `model`.
    """
    target = folder / ("adapter" if isinstance(trainer.model, PeftModel) else "model")
    trainer.save_model(str(target))
    if not distributed.is_main():
        return
    # trl's own card, and a pickle with machine paths
    for leftover in (target / "README.md", target / "training_args.bin"):
        leftover.unlink(missing_ok=True)
    for file in tokenizer_files(target):
        file.unlink()
    for file in tokenizer_files(base):
        _copy(file, target / file.relative_to(base))
    if target.name == "model" and (base / SIDECAR).is_file():
        # No weight holds what it adds.
        _copy(base / SIDECAR, target / SIDECAR)


def _check_merge(recipe: Recipe, trainer: HealingTrainer, base: Path, adapter: Path) -> None:
    """Hold what stage three and the release will load against what was trained, in the main process."""
    if not distributed.is_main():
        return
    if launch_strategy().shards_weights:
        logger.info("train: no process holds the trained model whole, so its merge is not checked")
        return
    rows = [
        [*row["prompt_ids"], *row["chosen_ids"]][:MERGE_TOKENS]
        for row in trainer.train_dataset.select(range(min(MERGE_ROWS, len(trainer.train_dataset))))
    ]
    full = load_model(base, dtype=recipe.model.dtype)
    tolerance = merge_tolerance(full.dtype, half=trainer.args.bf16 or trainer.args.fp16)
    expected, note = answer_logits(trainer.model, rows), ""
    if recipe.train.load_in_4bit:
        with trainer.model.disable_adapter():
            packed = answer_logits(trainer.model, rows)
        expected, lost = carried_over(expected, packed, answer_logits(full, rows))
        tolerance += lost
        note = "; it was trained on weights in 4 bits and is merged into the full-precision ones"
    answers = answer_logits(merge_adapter(full, adapter), rows)
    share = require_same_answers(expected, answers, tolerance)
    logger.info(
        "train: with the adapter merged in, logits differ from the trained model's by %.1e of their spread "
        "(limit %.2g)%s",
        share,
        tolerance,
        note,
    )


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _record(
    recipe: Recipe,
    trainer: HealingTrainer,
    material: Material,
    folder: Path,
    tracker: wandb.Run,
    more: Mapping[str, Any],
) -> None:
    history = trainer.state.log_history
    artifacts.write_jsonl(folder / "log.jsonl", history)
    steps = [entry for entry in history if "loss" in entry]
    summary: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "pairs": len(material.pairs),
        "pair_counts": material.counts,
        "pair_domains": material.domains,
        "refusal_limit": material.refusal_limit,
        "anchor_prompts": [len(rows) for rows in material.anchors],
        "anchor_refusals": material.refused,
        "first": steps[0] if steps else {},
        "last": steps[-1] if steps else {},
        "keep_ablated": recipe.train.keep_ablated,
        **more,
    }
    artifacts.write_json(folder / "summary.json", summary)
    tracker.summary.update({"pairs": len(material.pairs), "steps": trainer.state.global_step})
    for name, counts in material.counts.items():
        tracker.summary.update(
            {f"pairs/{name}/{reason}": count for reason, count in counts.items()}
        )
    tracker.summary.update(
        {f"domains/{domain}": count for domain, count in material.domains.items()}
    )
    if steps:
        logger.info(
            "train: %d steps, loss %.4f to %.4f, rewards/margins %.3f",
            trainer.state.global_step,
            steps[0]["loss"],
            steps[-1]["loss"],
            steps[-1].get("rewards/margins", float("nan")),
        )


def _log_plan(trainer: HealingTrainer, material: Material) -> None:
    trainable = sum(numel(p) for p in trainer.model.parameters() if p.requires_grad)
    logger.info(
        "train: %d pairs, %s anchor prompts%s, %d trainable parameters",
        len(material.pairs),
        " + ".join(str(len(rows)) for rows in material.anchors) or "no",
        f" ({' + '.join(map(str, material.refused))} left out, which their teachers refuse)"
        if any(material.refused)
        else "",
        trainable,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; ones that a kill cut off are removed."""
    if distributed.is_main() and folder.is_dir():
        for checkpoint in folder.glob("checkpoint-*"):
            if not _is_complete(checkpoint):
                shutil.rmtree(checkpoint)
    distributed.barrier()
    last: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None:
        logger.info("train: going on from %s", Path(last).name)
    return last


def _is_complete(checkpoint: Path) -> bool:
    # The trainer writes its state last, but not at once: half of it is no JSON.
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def source_module(name: str) -> Any:  # noqa: ANN401  # a module
    """The file of `train.preferences` that a recipe's source name selects."""
    return importlib.import_module(f"train.preferences.{name}")
