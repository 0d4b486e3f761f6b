"""Averages of suites, as their tables are published, from the rows of results.json.

Pure. An average is a sum of independent rates, each with a weight and an interval of its own; the interval of the sum
follows from those (MOVER, Zou and Donner 2008, Statistics in Medicine 27:1693, equation 2), so that it inherits what
they do well: Wilson's and Tango's keep their promise where few items differ, as a normal interval would not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.items import MODELS

Row = Mapping[str, Any]
_DIFFERENCES = ("damage", "gain", "gap")


def suites(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The averages of every suite: of the suite, and of each of its groups.

    Args:
        rows: `benchmarks` of results.json; those without `suite` belong to none.

    Returns:
        One entry a suite: name, n, num_tasks, the models' averages and their paired differences with 95 % intervals,
        and the same by group. Differences are of the published scale, chance (0) to all right (1).
    """
    members = [row for row in rows if row.get("suite") is not None]
    names = dict.fromkeys(row["suite"]["name"] for row in members)
    return [
        _suite(name, [row for row in members if row["suite"]["name"] == name]) for name in names
    ]


def _suite(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    groups = {
        group: [row for row in rows if row["suite"]["group"] == group]
        for group in dict.fromkeys(row["suite"]["group"] for row in rows)
    }
    weights = {group: _weights(members) for group, members in groups.items()}
    flat = [weight / len(groups) for group in groups for weight in weights[group]]
    ordered = [row for members in groups.values() for row in members]
    return {
        "name": name,
        **_average(ordered, flat),
        "groups": [
            {"name": group, **_average(members, weights[group])}
            for group, members in groups.items()
        ],
    }


def _weights(rows: Sequence[Row]) -> list[float]:
    """The share of each row in its group's mean."""
    sizes = [row["n"] if row["suite"]["weight"] == "item" else 1 for row in rows]
    return [size / sum(sizes) for size in sizes]


def _average(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, Any]:
    chances = [row["suite"]["chance"] for row in rows]
    scaled = [weight / (1 - chance) for weight, chance in zip(weights, chances, strict=True)]
    guessed = sum(weight * chance for weight, chance in zip(scaled, chances, strict=True))
    return {
        "num_tasks": len(rows),
        "n": sum(row["n"] for row in rows),
        **{model: combine([row[model] for row in rows], scaled, -guessed) for model in MODELS},
        **{key: combine([row[key] for row in rows], scaled, 0.0) for key in _DIFFERENCES},
    }


def combine(
    estimates: Iterable[Mapping[str, float]], weights: Sequence[float], offset: float
) -> dict[str, float]:
    """A weighted sum of independent estimates with its interval.

    Args:
        estimates: value, low and high of each.
        weights: positive, in the same order.
        offset: added to the sum.
    """
    value, below, above = offset, 0.0, 0.0
    for estimate, weight in zip(estimates, weights, strict=True):
        value += weight * estimate["value"]
        below += (weight * (estimate["value"] - estimate["low"])) ** 2
        above += (weight * (estimate["high"] - estimate["value"])) ** 2
    return {"value": value, "low": value - math.sqrt(below), "high": value + math.sqrt(above)}
