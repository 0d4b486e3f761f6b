"""The curves of training, from the log that stage two leaves in its folder."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from common import artifacts
from common.charts import Axis, Chart, axis_over, colour, legend
from common.webpage import Section
from eval.report.pictures import STYLES

# The table of a long training shows this many of its steps, evenly chosen.
MAX_ROWS = 200
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """Curves that share a picture.

    Attributes:
        title: above the picture.
        prefixes: a key of the log belongs here if it is one of them, or lies below one that ends in a slash.
        unit: of the upright axis.
        logarithmic: whether that axis shows powers of ten.
        zero: whether it begins at 0.
        band: keys of the lower and the upper end of an interval around the curve.
    """

    title: str
    prefixes: tuple[str, ...]
    unit: str
    logarithmic: bool = False
    zero: bool = True
    band: tuple[str, str] | None = None

    def keys(self, entries: Sequence[Entry]) -> list[str]:
        """What of the log belongs here, in the order of its first mention."""
        known = dict.fromkeys(key for entry in entries for key in entry)
        return [
            key
            for key in known
            if any(key == p or (p.endswith("/") and key.startswith(p)) for p in self.prefixes)
        ]


STEPS = (
    Panel("Loss, all parts together", ("loss",), "Loss"),
    Panel(
        "Margin of the chosen answers over the rejected ones",
        ("rewards/margins",),
        "Implicit reward",
        zero=True,
    ),
    Panel("Distance from the anchors' teachers", ("anchors/",), "Divergence (nats)"),
    Panel(
        "Distance from the teachers' residual streams",
        ("residual/",),
        "Share of the stream's square",
    ),
    Panel(
        "What training wrote along the removed direction",
        ("ablation/residual",),
        "Share of the original's",
        logarithmic=True,
    ),
)
QUICK = (
    Panel(
        "Share of the damage won back, with its interval",
        ("quick/recovery",),
        "Recovery",
        band=("quick/recovery_low", "quick/recovery_high"),
    ),
    Panel("Refusals while training", ("quick/refusal", "quick/over_refusal"), "Share refused"),
    Panel("Divergence from the original while training", ("quick/kl",), "Nats per token"),
)


def sections(folder: Path) -> Iterator[Section]:
    """The curves of a training; none where its folder holds no log.

    Args:
        folder: of the finished stage `train`.
    """
    path = folder / "log.jsonl"
    entries = artifacts.read_jsonl(path) if path.is_file() else []
    steps = [entry for entry in entries if "loss" in entry]
    if steps:
        yield _section(
            "training",
            f"Training took {steps[-1]['step']} steps",
            "The margin should rise and then level off; the anchors' divergences should fall. What is written along "
            "the removed direction stays at rounding where training was kept from it.",
            steps,
            STEPS,
        )
    quick = [entry for entry in entries if "quick/recovery" in entry]
    if quick:
        yield _section(
            "healing",
            f"Healing was looked at {len(quick)} times while it trained",
            "Quick evaluations on prompts that no benchmark measures; they chose the weights that were kept."
            + _kept(folder),
            quick,
            QUICK,
        )


def _kept(folder: Path) -> str:
    path = folder / "summary.json"
    stopping = (
        json.loads(path.read_text(encoding="utf-8")).get("stopping") if path.is_file() else None
    )
    if not stopping or not stopping.get("best"):
        return ""
    return (
        f" Kept: step {stopping['best']['step']:g}; training ended because: {stopping['reason']}."
    )


def _section(
    key: str, heading: str, words: str, entries: Sequence[Entry], panels: Sequence[Panel]
) -> Section:
    drawn = [panel for panel in panels if panel.keys(entries)]
    keys = [key for panel in drawn for key in (*panel.keys(entries), *(panel.band or ()))]
    rows = [[entry["step"], *(entry.get(key) for key in keys)] for entry in _thinned(entries)]
    pictures = [_picture(panel, entries) for panel in drawn]
    return Section(key, heading, words, pictures, ["step", *keys], rows)


def _picture(panel: Panel, entries: Sequence[Entry]) -> str:
    keys = panel.keys(entries)
    curves = {
        key: [(float(entry["step"]), _value(entry, key)) for entry in entries]
        for key in (*keys, *(panel.band or ()))
    }
    steps = [float(entry["step"]) for entry in entries]
    values = [value for points in curves.values() for _, value in points]
    zero = panel.zero and not panel.logarithmic
    chart = Chart(
        panel.title,
        Axis("Step", min(steps), max(*steps, min(steps) + 1)),
        axis_over(panel.unit, values, zero=zero, logarithmic=panel.logarithmic),
        height=220,
    )
    if panel.band is not None:
        chart.band(curves[panel.band[0]], curves[panel.band[1]], colour(0))
    # A curve that belongs to one of the models has that model's colour.
    styles = {key: STYLES.get(key.split("/")[-1], colour(i)) for i, key in enumerate(keys)}
    for key, style in styles.items():
        chart.line(curves[key], style)
        for step, value in curves[key] if len(steps) <= MAX_ROWS else []:
            chart.dot(step, value, style, f"step {step:g}: {key} {value:.4g}", radius=2)
    shown = legend({key.removeprefix("quick/"): style for key, style in styles.items()})
    return f"<h3>{escape(panel.title)}</h3>{chart.svg()}{shown if len(keys) > 1 else ''}"


def _value(entry: Entry, key: str) -> float:
    value = entry.get(key)
    return math.nan if value is None else float(value)


def _thinned(entries: Sequence[Entry]) -> list[Entry]:
    """The first, the last, and evenly many between."""
    if len(entries) <= MAX_ROWS:
        return list(entries)
    last = len(entries) - 1
    return [entries[round(index * last / (MAX_ROWS - 1))] for index in range(MAX_ROWS)]
