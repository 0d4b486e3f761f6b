"""Tasks of lm-evaluation-harness: built-in ones by name or suite, one's own as YAML files in a folder."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common import artifacts
from common.errors import InputError
from common.recipe import LmEval, Recipe
from eval import suites, task_index
from eval.benchmarks import place
from eval.loaded_task import LoadedTask, load_task
from eval.suites import Asked


def names(spec: LmEval) -> list[str]:
    """The tasks, with groups and tags replaced by what they hold.

    Raises:
        InputError: if a task is unknown or a task file cannot be read.
    """
    return [asked.name for asked in _asked(spec)]


def check(spec: LmEval, recipe: Recipe) -> list[str]:
    """Unknown tasks, task files without data, and tasks that this evaluation cannot score."""
    where = place(spec, recipe)
    if spec.include_path is not None and not Path(spec.include_path).is_dir():
        return [
            f"{where}.include_path: {spec.include_path} is no folder; name one that holds task "
            f"files"
        ]
    key = f"{where}.{'tasks' if spec.suite is None else 'suite'}"
    problems = [
        f"{where}.data.{task}: {problem}"
        for task, data in spec.data.items()
        for problem in task_index.data_problems(data)
    ]
    if problems:
        return problems
    try:
        wanted = _asked(spec)
        for asked in wanted:
            settings, folder = _settings(spec, asked)
            problems += [
                f"{key}: {problem}"
                for problem in task_index.problems(asked.name, settings, folder, asked.metric)
            ]
    except InputError as error:
        return [f"{key}: {error}"]
    found = [asked.name for asked in wanted]
    repeated = sorted({task for task in found if found.count(task) > 1})
    problems += [
        f'{key}: "{task}" is named twice (perhaps by a group); delete one' for task in repeated
    ]
    unused = sorted(set(spec.data) - {asked.task for asked in wanted})
    return problems + [
        f'{where}.data: "{task}" is none of the tasks ({", ".join(found[:5])}...); correct the name'
        for task in unused
    ]


def inputs(spec: LmEval) -> dict[str, object]:
    """Settings, the content of task files and of the data beside them, and the harness's version."""
    contents: dict[str, object] = {}
    for asked in _asked(spec):
        config, folder = _settings(spec, asked)
        own = spec.data.get(asked.task)
        text = task_index.without_paths(config if own is None else _without_data(config), folder)
        contents[asked.name] = {
            "config": artifacts.hash_text(text),
            "data": artifacts.hash_files(
                task_index.local_data(config, folder) if own is None else task_index.data_files(own)
            ),
            "code": artifacts.hash_files(sorted(folder.glob("*.py"))) if folder else None,
        }
    settings = spec.model_dump(mode="json", exclude={"include_path", "data", "suite"})
    listed = [_fingerprint(asked) for asked in _asked(spec)] if spec.suite is not None else None
    return (
        settings
        | {"contents": contents, "lm_eval": _version()}
        | ({"suite": listed} if listed is not None else {})
    )


def texts(spec: LmEval) -> dict[str, list[str]]:
    """Every item as it is asked, and every text field of it, since a template may wrap the question.

    Raises:
        InputError: if a data set cannot be had; names it, and all others that are needed.
    """
    found: dict[str, list[str]] = {}
    for asked in _asked(spec):
        try:
            found[asked.name] = list(task_index.texts(_build(spec, asked), asked.limit))
        except InputError as error:
            # The others are not tried: without a network each costs half a minute.
            raise InputError(f"{error}{_needed(spec)}") from error
    return found


def _needed(spec: LmEval) -> str:
    """All data sets of a benchmark that takes several, in words."""
    settings = [_settings(spec, asked)[0] for asked in _asked(spec) if asked.task not in spec.data]
    needed = sorted({str(entry["dataset_path"]) for entry in settings if "dataset_path" in entry})
    return f". Data sets of this benchmark: {', '.join(needed)}" if len(needed) > 1 else ""


def load(spec: LmEval, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[LoadedTask]:
    """The tasks with their data, their requests rendered with the chat template.

    Raises:
        InputError: if a data set cannot be had.
    """
    return [_load(spec, asked, tokenizer, batch_size) for asked in _asked(spec)]


def _load(
    spec: LmEval, asked: Asked, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> LoadedTask:
    task = _build(spec, asked)
    # As the harness does: a task that says 0 shots keeps them.
    if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", spec.num_fewshot)
    return load_task(
        task,
        tokenizer,
        batch_size=batch_size,
        metric=task_index.metric_of(task, asked.metric),
        limit=asked.limit,
        role=spec.role,
        standing=None if asked.standing is None else asked.standing.record(),
    )


def _asked(spec: LmEval) -> list[Asked]:
    """The tasks of a benchmark, with groups and tags replaced by what they hold."""
    index = _index(spec)
    return [
        asked if leaf == asked.task else replace(asked, task=leaf, name=leaf)
        for asked in _listed(spec)
        for leaf in task_index.leaves(index, asked.task)
    ]


def _listed(spec: LmEval) -> Iterator[Asked]:
    if spec.suite is None:
        yield from (Asked(name=name, task=name, limit=spec.limit) for name in spec.tasks)
        return
    for asked in suites.load(spec.suite):
        yield replace(asked, limit=asked.limit if spec.limit is None else spec.limit)


def _index(spec: LmEval) -> task_index.Index:
    """All known tasks by name; the built-in ones, which take seconds to list, only where one is needed."""
    if spec.include_path is not None:
        local = task_index.read(spec.include_path, False)
        if all(asked.task in local for asked in _listed(spec)):
            return local
    return task_index.read(spec.include_path, True)


def _settings(
    spec: LmEval, asked: Asked, *, resolve_functions: bool = False
) -> tuple[dict[str, Any], Path | None]:
    """A task's settings with what the recipe or its suite changes, and the folder of its file."""
    settings, folder = task_index.config(
        _index(spec), asked.task, resolve_functions=resolve_functions
    )
    if asked.task in spec.data:
        settings = task_index.with_data(asked.task, settings, spec.data[asked.task])
    if asked.standing is not None:
        settings |= {"task": asked.name, "num_fewshot": asked.num_fewshot}
    return settings, folder


def _build(spec: LmEval, asked: Asked) -> Any:  # noqa: ANN401  # the harness's Task, untyped
    settings, folder = _settings(spec, asked, resolve_functions=True)
    settings = task_index.with_paths(settings, folder)
    if asked.num_options is not None:
        settings = task_index.with_options(settings, *asked.num_options)
    return task_index.build(asked.task, settings)


def _without_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in settings.items()
        if key not in ("dataset_path", "dataset_kwargs")
    }


def _fingerprint(asked: Asked) -> list[object]:
    return [asked.name, asked.metric, asked.num_fewshot, asked.limit, asked.num_options]


def _version() -> str:
    import importlib.metadata  # noqa: PLC0415  # only here

    return importlib.metadata.version("lm_eval")
