"""Stage one: from prompts to `edit.safetensors`, `candidates.json` and the abliterated model folder."""

import gc
import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration import baseline, export, illustration, layerwise, search, selection
from abliteration.activations import Activations, collect
from abliteration.findings import Findings, find
from abliteration.openings import refusal_openings
from abliteration.placement import Direction
from abliteration.prompt_sets import PromptSet, load_prompt_sets, prompt_problems, sample
from abliteration.strengths import layer_problems
from abliteration.trials import Trials
from common import artifacts, chat, distributed
from common.architecture import PlacedWriter, find_writers
from common.edits import Edit, save_edit
from common.errors import InputError, StageError
from common.model import check_model, load_config, load_model, load_tokenizer, resolve, weight_files
from common.recipe import Add, Recipe
from common.stored_writers import open_checkpoint, placed_writers
from common.tracking import table

VERSION = 7
# How many prompts of each set are answered to learn how this model refuses, and judged by a search.
MAX_BASELINE_PROMPTS = 128
MAX_TRIAL_PROMPTS = 64
MAX_HARMLESS_PROMPTS = 256
# Fewer harmless prompts of validation than these are filled up with those that the direction was computed on.
FEW_HARMLESS_PROMPTS = 96
# Beside the candidate that the scores chose, so many of the next best begin a search.
NUM_NEAREST = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ground:
    """What the steps of this stage share.

    Attributes:
        recipe: its `model` and `abliteration` sections.
        base: folder of the model.
        tokenizer: its tokenizer.
        folder: of the stage.
        estimation: prompts that directions are estimated from.
        validation: prompts that choose among them.
    """

    recipe: Recipe
    base: Path
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    estimation: PromptSet
    validation: PromptSet

    @property
    def batch_size(self) -> int:
        """Prompts per forward pass and rank."""
        return self.recipe.abliteration.batch_size


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it was chosen from.

    Attributes:
        candidate: layer and position, with their scores.
        settings: the kind of edit with its strengths.
        reason: why this one.
        candidates: all of them.
        trials: of a search.
        best: the one of them that was taken.
    """

    candidate: selection.Candidate
    settings: Any
    reason: str
    candidates: Sequence[selection.Candidate]
    trials: Sequence[search.Trial] = ()
    best: search.Trial | None = None


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    problems = []
    try:
        problems += check_model(resolve(recipe.model.name_or_path, recipe.model.revision))
    except InputError as error:
        problems.append(str(error))
    problems += prompt_problems(recipe)
    if not problems:
        problems += _depth_problems(recipe)
    if recipe.abliteration.load_in_4bit:
        problems += _four_bit_problems()
    return problems


def inputs(recipe: Recipe) -> dict[str, object]:
    """What the result depends on besides the model: the settings, and the prompts' content instead of paths."""
    section = recipe.abliteration
    estimation, validation = load_prompt_sets(recipe)
    return {
        "settings": section.model_dump(mode="json", exclude={"prompts"}),
        "prompts": artifacts.hash_data(asdict(estimation)),
        "validation": artifacts.hash_data(asdict(validation)),
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
    return [prompt for prompts in load_prompt_sets(recipe) for prompt in prompts.all()]


def run(recipe: Recipe, folder: Path, upstream: Mapping[str, Path], tracker: wandb.Run) -> None:
    """Find the direction, edit the weights on disk, prove what was asked for, and score the export again.

    Args:
        recipe: its `model` and `abliteration` sections.
        folder: of this stage.
        upstream: empty: this stage is the first.
        tracker: this stage's wandb run.
    """
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    ground = Ground(recipe, base, load_tokenizer(base), folder, *load_prompt_sets(recipe))
    if recipe.abliteration.layer_by_layer:
        findings = _find_layer_by_layer(ground)
        choice = _take_fixed(ground, findings)
        edit = _build_edit(ground, findings, choice, placed_writers(open_checkpoint(base)))
        scores, streams = None, {}
    else:
        model = load_model(base, dtype=recipe.model.dtype, in_4bit=recipe.abliteration.load_in_4bit)
        findings, choice = _find_and_choose(ground, model)
        edit = _build_edit(ground, findings, choice, find_writers(model))
        scores = export.score(model, ground.tokenizer, ground.validation, edit, ground.batch_size)
        streams = _read_streams(ground, model, choice.candidate.position)
        del model
        gc.collect()  # spread over several devices, a model is held by its own hooks
    if distributed.is_main():
        save_edit(edit, folder / "edit.safetensors")
    report = export.write(
        base, edit, folder / "model", scores, recipe, ground.tokenizer, ground.batch_size
    )
    if distributed.is_main():
        _record(ground, choice, report, tracker)
        _illustrate(ground, findings, choice, edit, report, streams)
    _log_outcome(choice, edit)


def _find_and_choose(ground: Ground, model: PreTrainedModel) -> tuple[Findings, Choice]:
    """Learn how the model refuses, estimate directions, and choose one."""
    settings = ground.recipe.abliteration.selection
    if settings.name == "fixed":
        findings = _find(ground, model, ground.estimation)
        return findings, _take_fixed(ground, findings)
    answers = _answer_baseline(ground, model)
    tokens = baseline.refusal_tokens(answers, settings.min_refusals)
    logger.info(
        "abliteration: refusals begin with %s",
        ", ".join(repr(ground.tokenizer.decode([token])) for token in tokens),
    )
    estimation = _keep_clear_cases(ground, model, ground.estimation, tokens, "")
    validation = _keep_clear_cases(ground, model, ground.validation, tokens, "validation ")
    findings = _find(ground, model, estimation)
    writers = find_writers(model)
    candidates = selection.score_candidates(
        model,
        ground.tokenizer,
        findings,
        validation,
        tokens,
        lambda direction: _kind(ground.recipe.abliteration.edit, direction, writers, {}),
        settings,
        ground.batch_size,
    )
    chosen = selection.choose(candidates, settings)
    reason = f"of the candidates that passed the filters it leaves the least refusal (bypass {chosen.bypass:.2f})"
    scored = Choice(chosen, ground.recipe.abliteration.edit, reason, candidates)
    if settings.name == "scores":
        return findings, scored
    return findings, _search(ground, model, findings, validation, answers, scored)


def _find(ground: Ground, model: PreTrainedModel, prompts: PromptSet) -> Findings:
    num_positions = chat.num_instruction_end_tokens(ground.tokenizer)

    def read(
        sets: Sequence[Sequence[str]], quantile: float | None, files: Sequence[Path] | None
    ) -> list[Activations]:
        return [
            collect(
                model,
                ground.tokenizer,
                part,
                num_positions=num_positions,
                batch_size=ground.batch_size,
                winsorize=quantile,
                keep_samples=files[index] if files else None,
            )
            for index, part in enumerate(sets)
        ]

    return _log_findings(
        find(ground.recipe.abliteration.direction, prompts, read, ground.folder), prompts
    )


def _find_layer_by_layer(ground: Ground) -> Findings:
    num_positions = chat.num_instruction_end_tokens(ground.tokenizer)

    def read(
        sets: Sequence[Sequence[str]], quantile: float | None, files: Sequence[Path] | None
    ) -> list[Activations]:
        return layerwise.collect(
            ground.base,
            ground.tokenizer,
            sets,
            num_positions=num_positions,
            batch_size=ground.batch_size,
            dtype=ground.recipe.model.dtype,
            winsorize=quantile,
            keep_samples=files,
        )

    estimator = ground.recipe.abliteration.direction
    return _log_findings(find(estimator, ground.estimation, read, ground.folder), ground.estimation)


def _log_findings(findings: Findings, prompts: PromptSet) -> Findings:
    logger.info(
        "abliteration: %d prompts whose refusal is to go, %d harmless ones%s, %d layers x %d positions",
        len(prompts.target),
        len(prompts.harmless),
        f", {len(prompts.kept)} whose refusal is to stay" if prompts.kept else "",
        *findings.directions.shape[:2],
    )
    return findings


def _take_fixed(ground: Ground, findings: Findings) -> Choice:
    settings = ground.recipe.abliteration.selection
    assert settings.name == "fixed"
    direction = findings.at(settings.layer, settings.position)
    length = float(direction.vectors[0].norm())
    candidate = selection.Candidate(settings.layer, settings.position, length)
    return Choice(candidate, ground.recipe.abliteration.edit, "the recipe names it", [candidate])


def _harmless_to_search_on(ground: Ground, validation: PromptSet) -> list[str]:
    """Prompts of validation first; behind them, where they are few, some that the direction was computed on.

    Those flatter: on the patient, whose validation set is small, 240 of them let every trial seem to diverge half as
    much as on prompts it had never seen.
    """
    drawn = sample(validation.harmless, MAX_HARMLESS_PROMPTS, ground.recipe.seed)
    rest = [prompt for prompt in ground.estimation.harmless if prompt not in set(drawn)]
    missing = max(FEW_HARMLESS_PROMPTS - len(drawn), 0)
    return [*drawn, *sample(rest, missing, ground.recipe.seed)]


def _search(
    ground: Ground,
    model: PreTrainedModel,
    findings: Findings,
    validation: PromptSet,
    answers: Sequence[baseline.Answer],
    scored: Choice,
) -> Choice:
    """Search from what the scores chose."""
    settings = ground.recipe.abliteration.selection
    assert settings.name == "search"
    writers = find_writers(model)
    judged = Trials(
        model,
        ground.tokenizer,
        harmful=sample(validation.target, MAX_TRIAL_PROMPTS, ground.recipe.seed),
        openings=refusal_openings(answers),
        harmless=_harmless_to_search_on(ground, validation),
        max_answer_tokens=settings.answer_tokens,
        batch_size=ground.batch_size * settings.trials_per_pass,
    )
    num_layers, num_positions = findings.directions.shape[:2]
    space = search.Space(
        # Up to the last: what a direction there does is measured on whole answers.
        (min(c.layer for c in scored.candidates if selection.is_scored(c)), num_layers - 1),
        num_positions,
        num_layers,
        settings.edits,
        embedding=not writers[0].tied,
    )
    own = ground.recipe.abliteration.edit
    projection = getattr(own, "projection", "none")

    def make_edit(params: search.Params) -> Edit:
        direction = findings.at(params["layer"], params["position"])
        return _kind(search.edit_settings(params, projection), direction, writers, {})

    first = _first_settings(space, scored, own.name, own.strength)
    journal = ground.folder / "trials.jsonl"
    trials = search.search(judged, space, make_edit, first, settings, ground.recipe.seed, journal)
    best, reason = search.choose(trials, settings.max_refusal)
    layer, position = best.params["layer"], best.params["position"]
    norm = float(findings.at(layer, position).vectors[0].norm())
    candidate = selection.Candidate(layer, position, norm, kl=best.kl)
    settings_found = search.edit_settings(best.params, projection)
    return Choice(candidate, settings_found, reason, scored.candidates, trials, best)


def _first_settings(
    space: search.Space, scored: Choice, own: str, strength: float
) -> list[dict[str, Any]]:
    """What a search begins with: every kind of edit where the scores chose, the recipe's own around it."""
    best = scored.candidate
    nearest = sorted(
        (c for c in scored.candidates if selection.is_scored(c) and c != best),
        key=lambda candidate: candidate.bypass or 0.0,
    )
    return [
        *(
            space.flat(kind, best.layer, best.position, strength)
            for kind in dict.fromkeys([own, *space.edits])
        ),
        *(space.flat(own, c.layer, c.position, strength) for c in nearest[:NUM_NEAREST]),
        # The scores leave out the last layers.
        space.flat(own, space.num_blocks - 1, best.position, strength),
    ]


def _answer_baseline(ground: Ground, model: PreTrainedModel) -> list[baseline.Answer]:
    answers = [
        answer
        for harmful, part in (
            (True, ground.estimation.target),
            (False, ground.estimation.harmless),
        )
        for answer in baseline.answer_baseline(
            model,
            ground.tokenizer,
            sample(part, MAX_BASELINE_PROMPTS, ground.recipe.seed),
            harmful=harmful,
            batch_size=ground.batch_size,
        )
    ]
    if distributed.is_main():
        path = ground.folder / "baseline.jsonl"
        artifacts.write_jsonl(path, [asdict(answer) for answer in answers])
    logger.info(
        "abliteration: the base model refuses %d of %d prompts whose refusal is to go and %d of %d harmless ones",
        sum(answer.refused for answer in answers if answer.harmful),
        sum(answer.harmful for answer in answers),
        sum(answer.refused for answer in answers if not answer.harmful),
        sum(not answer.harmful for answer in answers),
    )
    return answers


def _keep_clear_cases(
    ground: Ground, model: PreTrainedModel, prompts: PromptSet, tokens: Sequence[int], kind: str
) -> PromptSet:
    """Keep refused prompts with a refusal score above 0 and answered ones below (refusal_direction's filter)."""

    def keep(part: Sequence[str], sign: int, name: str) -> list[str]:
        scores = selection.next_token_refusal(
            model, ground.tokenizer, part, ground.batch_size, tokens
        )
        kept = [
            prompt for prompt, score in zip(part, scores.tolist(), strict=True) if sign * score > 0
        ]
        if len(kept) < len(part):
            logger.info("abliteration: kept %d of %d %s prompts", len(kept), len(part), kind + name)
        if not kept:
            raise StageError(
                f"abliteration: none of {len(part)} {kind}{name} prompts is {'refused' if sign > 0 else 'answered'} by "
                "the base model, so nothing is left to compare; choose other prompts"
            )
        return kept

    false = prompts.falsely_refused
    return PromptSet(
        keep(prompts.harmful, 1, "harmful"),
        keep(prompts.harmless, -1, "harmless"),
        None if false is None else keep(false, 1, "falsely refused"),
    )


def _build_edit(
    ground: Ground, findings: Findings, choice: Choice, writers: Sequence[PlacedWriter]
) -> Edit:
    direction = findings.at(choice.candidate.layer, choice.candidate.position)
    return _kind(choice.settings, direction, writers, _about(ground, choice))


def _kind(
    settings: Any,  # noqa: ANN401  # each kind has settings of its own
    direction: Direction,
    writers: Sequence[PlacedWriter],
    about: Mapping[str, Any],
) -> Edit:
    builder = importlib.import_module(f"abliteration.edits.{settings.name}")
    edit: Edit = builder.build(direction, writers, settings, about)
    return edit


def _about(ground: Ground, choice: Choice) -> dict[str, Any]:
    recipe, template = ground.recipe, ground.tokenizer.chat_template
    return {
        "layer": choice.candidate.layer,
        "position": choice.candidate.position,
        "stream": "resid_pre",
        "norm": choice.candidate.norm,
        "model_type": load_config(ground.base).model_type,
        "estimator": recipe.abliteration.direction.name,
        "selection": recipe.abliteration.selection.name,
        "edit": choice.settings.name,
        "settings": choice.settings.model_dump(mode="json", exclude={"name"}),
        "target": "falsely_refused" if ground.estimation.kept else "harmful",
        "base_model": ground.base.name
        if Path(recipe.model.name_or_path).is_dir()
        else recipe.model.name_or_path,
        "revision": recipe.model.revision,
        "template_sha256": artifacts.hash_text(
            template if isinstance(template, str) else repr(template)
        ),
    }


def _record(ground: Ground, choice: Choice, report: export.Report, tracker: wandb.Run) -> None:
    """Write down what was chosen and measured, for people, later stages and wandb."""
    chosen, folder = choice.candidate.as_data(), ground.folder
    artifacts.write_json(
        folder / "candidates.json",
        {
            "chosen": chosen,
            "reason": choice.reason,
            "edit": choice.settings.model_dump(mode="json"),
            "candidates": [candidate.as_data() for candidate in choice.candidates],
            "trials": [asdict(trial) for trial in choice.trials],
            "front": [trial.number for trial in choice.trials if trial.rate is not None],
        },
    )
    artifacts.write_json(
        folder / "summary.json", {"chosen": chosen, "reason": choice.reason, **report.as_data()}
    )
    columns = ["layer", "position", "norm", "bypass", "induce", "kl", "retain", "dropped"]
    rows = [[candidate.as_data()[column] for column in columns] for candidate in choice.candidates]
    tracker.log({"candidates": table(columns, rows)})
    if choice.trials:
        columns = ["number", "refusal", "kl", "rate", *choice.trials[0].params]
        trials = [{**asdict(trial), **trial.params} for trial in choice.trials]
        tracker.log({"trials": table(columns, [[t.get(c) for c in columns] for t in trials])})
    tracker.summary.update({f"chosen/{k}": v for k, v in chosen.items() if v is not None})
    tracker.summary.update({k: v for k, v in report.as_data().items() if v is not None})


def _read_streams(ground: Ground, model: PreTrainedModel, position: int) -> dict[str, Tensor]:
    """resid_pre of held-out prompts at the chosen position, for the pictures."""
    num_positions = chat.num_instruction_end_tokens(ground.tokenizer)
    streams = {}
    for kind in ("target", "harmless"):
        file = ground.folder / f"{kind}.npy"
        read = collect(
            model,
            ground.tokenizer,
            getattr(ground.validation, kind)[: illustration.MAX_PROMPTS],
            num_positions=num_positions,
            batch_size=ground.batch_size,
            keep_samples=file,
        )
        assert read.samples is not None
        streams[kind] = illustration.stack_at(read.samples, position)
    return streams


def _illustrate(
    ground: Ground,
    findings: Findings,
    choice: Choice,
    edit: Edit,
    report: export.Report,
    streams: Mapping[str, Tensor],
) -> None:
    settings = ground.recipe.abliteration.selection
    names = {"target": edit.about["target"].replace("_", " "), "harmless": "harmless"}
    searched = None
    if choice.best is not None and settings.name == "search":
        searched = illustration.search_of(choice.trials, choice.best, settings.max_refusal)
    illustration.write(
        ground.folder / "report.html",
        name=ground.recipe.name,
        findings=findings,
        chosen=choice.candidate,
        reason=choice.reason,
        candidates=choice.candidates,
        max_kl=None if settings.name == "fixed" else settings.max_kl,
        searched=searched,
        edit=edit,
        writers=placed_writers(open_checkpoint(ground.base)),
        exported=report,
        streams={names[kind]: part for kind, part in streams.items()},
    )
    for file in ground.folder.glob("*.npy"):
        file.unlink()


def _log_outcome(choice: Choice, edit: Edit) -> None:
    if isinstance(choice.settings, Add):
        what = f"added {choice.settings.strength:g} times the direction of"
    else:
        kind = f"{choice.settings.name}, strength {choice.settings.strength:g}"
        what = f"removed ({kind}) from {len(edit.removals)} writers"
    logger.info(
        "abliteration: %s layer %g position %d: %s%s",
        what,
        choice.candidate.layer,
        choice.candidate.position,
        choice.reason,
        f"; left alone: {', '.join(edit.left_alone)}" if edit.left_alone else "",
    )


def _depth_problems(recipe: Recipe) -> list[str]:
    """What does not fit the model's depth or its template."""
    section = recipe.abliteration
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    num_layers = load_config(base).get_text_config().num_hidden_layers
    problems = []
    if not isinstance(section.edit, Add):
        problems += [
            f"abliteration.edit.weights.{problem}"
            for problem in layer_problems(section.edit.weights, num_layers)
        ]
    if section.selection.name != "fixed":
        return problems
    if section.selection.layer > num_layers - 1:
        problems.append(
            f"abliteration.selection.layer: {section.selection.layer:g} is beyond the model's {num_layers} layers (0 "
            f"to {num_layers - 1})"
        )
    num_positions = chat.num_instruction_end_tokens(load_tokenizer(base))
    if -section.selection.position > num_positions:
        problems.append(
            f"abliteration.selection.position: {section.selection.position} lies before the {num_positions} tokens "
            f"that the template puts behind the user's words; choose -{num_positions} to -1"
        )
    return problems


def _four_bit_problems() -> list[str]:
    key = "abliteration.load_in_4bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        return [
            f"{key}: needs bitsandbytes, which is not installed; run `pip install -e '.[quantized]'`"
        ]
    return []
