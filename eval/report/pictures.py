"""The pictures of an evaluation: refusal against capability, intervals by benchmark, divergence by position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from common.charts import BOTTOM, RIGHT, TOP, WIDTH, Axis, Chart, axis_over, svg, text_at
from common.statistics import Interval
from eval.items import MODELS

Row = Mapping[str, Any]

# One colour for each model, on all pictures.
STYLES: Final = {"original": "c2", "abliterated": "c1", "healed": "c0"}
# Shapes around 0, so that colour is not all that tells the models apart.
SHAPES: Final = {
    "original": "M-5-5H5V5H-5Z",
    "abliterated": "M0-6L6 5H-6Z",
    "healed": "M0-6L6 0L0 6L-6 0Z",
}
# Room for the names of benchmarks, and the most that fits there.
NAMES: Final = 200
MAX_NAME: Final = 30


def mean_interval_of(rows: Sequence[Mapping[str, float]]) -> Interval:
    """The mean of independent estimates, with an interval made of theirs.

    The distances from the estimates to their ends are added as squares (MOVER: Zou and Donner 2008, Statistics in
    Medicine 27, 1693), which keeps the intervals' asymmetry near 0 and 1.

    Args:
        rows: `value`, `low`, `high` of each; at least one.
    """
    value = sum(row["value"] for row in rows) / len(rows)
    below = math.sqrt(sum((row["value"] - row["low"]) ** 2 for row in rows)) / len(rows)
    above = math.sqrt(sum((row["high"] - row["value"]) ** 2 for row in rows)) / len(rows)
    return Interval(value, value - below, value + above)


@dataclass(frozen=True)
class Place:
    """Where a model stands.

    Attributes:
        model: which of the three.
        harmless: whether refusals of harmless prompts are meant.
        capability: mean rate over the benchmarks.
        refusal: mean rate over the panels.
    """

    model: str
    harmless: bool
    capability: Interval
    refusal: Interval


def places(results: Row) -> list[Place]:
    """Where the models stand on both kinds of panels, as far as they were measured."""
    benchmarks = [row for row in results["benchmarks"] if row["role"] == "capability"]
    found = []
    for harmless in (False, True):
        panels = [row for row in results["refusal"] if row["harmless"] == harmless]
        if not panels or not benchmarks:
            continue
        for model in MODELS:
            capability = mean_interval_of([row[model] for row in benchmarks])
            refusal = mean_interval_of([row[model] for row in panels])
            found.append(Place(model, harmless, capability, refusal))
    return found


def tradeoff(shown: Sequence[Place]) -> str:
    """Refusal against capability."""
    across = [v for p in shown for v in (p.capability.low, p.capability.high)]
    room = (max(across) - min(across)) * 0.06 or 0.01
    chart = Chart(
        "Refusal against capability of the three models",
        axis_over(
            "Capability (mean rate over the benchmarks)",
            [min(across) - room, min(max(across) + room, 1 + room)],
        ),
        Axis("Share refused", -0.05, 1.05),
        height=320,
    )
    for place in shown:
        x, y, style = place.capability, place.refusal, STYLES[place.model]
        right, up = chart.right(x.value), chart.up(y.value)
        whiskers = (
            f"M{chart.right(x.low):.1f} {up:.1f}H{chart.right(x.high):.1f}"
            f"M{right:.1f} {chart.up(y.low):.1f}V{chart.up(y.high):.1f}"
        )
        chart.add(f'<path class="line {style}" d="{whiskers}"/>')
        kind = "harmless" if place.harmless else "harmful"
        tip = f"{place.model}: capability {_words(x)}; refuses {_words(y)} of the {kind} prompts"
        chart.add(mark(right, up, place.model, tip, hollow=place.harmless))
    return f"{chart.svg()}{key(hollow=any(place.harmless for place in shown))}"


def mark(x: float, y: float, model: str, tip: str, *, hollow: bool = False) -> str:
    """A model's shape at a point."""
    outline = f" scale({1.5 if hollow else 1})"
    return (
        f'<path class="mark {STYLES[model]}{" hollow" if hollow else ""}" '
        f'transform="translate({x:.1f} {y:.1f}){outline}" d="{SHAPES[model]}"><title>{escape(tip)}</title></path>'
    )


