"""Stage three: the same items put to the original, the abliterated and the healed model, and what that shows."""

import importlib.metadata
import importlib.util
import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, distributed
from common.artifacts import Stopwatch
from common.edits import load_edit
from common.model import load_tokenizer
from common.recipe import Recipe
from common.tracking import table
from eval import calibration, direction, flips, parts
from eval import results as results_file
from eval import table as results_table
from eval.answer_cache import AnswerCache
from eval.benchmarks import Loaded, Subject, component
from eval.items import MODELS, Item, ModelName
from eval.report import page as report
from eval.report import questions
from eval.results import Limits, Settings
from eval.subjects import load_subject

VERSION = 7
# What can change a number; the versions go into results.json, not into the fingerprint.
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "lm_eval",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
)

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    problems = [
        problem
        for spec in recipe.eval.benchmarks
        for problem in component(spec.name).check(spec, recipe)
    ]
    problems += _engine_problems(recipe)
    problems += calibration.check(recipe.eval.labels) + list(_label_problems(recipe))
    if problems:
        return problems
    known = [
        name
        for spec in recipe.eval.benchmarks
        if spec.name in ("lm_eval", "local")
        for name in _names(spec)
    ]
    repeated = [name for name, count in Counter(known).items() if count > 1]
    problems += [f'eval.benchmarks: "{name}" is measured twice; delete one' for name in repeated]
    return problems + list(_gate_problems(recipe, known))


def inputs(recipe: Recipe) -> dict[str, object]:
    """What the result depends on besides the models: the settings, and the items' content instead of paths."""
    return {
        "settings": recipe.eval.model_dump(mode="json", exclude={"benchmarks", "labels"}),
        "labels": calibration.fingerprint(recipe.eval.labels),
        "benchmarks": [
            [spec.name, component(spec.name).inputs(spec)] for spec in recipe.eval.benchmarks
        ],
        "dtype": recipe.model.dtype,
        "seed": recipe.seed,
    }


def items(recipe: Recipe) -> dict[str, list[str]]:
    """The wording of every item of each benchmark and panel: no stage before this one may have seen any of them.

    Also of the items that are not in the part of `eval.part`, so that no training depends on it.

    Raises:
        InputError: if a data set cannot be had.
    """
    return {
        f"{spec.name}[{name}]": texts
        for spec in recipe.eval.benchmarks
        for name, texts in component(spec.name).texts(spec).items()
    }


def part_problems(recipe: Recipe, found: Mapping[str, Sequence[str]]) -> list[str]:
    """Benchmarks that are too small to be measured in parts.

    Args:
        recipe: its `eval.part`.
        found: from `items`.
    """
    part = recipe.eval.part
    if part == "all":
        return []
    return [
        f"eval.part: {name} has no item in the part for {part}; a study needs a few dozen"
        for name, texts in found.items()
        if not parts.has_items(texts, part)
    ]


def run(
    recipe: Recipe, folder: Path, upstream: Mapping[str, Path], tracker: wandb.Run
) -> dict[str, Any]:
    """Evaluate the three models.

    Writes items.jsonl (what each model did on each item), results.json (what that shows), report.html (the same
    as a page) and labels.csv (answers for people to judge).

    Args:
        recipe: the resolved recipe.
        folder: of this stage.
        upstream: folders of the finished stages `abliteration` and `train`.
        tracker: this stage's wandb run.

    Returns:
        What is in results.json. Missed gates are in its `accept`; raising the error is left to the
        caller.
    """
    tokenizer = load_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
    benchmarks = [
        loaded
        for spec in recipe.eval.benchmarks
        for loaded in component(spec.name).load(spec, tokenizer, batch_size=recipe.eval.batch_size)
    ]
    if recipe.eval.part != "all":
        benchmarks = [parts.restrict(loaded, recipe.eval.part) for loaded in benchmarks]
    edit = load_edit(upstream["abliteration"] / "edit.safetensors")
    prompts = direction.contrast(recipe, edit)

    def look(model: PreTrainedModel) -> direction.Trace:
        return direction.trace(model, edit, tokenizer, prompts, recipe.eval.batch_size)

    answers_of = partial(_answers_of, recipe, tokenizer)
    measured, traces = _measure(recipe, upstream, benchmarks, look, answers_of)
    results = results_file.build(
        _settings(recipe, upstream),
        [loaded.row for loaded in benchmarks],
        measured,
        direction.block(edit, traces, prompts),
    )
    if distributed.is_main():
        artifacts.write_jsonl(folder / "items.jsonl", [item.record() for item in measured])
        artifacts.write_json(folder / "results.json", results)
        asked = questions.of(benchmarks)
        labels = calibration.load_labels(recipe.eval.labels)
        template = folder / calibration.NAME
        calibration.write_template(template, measured, asked, labels, recipe.seed)
        report.write(folder / report.NAME, results, measured, asked, upstream)
        _track(tracker, results, measured)
    distributed.barrier()
    return results


def _measure(
    recipe: Recipe,
    upstream: Mapping[str, Path],
    benchmarks: Sequence[Loaded],
    look: Callable[[PreTrainedModel], direction.Trace],
    answers_of: Callable[[PreTrainedModel], AnswerCache],
) -> tuple[list[Item], dict[ModelName, direction.Trace]]:
    """Put all benchmarks to the models in turn; the original stays beside the one under test, a third never."""
    original = load_subject("original", recipe, upstream)

    def measure(name: ModelName) -> tuple[list[Item], direction.Trace]:
        model: PreTrainedModel = (
            original if name == "original" else load_subject(name, recipe, upstream)
        )
        subject = Subject(name, model, original, recipe.eval.engine, answers_of(model))
        found = [item for loaded in benchmarks for item in _score(loaded, subject)]
        return found, look(model)

    by_model = {name: measure(name) for name in MODELS}
    everything = [item for found, _ in by_model.values() for item in found]
    return everything, {name: traced for name, (_, traced) in by_model.items()}


