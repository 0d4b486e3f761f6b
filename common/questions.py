"""Questions with answers that are right or wrong, for pairs and for quick evaluations."""

import re
from dataclasses import dataclass
from typing import Any

from common.errors import InputError
from common.overlap import normalize
from common.prompts import describe, load_prompts, load_rows
from common.recipe import Questions, TaggedPrompts

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: the user's turn.
        answer: the right one, if it is known.
        domain: what it asks about, if that is named.
    """

    prompt: str
    answer: str | None = None
    domain: str | None = None


def load_questions(source: TaggedPrompts) -> list[Question]:
    """Load the questions of a source, in order.

    Raises:
        InputError: as `load_prompts`; if a row has no prompt, or no answer or domain where a column names one.
    """
    prompts = load_prompts(source)
    known = source.answer if isinstance(source, Questions) else None
    if known is None and source.domain is None:
        return [Question(prompt) for prompt in prompts]
    rows = load_rows(source)
    if len(rows) != len(prompts):
        raise InputError(
            f"{describe(source)} has {len(rows) - len(prompts)} rows without a prompt, so that answers and "
            "domains cannot be told apart from theirs; delete those rows"
        )
    return [
        Question(
            prompt,
            _entry(row, known, "answer", source),
            _entry(row, source.domain, "domain", source),
        )
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def check_questions(source: TaggedPrompts, key: str) -> list[str]:
    """What is wrong with a source, beginning with its dotted key in the recipe."""
    try:
        load_questions(source)
    except InputError as error:
        return [f"{key}: {error}"]
    return []


def is_right(text: str, known: str) -> bool:
    """Whether an answer says what is known.

    Both are compared without case, spacing and punctuation at the end. A number is right if the last number in
    the text has its value ("25 plus 16 is 41." for 41); anything else if it is the whole text or the whole last
    sentence, or if that sentence ends in it as a word ("The capital is Rome." for Rome).
    """
    answer = normalize(known)
    if _NUMBER.fullmatch(answer):
        numbers = _NUMBER.findall(text)
        return bool(numbers) and _value(numbers[-1]) == _value(answer)
    last = normalize(_SENTENCE_END.split(text.strip())[-1])
    return answer in (normalize(text), last) or last.endswith(f" {answer}")


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _entry(row: dict[str, Any], column: str | None, key: str, source: TaggedPrompts) -> str | None:
    """What stands in a column; None where the recipe names none."""
    if column is None:
        return None
    value = row.get(column)
    usable = isinstance(value, str | int | float) and not isinstance(value, bool)
    # Punctuation alone is nothing that an answer could be held against.
    if not usable or not any(map(str.isalnum, str(value))):
        found = repr(value)[:40] if column in row else f"only {', '.join(map(str, row))}"
        raise InputError(
            f"{describe(source)}: column {column!r} should hold words or a number in every row, found {found}; "
            f"correct the file, or `{key}`"
        )
    return str(value)