def key(models: Sequence[str] = MODELS, *, hollow: bool = False) -> str:
    """The models' names beside their shapes."""
    entries = [(model, STYLES[model], SHAPES[model]) for model in models]
    items = "".join(
        f'<li><svg viewBox="-7 -7 14 14" aria-hidden="true"><path class="mark {style}" d="{shape}"/></svg>'
        f"{escape(name)}</li>"
        for name, style, shape in entries
    )
    words = "<li>filled: harmful prompts; outlined: harmless ones</li>" if hollow else ""
    return f'<ul class="legend">{items}{words}</ul>'


def forest(benchmarks: Sequence[Row], margin: float) -> str:
    """The differences of every benchmark with their intervals: one row each."""
    rows = [(row, _differences(row)) for row in benchmarks]
    ends = [v for _, shown in rows for d in shown.values() for v in (d["low"], d["high"])]
    axis = axis_over("Difference in the rate", [*ends, -1.3 * margin], zero=True)
    step, parts = 34.0, []
    bottom = TOP + step * len(rows)

    def right(value: float) -> float:
        return NAMES + axis.place(value) * (WIDTH - NAMES - RIGHT)

    for value in axis.ticks():
        style = "tick" if value == 0 else "grid"
        parts.append(f'<path class="{style}" d="M{right(value):.1f} {TOP}V{bottom}"/>')
        parts.append(text_at(right(value), bottom + 16, f"{value:.3g}", "middle"))
    parts.append(f'<path class="limit" d="M{right(-margin):.1f} {TOP - 6}V{bottom}"/>')
    parts.append(text_at(right(-margin), TOP - 10, f"margin -{margin:g}", "middle"))
    for index, (row, shown) in enumerate(rows):
        middle = TOP + (index + 0.5) * step
        parts.append(text_at(NAMES - 10, middle + 4, _short(row["name"]), "end", "name"))
        for place, (model, difference) in enumerate(shown.items()):
            up = middle + (place - (len(shown) - 1) / 2) * 14
            low, high = right(difference["low"]), right(difference["high"])
            tip = f"{row['name']}, {model}: {_words(Interval(**_ends(difference)))}"
            parts.append(f'<path class="line {STYLES[model]}" d="M{low:.1f} {up:.1f}H{high:.1f}"/>')
            parts.append(mark(right(difference["value"]), up, model, tip))
    parts.append(text_at((NAMES + WIDTH - RIGHT) / 2, bottom + 36, axis.label, "middle", "name"))
    picture = svg("Differences by benchmark, with 95 % intervals", bottom + BOTTOM, parts)
    return f"{picture}{key(('abliterated', 'healed'))}"


def by_position(row: Row) -> str:
    """Mean divergence in stretches of the answers' tokens, each twice as long as the one before."""
    bins = row["healed"]["by_position"]
    names = tuple(stretch(found) for found in bins)
    models = ("abliterated", "healed")
    values = {model: [found["mean_kl"] for found in row[model]["by_position"]] for model in models}
    everything = [value for found in values.values() for value in found]
    chart = Chart(
        f"Divergence by token of the answer: {row['name']}",
        Axis("Token of the answer", -0.3, len(names) - 0.7, names=names),
        axis_over("KL (nats per token)", everything, logarithmic=True),
        height=240,
    )
    for model, found in values.items():
        chart.line(list(enumerate(found)), STYLES[model])
        for index, value in enumerate(found):
            tip = f"{model}, token {names[index]}: {value:.4g}"
            chart.add(mark(chart.right(index), chart.up(value), model, tip))
    return f"<h3>{escape(row['name'])}</h3>{chart.svg()}{key(models)}"


def stretch(found: Row) -> str:
    """The tokens of one bin, counted from 1: `3` or `5-8`."""
    first, last = found["from"] + 1, found["to"]
    return f"{first}" if first >= last else f"{first}-{last}"


def _differences(row: Row) -> dict[str, Row]:
    """What is held against the reference: the original; the abliterated model for what only the edit unlocked."""
    if row["role"] == "unlocked":
        return {"healed": row["gain"]}
    return {"abliterated": row["damage"], "healed": row["gap"]}


def _ends(difference: Row) -> dict[str, float]:
    return {name: difference[name] for name in ("value", "low", "high")}


def _words(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