def _answers_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> AnswerCache:
    root = artifacts.Store(Path(recipe.output_dir)).root / "requests"
    return AnswerCache.of(root, model, tokenizer, recipe.eval.engine)


def _score(loaded: Loaded, subject: Subject) -> list[Item]:
    watch = Stopwatch()
    scored = loaded.score(subject)
    if scored and distributed.is_main():
        mean = sum(item.value for item in scored) / len(scored)
        logger.info(
            "eval: %s, %s: %.4f over %d items, %.1f s",
            loaded.row.name,
            subject.name,
            mean,
            len(scored),
            watch.seconds,
        )
    return scored


def _settings(recipe: Recipe, upstream: Mapping[str, Path]) -> Settings:
    return Settings(
        recipe=recipe.name,
        margin=recipe.eval.margin,
        seed=recipe.seed,
        accept={path: Limits(limit.min, limit.max) for path, limit in recipe.eval.accept.items()},
        labels=calibration.load_labels(recipe.eval.labels),
        provenance={
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in LIBRARIES},
            "seed": recipe.seed,
            "fingerprints": {name: fingerprint for name, fingerprint in _fingerprints(upstream)},
        },
    )


def _fingerprints(upstream: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name in sorted(upstream):
        manifest = upstream[name] / artifacts.MANIFEST
        if manifest.is_file():
            yield name, json.loads(manifest.read_text(encoding="utf-8"))["fingerprint"]


def _names(spec: Any) -> list[str]:  # noqa: ANN401  # each benchmark has a spec of its own
    return component(spec.name).names(spec)


def _engine_problems(recipe: Recipe) -> Iterator[str]:
    """Where the engine of the recipe cannot run, or has nothing to do."""
    engine = recipe.eval.engine
    if engine == "packed":
        return
    if not any(spec.name in ("lm_eval", "local") for spec in recipe.eval.benchmarks):
        yield f"eval.engine: {engine} answers tasks of lm_eval and local, and no benchmark is one; delete the line"
    if engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        yield "eval.engine: vLLM is not installed; `pip install vllm` on a machine with a GPU, or choose packed"
    if distributed.world_size() > 1:
        yield "eval.engine: vllm takes the GPUs by itself; launch one process, or choose packed"
    if recipe.abliteration.edit.name == "add":
        yield "eval.engine: what the edit `add` adds is not in the weights that vllm reads; choose packed"


def _label_problems(recipe: Recipe) -> Iterator[str]:
    """Where labels have nothing to correct, or do not fit what is measured."""
    if recipe.eval.labels is None:
        return
    if not any(spec.name == "refusal" for spec in recipe.eval.benchmarks):
        yield "eval.labels: corrects rates of refusal, and no benchmark is one; delete the line"
    if recipe.eval.part != "all":
        yield "eval.labels: is of answers to whole panels, and a study measures parts of them; delete the line"


def _gate_problems(recipe: Recipe, benchmarks: Sequence[str]) -> Iterator[str]:
    """Gates on what is not measured or not labelled; their form and the panels are checked with the recipe."""
    labels = calibration.load_labels(recipe.eval.labels)
    for gate in recipe.eval.accept:
        kind, _, rest = gate.partition("[")
        name = rest.rpartition("]")[0]
        suites = [spec.suite for spec in recipe.eval.benchmarks if spec.name == "lm_eval"]
        if kind == "suites" and name not in suites:
            yield f"eval.accept.{gate}: the suite {name} is not measured; add it to eval.benchmarks"
        if "].calibrated." in gate and name not in labels.sample:
            yield (
                f"eval.accept.{gate}: {recipe.eval.labels} labels no prompt of {name} completely; label some from the "
                "top, or delete the gate"
            )
        if kind == "benchmarks" and name not in benchmarks:
            yield f'eval.accept.{gate}: "{name}" is not measured; known: {", ".join(benchmarks) or "none"}'


def _track(tracker: wandb.Run, results: Mapping[str, Any], measured: Sequence[Item]) -> None:
    """Numbers only: answers can hold what should not leave the machine."""
    tracker.summary.update(dict(_flat(results)))
    for block in results_table.blocks(results):
        tracker.log({f"comparison/{block.name}": table(block.heads, block.cells)})
    columns = ["kind", "name", "id", *MODELS, "flip"]
    tracker.log({"items": table(columns, list(_flips(measured)))})


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of results.json under names like `benchmarks/addition/healed/value`."""
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            for row in value:
                # Rows without a name are a series, which belongs into a picture.
                if isinstance(row, Mapping) and "name" in row:
                    yield from _flat(row, f"{prefix}{key}/{row['name']}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _flips(measured: Sequence[Item]) -> Iterator[list[Any]]:
    """One row per item: its values under the three models, and what changed."""
    by_item: dict[tuple[str, str, str | int], dict[str, float]] = {}
    for item in measured:
        by_item.setdefault((item.kind, item.name, item.id), {})[item.model] = item.value
    for (kind, name, number), values in by_item.items():
        if kind == "benchmarks":
            flip = flips.change(*(values[model] for model in MODELS))
        else:
            before, after = values.get("original"), values["healed"]
            flip = "" if before is None or before == after else "up" if after > before else "down"
        yield [kind, name, str(number), *(values.get(model) for model in MODELS), flip]
