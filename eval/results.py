"""results.json from items: rows with intervals, verdicts, what was recovered, and whether the gates hold.

Pure: the same items and settings give the same results, so results.json can be made again from
items.jsonl.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from common import statistics
from common.statistics import Difference, Floats, Interval
from eval import averages, comparison, drift, flips, refusals
from eval.calibration import Labels
from eval.comparison import AdjustedP, Answers, Comparison
from eval.items import MODELS, Item, Kind, ModelName, Row
from eval.paths import number

SCHEMA_VERSION = 1
SCHEMA_PATH = Path(__file__).with_name("results.schema.json")


@dataclass(frozen=True)
class Limits:
    """The range in which a gate passes; None leaves a side open."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class Settings:
    """What the arithmetic depends on besides the items.

    Attributes:
        recipe: its name.
        margin: non-inferiority margin, a fraction.
        seed: of the resampling.
        accept: limits by dotted path.
        labels: what people said of some answers.
        provenance: versions, seed and fingerprints, as they go into results.json.
    """

    recipe: str
    margin: float
    seed: int = 0
    accept: Mapping[str, Limits] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def build(
    settings: Settings,
    rows: Sequence[Row],
    items: Sequence[Item],
    direction: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build results.json.

    Args:
        settings: of the recipe.
        rows: what was measured, in the order of the recipe.
        items: of all rows and models.
        direction: what is left of the removed direction, `eval.direction.block`; None where it was not measured.

    Raises:
        ValueError: if the models did not answer the same items, or the outcome does not follow the
            schema.
    """
    grouped: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        grouped.setdefault((item.kind, item.name), []).append(item)
    by_row = {
        (row.kind, row.name): _by_model(row, grouped.get((row.kind, row.name), [])) for row in rows
    }

    def of(kind: Kind) -> list[tuple[Row, dict[ModelName, list[Item]]]]:
        return [(row, by_row[row.kind, row.name]) for row in rows if row.kind == kind]

    benchmarks, pooled = _benchmarks(settings, of("benchmarks"))
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "recipe": settings.recipe,
        "margin": settings.margin,
        "benchmarks": benchmarks,
        "pooled": pooled,
        "suites": averages.suites(benchmarks),
        "refusal": [
            _refusal_row(row, answers, settings.seed)
            | refusals.findings(row.name, answers, settings.labels)
            for row, answers in of("refusal")
        ],
        "divergence": [drift.divergence_row(row, answers) for row, answers in of("divergence")],
        "cross_entropy": drift.cross_entropy_rows(of("cross_entropy"), settings.seed),
        "direction": dict(direction) if direction is not None else {"residual": None},
        "provenance": dict(settings.provenance),
    }
    if results["refusal"]:
        results["refusal_instrument"] = refusals.instrument(results["refusal"])
    results["accept"] = gates(results, settings.accept)
    validate(results)
    return results


def gates(results: Mapping[str, Any], accept: Mapping[str, Limits]) -> dict[str, Any]:
    """Hold results against the recipe's limits.

    A gate on what could not be measured (null) is missed: silence is no evidence.

    Raises:
        InputError: if a gate names no number of results.json.
    """
    found = []
    for name, limits in accept.items():
        value = number(results, name)
        if limits.min is not None:
            passed = value is not None and value >= limits.min
            found.append(
                {
                    "name": name,
                    "value": value,
                    "bound": "min",
                    "limit": limits.min,
                    "passed": passed,
                }
            )
        if limits.max is not None:
            passed = value is not None and value <= limits.max
            found.append(
                {
                    "name": name,
                    "value": value,
                    "bound": "max",
                    "limit": limits.max,
                    "passed": passed,
                }
            )
    return {"passed": all(gate["passed"] for gate in found), "gates": found}


def missed(results: Mapping[str, Any]) -> list[str]:
    """The missed gates in words, for the error that stops a release."""
    return [
        f"{gate['name']} is {'not measured' if gate['value'] is None else format(gate['value'], '.4g')}, "
        f"but eval.accept asks for at {'least' if gate['bound'] == 'min' else 'most'} "
        f"{gate['limit']:.4g}"
        for gate in results["accept"]["gates"]
        if not gate["passed"]
    ]


def validate(results: Mapping[str, Any]) -> None:
    """Hold results against eval/results.schema.json.

    Raises:
        ValueError: naming the field; this is a fault of the program, not of the user.
    """
    schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    for error in jsonschema.Draft202012Validator(schema).iter_errors(results):
        raise ValueError(f"results.json: {error.json_path}: {error.message}")


def _by_model(row: Row, items: Sequence[Item]) -> dict[ModelName, list[Item]]:
    # The original model has no divergence from itself.
    models = MODELS[1:] if row.kind == "divergence" else MODELS
    found: dict[ModelName, list[Item]] = {
        model: [item for item in items if item.model == model] for model in models
    }
    first = found[models[0]]
    if not first:
        raise ValueError(f"{row.kind}[{row.name}]: no items")
    for model in models[1:]:
        if [(item.id, item.cluster) for item in found[model]] != [
            (item.id, item.cluster) for item in first
        ]:
            raise ValueError(
                f"{row.kind}[{row.name}]: {models[0]} and {model} answered different items"
            )
    return found


def _values(items: Sequence[Item]) -> Floats:
    return np.array([item.value for item in items], dtype=np.float64)


def _answers(answers: Mapping[ModelName, Sequence[Item]]) -> Answers:
    return Answers(
        original=_values(answers["original"]),
        abliterated=_values(answers["abliterated"]),
        healed=_values(answers["healed"]),
        clusters=statistics.cluster_ids([item.cluster for item in answers["original"]]),
    )


def _benchmarks(
    settings: Settings, measured: Sequence[tuple[Row, dict[ModelName, list[Item]]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    answers = [_answers(items) for _, items in measured]
    comparisons = [comparison.compare(one, seed=settings.seed) for one in answers]
    adjusted = comparison.adjust(comparisons)
    rows, damaged = [], []
    for (row, items), one, compared, p in zip(
        measured, answers, comparisons, adjusted, strict=True
    ):
        is_damaged = comparison.is_damaged(compared, p)
        if is_damaged and row.about["role"] == "capability":
            damaged.append((row.name, one))
        recovery = comparison.recovery(one, seed=settings.seed) if is_damaged else None
        rows.append(
            _benchmark_row(row, items, one, settings.seed)
            | _comparison_fields(compared, p, recovery)
            | {
                "verdict": comparison.verdict(
                    compared, p, role=row.about["role"], margin=settings.margin
                )
            }
        )
    pooled = comparison.pool([one for _, one in damaged], seed=settings.seed)
    return rows, {
        "benchmarks": [name for name, _ in damaged],
        "n": pooled.num_items if pooled else 0,
        "damage": asdict(pooled.damage) if pooled else None,
        "recovery": asdict(pooled.recovery) if pooled else None,
    }


def _benchmark_row(
    row: Row, items: Mapping[ModelName, Sequence[Item]], answers: Answers, seed: int
) -> dict[str, Any]:
    clustered = statistics.is_clustered(answers.clusters)
    return {
        "name": row.name,
        **row.about,
        "n": len(answers.clusters),
        "num_clusters": int(answers.clusters.max()) + 1 if clustered else None,
        **_rates(items, seed),
        "answer_logp": {model: _mean_logp(items[model]) for model in MODELS},
        "answer_logp_change": _logp_change(items, answers, seed),
        "flips": flips.count(answers),
    }


def _comparison_fields(
    compared: Comparison, p: AdjustedP, recovery: Interval | None
) -> dict[str, Any]:
    return {
        "damage": _difference(compared.damage, p.damage),
        "gain": _difference(compared.gain, p.gain),
        "gap": _difference(compared.gap, p.gap),
        "minimum_detectable_effect": compared.minimum_detectable_effect,
        "mde": compared.minimum_detectable_effect,
        "recovery": asdict(recovery) if recovery else None,
    }


def _difference(difference: Difference, p_adjusted: float) -> dict[str, float]:
    return asdict(difference) | {"p_adjusted": p_adjusted}


def _mean_logp(items: Sequence[Item]) -> float | None:
    known = [item.answer_logp for item in items if item.answer_logp is not None]
    return float(np.mean(known)) if len(known) == len(items) else None


def _logp_change(
    items: Mapping[ModelName, Sequence[Item]], answers: Answers, seed: int
) -> dict[str, dict[str, float]] | None:
    """The paired differences of the right answer's log-probability; None where some have none."""
    # None becomes NaN.
    original, abliterated, healed = (
        np.array([item.answer_logp for item in items[model]], dtype=np.float64) for model in MODELS
    )
    if not np.isfinite([original, abliterated, healed]).all():
        return None
    logps = Answers(original, abliterated, healed, answers.clusters)
    compared = comparison.compare(logps, seed=seed)
    return {
        "damage": asdict(compared.damage),
        "gain": asdict(compared.gain),
        "gap": asdict(compared.gap),
    }


def _rates(items: Mapping[ModelName, Sequence[Item]], seed: int) -> dict[str, Any]:
    clusters = statistics.cluster_ids([item.cluster for item in items["original"]])
    return {
        model: asdict(statistics.rate_interval(_values(items[model]), clusters, seed=seed))
        for model in MODELS
    }


def _refusal_row(row: Row, items: Mapping[ModelName, Sequence[Item]], seed: int) -> dict[str, Any]:
    compared = comparison.compare(_answers(items), seed=seed)
    return {
        "name": row.name,
        **row.about,
        "n": len(items["original"]),
        **_rates(items, seed),
        "gain": asdict(compared.gain),
        "gap": asdict(compared.gap),
        "minimum_detectable_effect": compared.minimum_detectable_effect,
    }
