"""Tasks of lm-evaluation-harness: what it knows by name, what their files say, and the task with its data."""

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import InputError

# What a metric must be: the mean over items of a value that is higher for better answers.
KNOWN_MEANS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
DEFAULT_METRICS = {
    "multiple_choice": "acc",
    "loglikelihood": "acc",
    "generate_until": "exact_match",
}
# What the harness leaves to its own extras, by the package whose import fails.
EXTRAS = {
    "langdetect": "ifeval",
    "immutabledict": "ifeval",
    "nltk": "ifeval",
    "antlr4": "math",
    "math_verify": "math",
    "sympy": "math",
}
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")

# By name: what the harness knows of a task, a group or a tag.
Index = Mapping[str, Any]
Config = Mapping[str, Any]
# Local data of a task: a folder with a copy of its data set, or files by split.
Data = str | Mapping[str, str]

# It announces every default it fills in; what matters of that is checked here.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


@lru_cache(maxsize=8)
def read(include_path: str | None, with_defaults: bool) -> Index:
    """List the tasks of a folder, and the built-in ones, which take seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # slow to import, and recipes without lm_eval must load fast

    manager = TaskManager(include_path=include_path, include_defaults=with_defaults)
    entries: Index = manager.task_index
    return entries


def leaves(index: Index, name: str) -> list[str]:
    """A task, or the tasks that a group or tag stands for.

    Raises:
        InputError: if the name is unknown, or a group defines tasks inside itself.
    """
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        guess = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "name a built-in task, or set include_path"
        )
        raise InputError(f'"{name}" is no task of lm-eval; {guess}')
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = [
        member if isinstance(member, str) else member.get("task") for member in entry.cfg["task"]
    ]
    if not all(isinstance(member, str) and member in index for member in members):
        raise InputError(
            f'the group "{name}" defines tasks inside itself; name its tasks one by one'
        )
    return [leaf for member in members for leaf in leaves(index, member)]


def config(
    index: Index, name: str, *, resolve_functions: bool = False
) -> tuple[dict[str, Any], Path | None]:
    """A task's settings with its includes, and the folder of its file.

    Raises:
        InputError: if its code needs a package that is not installed.
    """
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415  # the harness has no public way to read one file

    entry = index[name]
    if entry.yaml_path is None:
        return dict(entry.cfg or {}), None
    try:
        settings = load_yaml(entry.yaml_path, resolve_func=resolve_functions)
    except ImportError as error:
        raise InputError(_needs_package(name, error)) from error
    for key in ("tag", "group", "task_list"):
        settings.pop(key, None)
    return dict(settings) | {"task": name}, Path(entry.yaml_path).resolve().parent


def problems(name: str, settings: Config, folder: Path | None, metric: str | None) -> Iterator[str]:
    """Why a task cannot be measured, as far as its settings tell.

    Args:
        name: of the task.
        settings: its own.
        folder: of its file, if it has one.
        metric: the one that is wanted; None: any that will do.
    """
    if "class" in settings:
        return  # a task in Python says what it is only when it is built
    for path in local_data(settings, folder):
        if not path.is_file():
            yield (
                f'"{name}": its data file {path} does not exist; correct data_files, which are '
                "taken from the folder of its YAML"
            )
    output_type = settings.get("output_type", "generate_until")
    metrics = settings.get("metric_list") or [{"metric": DEFAULT_METRICS.get(output_type)}]
    usable = [entry["metric"] for entry in metrics if _is_mean_of_right_answers(entry)]
    if output_type not in DEFAULT_METRICS:
        yield f'"{name}" measures perplexity ({output_type}), not right answers; use the divergence benchmark instead'
    elif not usable or metric not in (None, *usable):
        yield (
            f'"{name}" has no metric {metric or "that is a mean of right answers"} '
            f"({'found: ' + ', '.join(usable) if usable else 'such as acc or exact_match'}); choose another task"
        )
    if settings.get("unsafe_code"):
        yield f'"{name}" runs code that the model wrote; it is not run here'
    if settings.get("doc_to_image") or settings.get("doc_to_audio"):
        yield f'"{name}" needs images or sound; choose a text task'


def _is_mean_of_right_answers(metric: Mapping[str, Any]) -> bool:
    known = metric["metric"] in KNOWN_MEANS
    is_mean = metric.get("aggregation", "mean" if known else None) in ("mean", "nanmean")
    return is_mean and bool(metric.get("higher_is_better", known))


def local_data(settings: Config, folder: Path | None) -> list[Path]:
    """The files that a task's `data_files` name, taken from the folder of its YAML."""
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    return [] if folder is None or files is None else [folder / file for file in _flat(files)]


