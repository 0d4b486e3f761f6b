"""Stage one: from prompts to `edit.safetensors`, `candidates.json` and the abliterated model folder."""

import importlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration import baseline, selection, verification
from abliteration.activations import mean_residual_stream
from common import artifacts, chat, distributed
from common.architecture import find_writers
from common.edits import Edit, apply_to_weights, save_edit
from common.errors import InputError, StageError
from common.model import check_model, load_config, load_model, load_tokenizer, resolve, weight_files
from common.prompts import check_prompts, describe, load_prompts
from common.recipe import PromptSource, Recipe
from common.tracking import table

VERSION = 1
# How many prompts of each set are answered to learn how this model refuses.
MAX_BASELINE_PROMPTS = 128
SHARD_SIZE = "5GB"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSets:
    """The prompts that directions are estimated from, and those that choose among them."""

    harmful: list[str]
    harmless: list[str]
    validation: selection.Validation


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    problems = []
    try:
        problems += check_model(resolve(recipe.model.name_or_path, recipe.model.revision))
    except InputError as error:
        problems.append(str(error))
    problems += _prompt_problems(recipe)
    if not problems:
        problems += _selection_problems(recipe)
    return problems


def inputs(recipe: Recipe) -> dict[str, object]:
    """What the result depends on besides the model: the settings, and the prompts' content instead of paths."""
    section = recipe.abliteration
    prompts = load_prompt_sets(recipe)
    return {
        "settings": section.model_dump(mode="json", exclude={"prompts"}),
        "prompts": artifacts.hash_data([prompts.harmful, prompts.harmless]),
        "validation": artifacts.hash_data(
            [list(prompts.validation.harmful), list(prompts.validation.harmless)]
        ),
        "dtype": recipe.model.dtype,
    }


def disk_bytes(recipe: Recipe) -> int:
    """The room that the abliterated model folder takes."""
    return sum(
        file.stat().st_size
        for file in weight_files(resolve(recipe.model.name_or_path, recipe.model.revision))
    )


def prompts_used(recipe: Recipe) -> list[str]:
    """Every prompt that shapes the direction, for the overlap check against the benchmarks."""
    sets = load_prompt_sets(recipe)
    return [*sets.harmful, *sets.harmless, *sets.validation.harmful, *sets.validation.harmless]


def load_prompt_sets(recipe: Recipe) -> PromptSets:
    """Load and split the prompts.

    Raises:
        InputError: if a source is unusable, or nothing is left to estimate from.
    """
    prompts = recipe.abliteration.prompts
    harmful, harmless = load_prompts(prompts.harmful), load_prompts(prompts.harmless)
    if not isinstance(prompts.validation, int):
        validation = selection.Validation(
            load_prompts(prompts.validation.harmful), load_prompts(prompts.validation.harmless)
        )
        return PromptSets(harmful, harmless, validation)
    count = prompts.validation
    harmful, held_harmful = _hold_out(harmful, count, recipe.seed, prompts.harmful)
    harmless, held_harmless = _hold_out(harmless, count, recipe.seed, prompts.harmless)
    return PromptSets(harmful, harmless, selection.Validation(held_harmful, held_harmless))


def run(recipe: Recipe, folder: Path, upstream: Mapping[str, Path], tracker: wandb.Run) -> None:
    """Find the direction, remove it, prove it gone, and write the edited model.

    Args:
        recipe: its `model` and `abliteration` sections.
        folder: of this stage.
        upstream: empty: this stage is the first.
        tracker: this stage's wandb run.
    """
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=recipe.model.dtype)
    prompts = load_prompt_sets(recipe)
    num_positions = chat.num_instruction_end_tokens(tokenizer)

    chosen, direction, candidates = _find_direction(
        recipe, model, tokenizer, prompts, num_positions, folder
    )
    edit = _make_edit(recipe, model, direction, _about(recipe, base, tokenizer, chosen))
    residuals = _apply_and_verify(model, tokenizer, edit, prompts.validation.harmful)

    if distributed.is_main():
        save_edit(edit, folder / "edit.safetensors")
        artifacts.write_json(
            folder / "candidates.json",
            {
                "chosen": chosen.as_data(),
                "candidates": [candidate.as_data() for candidate in candidates],
            },
        )
        artifacts.write_json(
            folder / "summary.json",
            {"chosen": chosen.as_data(), "largest_residual": max(residuals.values())},
        )
        model.save_pretrained(folder / "model", max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder / "model")
        _track(tracker, chosen, candidates, residuals)
    logger.info(
        "abliteration: removed layer %d position %d (strength %g) from %d writers%s",
        chosen.layer,
        chosen.position,
        recipe.abliteration.edit.strength,
        len(edit.removals),
        f", left alone: {', '.join(edit.left_alone)}" if edit.left_alone else "",
    )


