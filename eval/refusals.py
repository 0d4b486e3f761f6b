"""Rows of `refusal` in results.json: rates, classes, categories, unsolicited advice, and rates that labels correct."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from common import statistics
from common.refusal import INSTRUMENT
from common.schema import LABELS
from eval import calibration
from eval.calibration import Labels
from eval.items import MODELS, Item, ModelName

Items = Mapping[ModelName, Sequence[Item]]


def findings(name: str, items: Items, labels: Labels) -> dict[str, Any]:
    """What a row says besides its rates; fields that nothing was recorded for are absent.

    Args:
        name: of the panel.
        items: by model, the same prompts in the same order.
        labels: what people said of some of the answers.
    """
    everything = [item for model in MODELS for item in items[model]]
    found: dict[str, Any] = {}
    if all("class" in item.details for item in everything):
        found["classes"] = {model: _classes(items[model]) for model in MODELS}
    if any("category" in item.details for item in everything):
        found["by_category"] = _by_category(items)
    if all("num_advisory_words" in item.details for item in everything):
        found["advisories"] = {model: _advisories(items[model]) for model in MODELS}
    if any("harmful" in item.details for item in everything):
        found["harmful"] = {model: _harmful(items[model]) for model in MODELS}
    corrected = calibration.corrected(name, items, labels)
    return found | ({"calibrated": corrected} if corrected else {})


def instrument(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells refusals from answers, and how well it agrees with people.

    The recipe's own judges, where no row is judged by the classifier that comes with the project: of those nothing
    is known.
    """
    others = [row["judge"] for row in rows if "judge" in row]
    if len(others) < len(rows):
        return dict(INSTRUMENT)
    unknown = dict.fromkeys(("agreement", "kappa", "rate_error", "measured_on"))
    return {"name": ", ".join(dict.fromkeys(others)), **unknown}


def _classes(items: Sequence[Item]) -> dict[str, float]:
    """The share of each class."""
    counts = Counter(item.details["class"] for item in items)
    return {label: counts[label] / len(items) for label in LABELS}


def _harmful(items: Sequence[Item]) -> dict[str, float] | None:
    """The share of harmful answers, of those that the judge could be understood on."""
    told = [item.details["harmful"] for item in items if "harmful" in item.details]
    return asdict(statistics.wilson(sum(told), len(told))) if told else None


def _by_category(items: Items) -> list[dict[str, Any]]:
    """Rates with Wilson's intervals, in the order in which categories first occur."""
    labels = [item.details.get("category") for item in items["original"]]
    return [
        {"category": category, "n": labels.count(category)}
        | {model: _rate_of(items[model], category) for model in MODELS}
        for category in dict.fromkeys(labels)
        if category is not None
    ]


def _rate_of(items: Sequence[Item], category: str) -> dict[str, float]:
    values = [item.value for item in items if item.details.get("category") == category]
    return asdict(statistics.wilson(sum(values), len(values)))


def _advisories(items: Sequence[Item]) -> dict[str, float]:
    """The share of answers with a disclaimer, and of all their words that are spent on it."""
    spent = np.array([item.details["num_advisory_words"] for item in items])
    words = sum(item.details["num_words"] for item in items)
    return {
        "answers": float((spent > 0).mean()),
        "tokens": float(spent.sum()) / words if words else 0.0,
    }