def _flat(files: object) -> list[str]:
    if isinstance(files, Mapping):
        return [name for value in files.values() for name in _flat(value)]
    if isinstance(files, list):
        return [name for value in files for name in _flat(value)]
    # Addresses and patterns are left to the datasets library.
    return [str(files)] if not any(sign in str(files) for sign in ("://", "*")) else []


def with_paths(settings: Config, folder: Path | None) -> dict[str, Any]:
    """The settings with relative data files made absolute; the harness would take them from the current folder."""

    def absolute(files: Any) -> Any:  # noqa: ANN401  # a name, a list or a mapping, as in YAML
        if isinstance(files, Mapping):
            return {split: absolute(value) for split, value in files.items()}
        if isinstance(files, list):
            return [absolute(value) for value in files]
        return str(folder / files) if folder is not None and _flat(files) else files

    arguments = dict(settings.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        arguments["data_files"] = absolute(arguments["data_files"])
        return {**settings, "dataset_kwargs": arguments}
    return dict(settings)


def data_problems(data: Data) -> Iterator[str]:
    """What is wrong with local data that a recipe names."""
    if isinstance(data, str):
        if not Path(data).is_dir():
            yield f"{data} is no folder; name the copy of the data set, or its files by split ({{test: FILE}})"
        return
    for split, name in data.items():
        if not Path(name).is_file():
            yield f"{split}: {name} does not exist; correct the path (it is taken from the current folder)"
    kinds = {Path(name).suffix for name in data.values()}
    if not kinds or len(kinds) > 1 or not kinds <= set(_FORMATS):
        yield (
            f"the files end in {', '.join(sorted(kinds)) or 'nothing'}; name files of one of these kinds: "
            f"{', '.join(_FORMATS)}"
        )


def data_files(data: Data) -> list[Path]:
    """The files of local data, in order."""
    if isinstance(data, str):
        return sorted(path for path in Path(data).rglob("*") if path.is_file())
    return [Path(name) for name in data.values()]


def with_data(name: str, settings: Config, data: Data) -> dict[str, Any]:
    """A task's settings with its data set read from local data.

    Examples come from their own split where it has a file, and otherwise from the other items: the harness leaves out
    the item itself only where it knows that both splits are one.

    Raises:
        InputError: if no file holds the items.
    """
    if isinstance(data, str):
        return {**settings, "dataset_path": str(Path(data).resolve())}
    files = {split: str(Path(file).resolve()) for split, file in data.items()}
    listed = [settings.get(key) for key in ("test_split", "validation_split")]
    items = next((split for split in listed if split in files), None)
    if items is None:
        wanted = next((split for split in listed if split), "test")
        raise InputError(
            f'"{name}" asks the items of the split {wanted}, and data has files of {", ".join(files)}; '
            f"give {{{wanted}: FILE}}"
        )
    examples = [settings.get(key) for key in ("fewshot_split", "training_split")]
    has_own = "samples" in (settings.get("fewshot_config") or {})
    chosen = next((split for split in examples if split in files), None if has_own else items)
    return {
        **{key: value for key, value in settings.items() if key not in _SPLITS},
        "test_split": items,
        "fewshot_split": chosen,
        "dataset_path": _FORMATS[Path(next(iter(data.values()))).suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


def with_options(settings: Config, column: str, number: int) -> dict[str, Any]:
    """A task's settings with only those items that have so many options in a column."""
    first = settings.get("process_docs")

    def kept(documents: Any) -> Any:  # noqa: ANN401  # a split of a data set
        processed = first(documents) if callable(first) else documents
        return processed.filter(lambda document: len(document[column]) == number)

    return {**settings, "process_docs": kept}


def build(name: str, settings: Config) -> Any:  # noqa: ANN401  # the harness's Task, untyped
    """The harness's task with its data.

    Args:
        name: for messages.
        settings: with paths and functions resolved.

    Raises:
        InputError: if its data cannot be had, or its settings or code are at fault.
    """
    import datasets  # noqa: PLC0415  # slow to import, and recipes without lm_eval must load fast
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # see above

    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=False)
    try:
        loaded: Mapping[str, Any] = manager.load([dict(settings)])["tasks"]
    except ImportError as error:
        raise InputError(_needs_package(name, error)) from error
    except Exception as error:  # data sets, hub and task code raise dozens of kinds
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise InputError(
            f'the lm-eval task "{name}" cannot be loaded ({type(error).__name__}: {first_line}); '
            f"{_remedy(name, settings)}"
        ) from error
    if "ifeval" in name:
        _require_sentences(name)
    return next(iter(loaded.values()))


def metric_of(task: Any, wanted: str | None) -> str:  # noqa: ANN401  # the harness's Task, untyped
    """The metric to report: a mean over items that is higher for better answers.

    Raises:
        InputError: if the task has none, or not the one that is wanted.
    """
    directions, aggregations = task.higher_is_better(), task.aggregation()
    usable = [
        str(name)
        for name in directions
        if directions[name]
        and getattr(aggregations.get(name), "__name__", None) in ("mean", "nanmean")
    ]
    if not usable or wanted not in (None, *usable):
        raise InputError(
            f'the lm-eval task "{task.task_name}" has no metric '
            f"{wanted or 'that is a mean of right answers'}"
        )
    return wanted or usable[0]


def _remedy(name: str, settings: Config) -> str:
    """How to provide a task's data."""
    path, subset = settings.get("dataset_path"), settings.get("dataset_name")
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    if files:
        return (
            f"its data is {json.dumps(files)}: correct the files, or the task file in include_path"
        )
    if path is None or Path(path).is_dir():
        return f"its data is {path}: correct the folder that data names, or the task file in include_path"
    return (
        f"its data is the data set {path}{f' ({subset})' if subset else ''}: run the same --check where there is a "
        f"network and bring its HF_HOME folder along; or fetch a copy (hf download --repo-type dataset {path} "
        f"--local-dir FOLDER) and give the benchmark data: {{{name}: FOLDER}}; or write a task file of this name "
        "with local data_files and name its folder in include_path"
    )


def _require_sentences(name: str) -> None:
    """IFEval counts sentences with data of nltk that the harness tries to fetch, and goes on without."""
    import nltk  # type: ignore[import-untyped]  # noqa: PLC0415  # an extra of the harness's

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise InputError(
            f'the lm-eval task "{name}" needs nltk\'s punkt_tab, which is not on this machine: where there is a '
            "network, run `python -m nltk.downloader punkt_tab` and bring its nltk_data folder along (NLTK_DATA)"
        ) from error


def _needs_package(name: str, error: ImportError) -> str:
    text = (error.name or str(error)).replace("-", "_")
    package = next((known for known in EXTRAS if known in text), text.partition(".")[0])
    extra = EXTRAS.get(package)
    wanted = f'pip install "lm_eval[{extra}]"' if extra else f"pip install {package}"
    return (
        f'the lm-eval task "{name}" needs the package {package}, which is not installed; {wanted}'
    )


def without_paths(settings: Config, folder: Path | None) -> str:
    """The settings as text with the folder cut out of what the harness makes absolute (`!function`)."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return text.replace(f"{folder}/", "") if folder is not None else text


def texts(task: Any, limit: int | None) -> Iterator[str]:  # noqa: ANN401  # the harness's Task, untyped
    """Every item as it is asked, and every text field of it, since a template may wrap the question."""
    for _, document in task.doc_iterator(limit=limit):
        question = task.doc_to_text(document)
        if isinstance(question, str):
            yield question
        yield from (value for value in document.values() if isinstance(value, str))
