"""Questions with answers that are right or wrong, as the recipe names them for quick evaluations."""

from dataclasses import dataclass
from typing import Any

from common.errors import InputError
from common.overlap import normalize
from common.prompts import describe, load_prompts, load_rows
from common.recipe import Questions

# Where a recipe names no column of domains.
ONE_DOMAIN = "questions"
PUNCTUATION = ".,:;!?\"'()[]{}*$`"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: the user's turn.
        answer: the right answer; None: whatever the original model answers.
        domain: what it asks about.
    """

    prompt: str
    answer: str | None
    domain: str


def load_questions(source: Questions) -> list[Question]:
    """Load the questions of a source, in order.

    Raises:
        InputError: as `load_prompts`; if a row has no prompt, or no answer or domain where a column names one.
    """
    rows, prompts = load_rows(source), load_prompts(source)
    if len(rows) != len(prompts):
        raise InputError(
            f"{describe(source)} has {len(rows) - len(prompts)} rows without a prompt; a question needs one"
        )
    return [
        Question(
            prompt,
            _entry(row, source.answer, source) if source.answer is not None else None,
            _entry(row, source.domain, source) if source.domain is not None else ONE_DOMAIN,
        )
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def check_questions(source: Questions, key: str) -> list[str]:
    """What is wrong with a source, beginning with its dotted key in the recipe."""
    try:
        load_questions(source)
    except InputError as error:
        return [f"{key}: {error}"]
    return []


def is_right(reply: str, answer: str) -> bool:
    """Whether a reply holds the right answer, word by word in a row, whatever case and punctuation are.

    For short answers: what stands around them is not judged.
    """
    return f" {_words(answer)} " in f" {_words(reply)} "


def _entry(row: dict[str, Any], column: str, source: Questions) -> str:
    value = row.get(column)
    if not isinstance(value, str | int | float) or not _words(str(value)):
        raise InputError(
            f"{describe(source)}: column {column!r} holds {value!r} (columns: {', '.join(map(str, row))}), not words "
            "or a number; name another column or correct the row"
        )
    return str(value)


def _words(text: str) -> str:
    return " ".join(
        word for word in (w.strip(PUNCTUATION) for w in normalize(text).split()) if word
    )
