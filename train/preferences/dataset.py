"""Pairs that exist: a local file or a hub data set in one of the usual formats.

Read: `prompt`, `chosen` and `rejected` as texts or as lists of messages; `chosen` and `rejected` as whole
conversations, with or without a prompt beside them (orpo-dpo-mix-40k has the prompt as a text and the answers as
conversations, on which trl fails). And instruction data: one answer or one conversation, and nothing to reject.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common import artifacts
from common.errors import InputError
from common.overlap import normalize
from common.prompts import describe, load_rows
from common.recipe import Columns, PreferenceDataset
from train.preferences.filters import Pair

Turn = tuple[str, str]


class Unpaired(ValueError):
    """Two conversations that do not differ in an answer to the same prompt: such rows are counted, not trained on."""


def check(source: PreferenceDataset, key: str) -> list[str]:
    """Problems of the file or data set, in words that begin with its dotted key."""
    try:
        load(source)
    except InputError as error:
        return [f"{key}: {error}"]
    return []


def inputs(source: PreferenceDataset, excluded: frozenset[str]) -> dict[str, object]:
    """What the pairs depend on: their content, and which of them are items of a benchmark."""
    pairs, _ = load(source)
    questions = {normalize(pair.question) for pair in pairs}
    return {
        "name": source.name,
        "weight": source.weight,
        "cap": source.cap,
        "pairs": artifacts.hash_data([pair.as_row() for pair in pairs]),
        "excluded": sorted(questions & excluded),
    }


def prompts_used(source: PreferenceDataset) -> list[str]:  # overlaps are dropped pair by pair
    """No prompt that may not overlap: `filter_pairs` drops the pairs that share an item with a benchmark."""
    return []


def load(source: PreferenceDataset) -> tuple[list[Pair], dict[str, int]]:
    """Load the pairs, in order, and count rows of two conversations that part before an answer.

    Raises:
        InputError: if the source is unusable, or a row holds no pair.
    """
    columns = source.columns or Columns()
    name = describe(source)
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for number, row in enumerate(load_rows(source), start=1):
        try:
            pairs.append(_pair_of(row, columns, name, source.domain))
        except Unpaired:
            counts["two prompts"] += 1
        except ValueError as error:
            raise InputError(f"{name}, row {number}: {error}") from error
    if not pairs:
        raise InputError(
            f"{name} holds no preference pairs"
            + (
                ": chosen and rejected do not differ in an answer to the same prompt"
                if counts
                else ""
            )
        )
    return pairs, dict(counts)


def _pair_of(row: Mapping[str, Any], columns: Columns, name: str, domain: str | None) -> Pair:
    named = [column for column in (columns.chosen, columns.rejected) if column is not None]
    missing = [column for column in named if row.get(column) is None]
    if missing:
        raise ValueError(
            f"no column {' and '.join(map(repr, missing))} (found: {', '.join(row)}); name the columns in "
            "train.preferences[..].columns"
        )
    prompt = _prompt_turns(row, columns)
    chosen, *others = (_turns(row[column]) for column in named)
    if any(answer[0][0] != "assistant" for answer in (chosen, *others)):
        # Whole conversations: what they share is the prompt, and a text prompt beside them repeats part of it.
        prompt, chosen, *others = _split(chosen, *others) if others else _last_answer(chosen)
    if not prompt or prompt[-1][0] != "user":
        raise ValueError("there is no user turn before the answers; a pair needs a prompt")
    # Only the first differing answer is compared: what follows it would be user turns, which nobody should learn.
    rejected = others[0][0][1] if others else ""
    return Pair(tuple(prompt), chosen[0][1], rejected, name, _domain(row, columns) or domain)


def _last_answer(conversation: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    if conversation[-1][0] != "assistant":
        raise ValueError("the conversation does not end in an answer")
    return conversation[:-1], conversation[-1:]


def _domain(row: Mapping[str, Any], columns: Columns) -> str | None:
    if columns.domain is None:
        return None
    value = row.get(columns.domain)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"column {columns.domain!r} holds no domain (found: {', '.join(row)}); name a column that does in "
            "train.preferences[..].columns.domain"
        )
    return value


def _prompt_turns(row: Mapping[str, Any], columns: Columns) -> list[Turn]:
    value = row.get(columns.prompt) if columns.prompt is not None else None
    if value is None:
        return []
    return [("user", value)] if isinstance(value, str) else _turns(value)


def _turns(value: object) -> list[Turn]:
    if isinstance(value, str):
        return [("assistant", value)]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"an answer is {type(value).__name__}, not text or a list of messages")
    turns = []
    for message in value:
        role, content = _role_and_content(message)
        turns.append((role, content))
    return turns


def _role_and_content(message: object) -> Turn:
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        if role in ("system", "user", "assistant") and isinstance(content, str):
            return str(role), content
    raise ValueError(
        f"a message is {str(message)[:80]!r}, not {{role: system|user|assistant, content: text}}"
    )


def _split(chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        common -= (
            1  # identical conversations: the last answer is kept, and the filter drops the pair
        )
    if (
        common in (len(chosen), len(rejected))
        or chosen[common][0] != "assistant"
        or rejected[common][0] != "assistant"
    ):
        raise Unpaired
    return chosen[:common], chosen[common:], rejected[common:]
