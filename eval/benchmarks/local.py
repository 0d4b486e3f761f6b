"""Questions of one's own from a file: options that are scored, or an answer that the model writes.

They become a task of lm-evaluation-harness in memory, so that they are asked, cached and compared as any other. An
option is scored by its text behind the question alone: where letters are the options, the question has to list what
they stand for. A written answer is right as `common.questions.is_right` says.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from common import artifacts
from common.errors import InputError
from common.prompts import describe, load_rows
from common.questions import is_right
from common.recipe import LocalQuestions, Recipe
from eval import task_index
from eval.benchmarks import place
from eval.loaded_task import LoadedTask, load_task

LONGEST_ANSWER = 256
# In an error: the rest would say the same.
MOST_PROBLEMS = 5


def names(spec: LocalQuestions) -> list[str]:
    """The name that the recipe gives."""
    return [spec.task]


def check(spec: LocalQuestions, recipe: Recipe) -> list[str]:
    """A file that is missing, lacks a column, or holds rows without a question or a right answer."""
    try:
        _documents(spec)
    except InputError as error:
        return [f"{place(spec, recipe)}: {error}"]
    return []


def inputs(spec: LocalQuestions) -> dict[str, object]:
    """What is asked, and how."""
    return {
        "questions": artifacts.hash_data(_documents(spec)),
        "settings": spec.model_dump(mode="json", include={"task", "max_new_tokens", "role"}),
    }


def texts(spec: LocalQuestions) -> dict[str, list[str]]:
    """The questions."""
    return {spec.task: [document["question"] for document in _documents(spec)]}


def load(
    spec: LocalQuestions, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> list[LoadedTask]:
    """The questions as a task of the harness, their requests rendered with the chat template."""
    task = task_index.build(spec.task, _task(spec, _documents(spec)))
    return [
        load_task(task, tokenizer, batch_size=batch_size, metric="acc", limit=None, role=spec.role)
    ]


def option_number(label: object, options: list[str]) -> int:
    """Which option a label means: its number from 0, its letter from A, or its text.

    Args:
        label: as the file has it; in CSV a number is text, too.
        options: their texts.

    Raises:
        ValueError: if it means none of them, or different ones read in different ways.
    """
    text = str(label).strip()
    meant = {number for number, option in enumerate(options) if option.strip() == text}
    if text.isdecimal() and int(text) < len(options):
        # A number in JSON is no text.
        meant = {int(text)} if not isinstance(label, str) else meant | {int(text)}
    if len(text) == 1 and text.isascii() and text.isalpha():
        number = ord(text.upper()) - ord("A")
        meant |= {number} if number < len(options) else set()
    if isinstance(label, bool) or len(meant) != 1:
        ways = "means several options, read as number, letter or text" if meant else "is no option"
        raise ValueError(f"label {text!r} {ways} (of {len(options)})")
    return meant.pop()


def _task(spec: LocalQuestions, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a task, as its YAML file would hold them."""
    import datasets  # noqa: PLC0415  # slow to import, and a check must be a blink

    def split(**_: object) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(documents)}

    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    common = {
        "task": spec.task,
        "custom_dataset": split,
        "test_split": "test",
        "doc_to_text": "question",
        "metric_list": [metric],
    }
    if spec.choices is not None:
        return common | {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
        }
    return common | {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "process_results": _judge,
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": spec.max_new_tokens or LONGEST_ANSWER,
        },
    }


def _judge(document: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    return {"acc": float(is_right(answers[0], document["answer"]))}


def _documents(spec: LocalQuestions) -> list[dict[str, Any]]:
    """The rows in the columns of the task.

    Raises:
        InputError: naming the first rows that are at fault, counted from 1.
    """
    rows = load_rows(spec)
    if not rows:
        raise InputError(f"{describe(spec)} holds no question; add some, or widen the slice")
    missing = [column for column in _columns(spec) if column not in rows[0]]
    if missing:
        raise InputError(
            f"{describe(spec)} has no column {', '.join(map(repr, missing))} (found: {', '.join(map(str, rows[0]))}); "
            "correct the names"
        )
    documents, problems = [], []
    for number, row in enumerate(rows, start=1):
        try:
            documents.append(_document(spec, row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = "; ".join(problems[:MOST_PROBLEMS])
        more = len(problems) - MOST_PROBLEMS
        raise InputError(
            f"{describe(spec)}: {shown}{f' (and {more} more)' if more > 0 else ''}; correct the rows"
        )
    return documents


def _columns(spec: LocalQuestions) -> list[str]:
    choices = (spec.choices,) if isinstance(spec.choices, str) else spec.choices or ()
    named = (spec.question, spec.answer, *choices, spec.label, spec.cluster)
    return [column for column in named if column is not None]


def _document(spec: LocalQuestions, row: Mapping[str, Any]) -> dict[str, Any]:
    cluster = None if spec.cluster is None else _text(row, spec.cluster)
    found: dict[str, Any] = {"question": _text(row, spec.question), "cluster": cluster}
    if spec.answer is not None:
        answer = _text(row, spec.answer)
        # Punctuation alone is nothing that an answer could be held against.
        if not any(map(str.isalnum, answer)):
            raise ValueError(f"the answer {answer!r} has neither letter nor digit")
        return found | {"answer": answer}
    options = _options(spec, row)
    return found | {"choices": options, "label": option_number(row.get(str(spec.label)), options)}


def _options(spec: LocalQuestions, row: Mapping[str, Any]) -> list[str]:
    if not isinstance(spec.choices, str):
        return [_text(row, column) for column in spec.choices or ()]
    listed = row.get(spec.choices)
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError(
            f"column {spec.choices!r} should hold a list of two or more options, found {repr(listed)[:40]}"
        )
    if not all(isinstance(option, str | int | float) and str(option).strip() for option in listed):
        raise ValueError(f"column {spec.choices!r} holds an option that is no text")
    return [str(option) for option in listed]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not usable or not str(value).strip():
        raise ValueError(
            f"column {column!r} should hold words or a number, found {repr(value)[:40]}"
        )
    return str(value)
