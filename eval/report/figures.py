"""Numbers of results.json on a page, each marked with the field it comes from, so that a test can hold them equal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from common.webpage import Markup
from eval.items import MODELS

NOTHING = Markup("-")
TITLES = tuple(model.capitalize() for model in MODELS)
# Longer texts are cut on the page; items.jsonl and the recipe hold them whole.
MAX_TEXT: Final = 300
# What a row of a list is called by: its name, or else its category, or else its place.
LABELS = ("name", "category")


def figure(path: str, value: float | None, form: str = ".3f") -> Markup:
    """One number; a dash where nothing was measured.

    Args:
        path: the field of results.json, e.g. `benchmarks[addition].healed.value`.
        value: what stands there.
        form: as for `format`; ending in %, the number is shown in percent.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:{form}}".replace("%", " %")
    return Markup(f'<data value="{value!r}" data-path="{escape(path)}">{text}</data>')


def estimate(path: str, found: Mapping[str, float] | None, form: str = ".3f") -> Markup:
    """An estimate with its interval: value [low, high]."""
    if found is None:
        return NOTHING
    value, low, high = (
        figure(f"{path}.{key}", found[key], form) for key in ("value", "low", "high")
    )
    return Markup(f"{value} <small>[{low}, {high}]</small>")


def joined(parts: Sequence[str], between: str = ", ") -> Markup:
    """Texts and markup in a row, what is no markup escaped."""
    return Markup(escape(between).join(p if isinstance(p, Markup) else escape(p) for p in parts))


def quoted(text: str) -> Markup:
    """A text in quotation marks, cut where it is long."""
    cut = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    return Markup(f"<q>{escape(cut)}</q>")


def every_number(data: object, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of results.json with their paths, in its order."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from every_number(value, f"{path}.{key}".lstrip("."))
    elif isinstance(data, list):
        for index, row in enumerate(data):
            yield from every_number(row, f"{path}[{_label(row, index)}]")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, data


def _label(row: Any, index: int) -> str:  # noqa: ANN401  # any JSON value
    names = [str(row[key]) for key in LABELS if key in row] if isinstance(row, Mapping) else []
    return next(iter(names), str(index))
