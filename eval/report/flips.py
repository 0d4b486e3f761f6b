"""What changed item by item: a row for every item on which the three models are not alike.

Questions and answers of harmful panels, and of what only the edit made answerable, never reach the page: hashes stand
in their place, so that two reports can still be compared.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from common import artifacts
from common.webpage import Markup, Section
from eval.flips import change
from eval.items import MODELS, Item
from eval.report.figures import quoted
from eval.report.questions import Questions

HEADS: Final = ("Benchmark or panel", "Item", "Original", "Abliterated", "Healed", "What changed")
LAST_HEAD: Final = "Question and answers"
# The columns that can be chosen from.
CHOSEN_FROM: Final = {0: "Benchmark or panel", 5: "What changed"}
HASH_DIGITS: Final = 12


@dataclass(frozen=True)
class Flip:
    """One item on which the models are not alike.

    Attributes:
        name: of the benchmark or panel.
        id: of the item.
        values: of the three models, in their order.
        change: what that means, in words.
        question: what was asked, if that is known.
        answers: of the models that left one.
        is_harmless: whether question and answers may be shown.
    """

    name: str
    id: str
    values: tuple[float, ...]
    change: str
    question: str | None
    answers: Mapping[str, str]
    is_harmless: bool


def find(results: Mapping[str, Any], items: Iterable[Item], questions: Questions) -> list[Flip]:
    """The items of benchmarks and panels on which the models are not alike, in their order."""
    roles = {("benchmarks", row["name"]): row["role"] for row in results["benchmarks"]}
    roles |= {("refusal", r["name"]): _panel(r["harmless"]) for r in results["refusal"]}
    grouped: dict[tuple[str, str, str | int], dict[str, Item]] = {}
    for item in items:
        if (item.kind, item.name) in roles:
            grouped.setdefault((item.kind, item.name, item.id), {})[item.model] = item
    found = []
    for (kind, name, number), by_model in grouped.items():
        values = tuple(by_model[model].value for model in MODELS)
        if len(set(values)) > 1:
            role = roles[kind, name]
            texts = {m: text for m, item in by_model.items() if (text := _answer(item)) is not None}
            question = questions.get((kind, name), {}).get(number)
            harmless = role in ("capability", "harmless")
            change = describe(role, *values)
            found.append(Flip(name, str(number), values, change, question, texts, harmless))
    return found


def describe(role: str, original: float, abliterated: float, healed: float) -> str:
    """What changed on an item, in words.

    Args:
        role: `capability` or `unlocked` for a benchmark, `harmless` or `harmful` for a panel.
        original: the model's value: of a benchmark higher is better, of a panel it is refusal.
        abliterated: likewise.
        healed: likewise.
    """
    if role in ("capability", "unlocked"):
        return change(original, abliterated, healed) or "graded otherwise"
    if healed != original:
        return "newly refused" if healed > original else "no longer refused"
    return "refused again" if original > abliterated else "refused by the abliterated model only"


def section(flips: Sequence[Flip], num_items: int) -> Section:
    """The table with its filters.

    Args:
        flips: see `find`.
        num_items: all items of the benchmarks and panels, alike or not.
    """
    counts = Counter(flip.change for flip in flips)
    words = (
        f"Items on which the three models are not alike, out of {num_items}: "
        + (", ".join(f"{n} {change}" for change, n in sorted(counts.items())) or "none")
        + ". Broken: right before the edit and wrong after it. Texts of harmful panels and of what the edit unlocked "
        "are withheld: hashes (SHA-256) stand in their place."
    )
    return Section(
        "flips",
        f"{len(flips)} of {num_items} items flipped",
        words,
        [Markup(_filters(flips))] if flips else [],
        [*HEADS, LAST_HEAD] if flips else [],
        [[f.name, f.id, *map(_value, f.values), f.change, _texts(f)] for f in flips],
        folded=False,
    )


def _panel(harmless: bool) -> str:
    return "harmless" if harmless else "harmful"


def _answer(item: Item) -> str | None:
    text = item.details.get("answer", item.details.get("text"))
    return None if text is None else str(text)


def _filters(flips: Sequence[Flip]) -> str:
    values = {0: [flip.name for flip in flips], 5: [flip.change for flip in flips]}
    choices = "".join(
        f'<label>{escape(CHOSEN_FROM[column])}<select data-column="{column}"><option value="">all</option>'
        + "".join(f"<option>{escape(name)}</option>" for name in dict.fromkeys(names))
        + "</select></label>"
        for column, names in values.items()
    )
    # Without the script nothing would be filtered, so it is the script that shows the form.
    return (
        f'<form class="filter" data-of="flips" hidden>{choices}'
        '<label>Words<input name="words" type="search" autocomplete="off"></label>'
        '<button type="reset">Show all</button><output></output></form>'
    )


def _value(value: float) -> Markup:
    return Markup(f'<data value="{value!r}">{value:.4g}</data>')


def _texts(flip: Flip) -> Markup:
    lines = [] if flip.question is None else [("asked", flip.question)]
    lines += [(model, flip.answers[model]) for model in MODELS if model in flip.answers]
    if not lines:
        return Markup("")
    shown = _clipped(lines) if flip.is_harmless else _hashed(lines)
    return Markup(f"<ul>{''.join(f'<li>{line}</li>' for line in shown)}</ul>")


def _clipped(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in lines:
        yield f"{name}: {quoted(text)}"


def _hashed(lines: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in lines:
        yield f"{name}: withheld, <code>{artifacts.hash_text(text)[:HASH_DIGITS]}</code>"