def _find_direction(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSets,
    num_positions: int,
    folder: Path,
) -> tuple[selection.Candidate, Tensor, list[selection.Candidate]]:
    settings, batch_size = recipe.abliteration.selection, recipe.abliteration.batch_size
    tokens: list[int] = []
    if settings.name == "scores":
        tokens = _learn_refusal_tokens(recipe, model, tokenizer, prompts, folder)
        prompts = _keep_clear_cases(model, tokenizer, prompts, tokens, batch_size)
    means = [
        mean_residual_stream(
            model, tokenizer, part, num_positions=num_positions, batch_size=batch_size
        )
        for part in (prompts.harmful, prompts.harmless)
    ]
    estimator = importlib.import_module(
        f"abliteration.directions.{recipe.abliteration.direction.name}"
    )
    directions: Tensor = estimator.estimate(*means)
    logger.info(
        "abliteration: %d harmful and %d harmless prompts, %d layers x %d positions",
        len(prompts.harmful),
        len(prompts.harmless),
        *directions.shape[:2],
    )
    if settings.name == "fixed":
        direction = directions[settings.layer, settings.position]
        chosen = selection.Candidate(settings.layer, settings.position, float(direction.norm()))
        if chosen.norm == 0:
            raise StageError(
                f"abliteration: harmful and harmless prompts do not differ at layer {chosen.layer}, position "
                f"{chosen.position} (a fixed token of the template); choose a later layer or another position"
            )
        return chosen, direction, [chosen]
    candidates = selection.score_candidates(
        model,
        tokenizer,
        directions,
        prompts.validation,
        tokens,
        lambda direction: _make_edit(recipe, model, direction, {}),
        settings,
        batch_size,
    )
    chosen = selection.choose(candidates, settings)
    logger.info(
        "abliteration: chose layer %d position %d of %d candidates: bypass %.2f, induce %.2f, KL %.3f",
        chosen.layer,
        chosen.position,
        len(candidates),
        chosen.bypass,
        chosen.induce,
        chosen.kl,
    )
    return chosen, directions[chosen.layer, chosen.position], candidates


def _learn_refusal_tokens(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSets,
    folder: Path,
) -> list[int]:
    settings = recipe.abliteration.selection
    assert settings.name == "scores"
    answers = [
        answer
        for harmful, part in ((True, prompts.harmful), (False, prompts.harmless))
        for answer in baseline.answer_baseline(
            model,
            tokenizer,
            part[:MAX_BASELINE_PROMPTS],
            harmful=harmful,
            batch_size=recipe.abliteration.batch_size,
        )
    ]
    if distributed.is_main():
        artifacts.write_jsonl(folder / "baseline.jsonl", [asdict(answer) for answer in answers])
    tokens = baseline.refusal_tokens(answers, settings.min_refusals)
    logger.info(
        "abliteration: the base model refuses %d of %d harmful and %d of %d harmless prompts; refusals begin with %s",
        sum(answer.refused for answer in answers if answer.harmful),
        sum(answer.harmful for answer in answers),
        sum(answer.refused for answer in answers if not answer.harmful),
        sum(not answer.harmful for answer in answers),
        ", ".join(repr(tokenizer.decode([token])) for token in tokens),
    )
    return tokens


def _keep_clear_cases(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSets,
    tokens: Sequence[int],
    batch_size: int,
) -> PromptSets:
    """Keep harmful prompts with a refusal score above 0 and harmless ones below (refusal_direction's filter)."""

    def keep(part: Sequence[str], sign: int, name: str) -> list[str]:
        logits = selection.next_token_logits(model, tokenizer, part, batch_size)
        scores = baseline.refusal_scores(logits, tokens)
        kept = [
            prompt for prompt, score in zip(part, scores.tolist(), strict=True) if sign * score > 0
        ]
        if len(kept) < len(part):
            logger.info("abliteration: kept %d of %d %s prompts", len(kept), len(part), name)
        if not kept:
            raise StageError(
                f"abliteration: none of {len(part)} {name} prompts is {'refused' if sign > 0 else 'answered'} by the "
                "base model, so nothing is left to compare; choose other prompts"
            )
        return kept

    return PromptSets(
        keep(prompts.harmful, 1, "harmful"),
        keep(prompts.harmless, -1, "harmless"),
        selection.Validation(
            keep(prompts.validation.harmful, 1, "harmful validation"),
            keep(prompts.validation.harmless, -1, "harmless validation"),
        ),
    )


