"""How far a model has drifted from the original: rows of results.json from divergences, answers and plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from common import statistics
from common.statistics import Floats
from eval.items import MODELS, Item, ModelName, Row

Items = Mapping[ModelName, Sequence[Item]]


def divergence_row(row: Row, items: Items) -> dict[str, Any]:
    """A row of `divergence`: abliterated and healed against the original, on its own answers."""
    compared: tuple[ModelName, ...] = MODELS[1:]
    return {
        "name": row.name,
        **row.about,
        "n": len(items["healed"]),
        "num_tokens": sum(len(item.details["kl"]) for item in items["healed"]),
        "num_answered": sum(map(_is_answered, items["healed"])),
        **{model: _divergence(items[model]) for model in compared},
        "cross_entropy": {
            "original": _per_token(items["healed"], "original_nll"),
            **{model: _per_token(items[model], "nll") for model in compared},
        },
        "length": {
            "original": _length(items["healed"], "original_answer"),
            **{model: _length(items[model], "answer") for model in compared},
        },
        "repetition": {
            "original": _mean(items["healed"], "original_answer", "repetition"),
            **{model: _mean(items[model], "answer", "repetition") for model in compared},
        },
    }


def cross_entropy_rows(measured: Sequence[tuple[Row, Items]], seed: int) -> list[dict[str, Any]]:
    """Rows of `cross_entropy`: nats per token of plain text, its documents being the clusters."""
    rows = [_cross_entropy_row(row, items, seed) for row, items in measured]
    for kind in ("damage", "gain", "gap"):
        adjusted = statistics.holm([row[kind]["p"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            row[kind]["p_adjusted"] = p
    return rows


def _divergence(items: Sequence[Item]) -> dict[str, Any]:
    kls = [np.asarray(item.details["kl"], dtype=np.float64) for item in items]
    kl = np.concatenate(kls)
    reverse = np.concatenate([np.asarray(i.details["reverse_kl"], dtype=np.float64) for i in items])
    answered = [one for one, item in zip(kls, items, strict=True) if _is_answered(item)]
    later = np.concatenate([one[1:] for one in kls])
    num_agreeing = sum(item.details["top1_agreements"] for item in items)
    return {
        **_spread(kl),
        # Where the original refuses, an edit that removes refusals is meant to move the model.
        "answered_kl": float(np.concatenate(answered).mean()) if answered else None,
        "top1_agreement": num_agreeing / len(kl),
        "first_token_kl": float(np.mean([one[0] for one in kls])),
        "after_first_token_kl": float(later.mean()) if len(later) else None,
        "by_position": _by_position(kls),
        "reverse": _spread(reverse),
    }


def _is_answered(item: Item) -> bool:
    """Whether the original does not refuse this prompt."""
    return not item.details["original_refuses"]


def _spread(kl: Floats) -> dict[str, float]:
    return {
        "mean_kl": float(kl.mean()),
        "median_kl": float(np.median(kl)),
        "p95_kl": float(np.quantile(kl, 0.95)),
        "p99_kl": float(np.quantile(kl, 0.99)),
    }


def _by_position(kls: Sequence[Floats]) -> list[dict[str, float]]:
    """Means over positions 0, 1, 2 to 3, 4 to 7...: bins that double hold alike many tokens of answers."""
    bins, start, stop = [], 0, 1
    while any(len(kl) > start for kl in kls):
        inside = np.concatenate([kl[start:stop] for kl in kls])
        mean = float(inside.mean())
        bins.append({"from": start, "to": stop, "n": len(inside), "mean_kl": mean})
        start, stop = stop, 2 * stop
    return bins


def _per_token(items: Sequence[Item], key: str) -> float:
    return float(
        sum(item.details[key] for item in items) / sum(len(item.details["kl"]) for item in items)
    )


def _length(items: Sequence[Item], answer: str) -> dict[str, float]:
    return {
        "mean_tokens": _mean(items, answer, "num_tokens"),
        "cut": _mean(items, answer, "was_cut"),
    }


def _mean(items: Sequence[Item], answer: str, key: str) -> float:
    return float(np.mean([item.details[answer][key] for item in items]))


def _cross_entropy_row(row: Row, items: Items, seed: int) -> dict[str, Any]:
    sizes = np.array([i.details["num_tokens"] for i in items["original"]], dtype=np.float64)
    sums = {m: np.array([i.details["nll"] for i in items[m]], dtype=np.float64) for m in MODELS}
    changes = {
        "damage": sums["abliterated"] - sums["original"],
        "gain": sums["healed"] - sums["abliterated"],
        "gap": sums["healed"] - sums["original"],
    }
    power = statistics.minimum_detectable_ratio(changes["gap"], sizes)
    return {
        "name": row.name,
        **row.about,
        "n": len(sizes),
        "num_tokens": int(sizes.sum()),
        **{m: asdict(statistics.ratio_interval(sums[m], sizes, seed=seed)) for m in MODELS},
        **{
            kind: asdict(statistics.ratio_interval(change, sizes, seed=seed))
            | {"p": statistics.sign_flip_test(change, seed=seed)}
            for kind, change in changes.items()
        },
        "minimum_detectable_effect": power,
    }
