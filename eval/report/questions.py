"""What the items of a benchmark ask, for the table of flips."""

from collections.abc import Iterable, Mapping
from typing import Any

from eval.benchmarks import Loaded

# Wordings by the kind and name of a row, and by the number of an item.
Questions = Mapping[tuple[str, str], Mapping[str | int, str]]


def of(benchmarks: Iterable[Loaded]) -> Questions:
    """The wordings of tasks of the harness, which hold `documents`, and of panels, which hold `prompts`."""
    return {(loaded.row.kind, loaded.row.name): _of_one(loaded) for loaded in benchmarks}


def _of_one(loaded: Any) -> dict[str | int, str]:  # noqa: ANN401  # benchmarks have classes of their own
    if hasattr(loaded, "documents"):
        texts = {n: loaded.task.doc_to_text(document) for n, document in loaded.documents.items()}
    else:
        texts = dict(enumerate(getattr(loaded, "prompts", ())))
    # Some tasks of the harness put nothing but options; their wording is a number.
    return {number: text for number, text in texts.items() if isinstance(text, str)}