def _make_edit(
    recipe: Recipe, model: PreTrainedModel, direction: Tensor, about: Mapping[str, Any]
) -> Edit:
    kind = recipe.abliteration.edit
    builder = importlib.import_module(f"abliteration.edits.{kind.name}")
    edit: Edit = builder.build(direction, find_writers(model), kind.strength, about)
    return edit


def _apply_and_verify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edit: Edit, prompts: Sequence[str]
) -> dict[str, float]:
    """Edit the weights in place; returns what each writer still writes along the direction, as a share."""
    dtype = next(model.parameters()).dtype
    sample = list(prompts[:32])
    written = verification.written_along(model, edit)
    reach = verification.stream_along(model, tokenizer, sample, edit.direction)
    apply_to_weights(model, edit)
    verification.check_stream(
        reach, verification.stream_along(model, tokenizer, sample, edit.direction), edit, dtype
    )
    return verification.check_coverage(
        written, verification.written_along(model, edit), edit, dtype
    )


def _about(
    recipe: Recipe, base: Path, tokenizer: PreTrainedTokenizerBase, chosen: selection.Candidate
) -> dict[str, Any]:
    template = tokenizer.chat_template
    return {
        "layer": chosen.layer,
        "position": chosen.position,
        "stream": "resid_pre",
        "norm": chosen.norm,
        "estimator": recipe.abliteration.direction.name,
        "edit": recipe.abliteration.edit.name,
        "strength": recipe.abliteration.edit.strength,
        "base_model": base.name
        if Path(recipe.model.name_or_path).is_dir()
        else recipe.model.name_or_path,
        "revision": recipe.model.revision,
        "template_sha256": artifacts.hash_text(
            template if isinstance(template, str) else repr(template)
        ),
    }


def _track(
    tracker: wandb.Run,
    chosen: selection.Candidate,
    candidates: Sequence[selection.Candidate],
    residuals: Mapping[str, float],
) -> None:
    columns = ["layer", "position", "norm", "bypass", "induce", "kl", "dropped"]
    rows = [[candidate.as_data()[column] for column in columns] for candidate in candidates]
    tracker.log({"candidates": table(columns, rows)})
    tracker.summary.update(
        {f"chosen/{key}": value for key, value in chosen.as_data().items() if value is not None}
    )
    tracker.summary["largest_residual"] = max(residuals.values())


def _hold_out(
    prompts: list[str], count: int, seed: int, source: PromptSource
) -> tuple[list[str], list[str]]:
    if len(prompts) <= count:
        raise InputError(
            f"{describe(source)} holds {len(prompts)} prompts, of which {count} "
            "would be held out; nothing is left to estimate from: give more prompts, or hold out fewer"
        )
    shuffled = random.Random(seed).sample(prompts, len(prompts))  # no secret
    return shuffled[count:], shuffled[:count]


def _prompt_problems(recipe: Recipe) -> list[str]:
    prompts, key = recipe.abliteration.prompts, "abliteration.prompts"
    sources = {f"{key}.harmful": prompts.harmful, f"{key}.harmless": prompts.harmless}
    if not isinstance(prompts.validation, int):
        sources |= {
            f"{key}.validation.harmful": prompts.validation.harmful,
            f"{key}.validation.harmless": prompts.validation.harmless,
        }
    problems = [
        problem for name, source in sources.items() for problem in check_prompts(source, name)
    ]
    if problems:
        return problems
    try:
        load_prompt_sets(recipe)
    except InputError as error:
        return [f"{key}.validation: {error}"]
    return []


def _selection_problems(recipe: Recipe) -> list[str]:
    settings = recipe.abliteration.selection
    if settings.name != "fixed":
        return []
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    num_layers = load_config(base).get_text_config().num_hidden_layers
    num_positions = chat.num_instruction_end_tokens(load_tokenizer(base))
    problems = []
    if settings.layer >= num_layers:
        problems.append(
            f"abliteration.selection.layer: {settings.layer} is beyond the model's {num_layers} layers (0 to "
            f"{num_layers - 1})"
        )
    if -settings.position > num_positions:
        problems.append(
            f"abliteration.selection.position: {settings.position} lies before the {num_positions} tokens that the "
            f"template puts behind the user's words; choose -{num_positions} to -1"
        )
    return problems
