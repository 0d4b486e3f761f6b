"""A finished evaluation that nobody made: invented numbers in every field that a report can show, for its tests."""

from pathlib import Path
from typing import Any

from abliteration import report as first_report
from abliteration.report import Residual, Scored
from common import artifacts
from eval.items import MODELS, Item
from eval.report.questions import Questions

# Values of the three models by item.
FIXED, STILL, NEWLY, SAME = (1, 0, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1)
# What a panel of its own system prompt and judges says besides.
JUDGED = {
    "system": "Be <kind>.",
    "judge": "a/judge",
    "harm_judge": "a/guard",
    "harmful": {
        "original": None,
        "abliterated": {"value": 0.31, "low": 0.21, "high": 0.42},
        "healed": {"value": 0.29, "low": 0.19, "high": 0.4},
    },
}
# What must never be on a page, and what may.
SECRET, OPEN = "the restricted wording", "the open wording"


def interval(value: float, reach: float = 0.0625) -> dict[str, float]:
    """An estimate with its ends."""
    return {"value": value, "low": value - reach, "high": value + reach / 2}


def difference(value: float, p: float) -> dict[str, float]:
    """A paired difference."""
    return interval(value, 0.03125) | {"p": p / 2, "p_adjusted": p}


def by_model(*values: Any) -> dict[str, Any]:
    """Something for each of the three models."""
    return dict(zip(MODELS, values, strict=True))


def benchmark(name: str, *rates: float, role: str = "capability", verdict: str) -> dict[str, Any]:
    """A row of `benchmarks`."""
    original, abliterated, healed = rates
    recovery = interval((healed - abliterated) / (original - abliterated))
    return {
        "name": name,
        "metric": "exact_match",
        "role": role,
        "higher_is_better": True,
        "n": 4,
        "num_clusters": None,
        **by_model(*map(interval, rates)),
        "answer_logp": by_model(-0.5, -1.25, -0.625),
        "answer_logp_change": {
            name: interval(value) | {"p": 0.01}
            for name, value in (("damage", -0.75), ("gain", 0.625), ("gap", -0.125))
        },
        "damage": difference(abliterated - original, 0.0123),
        "gain": difference(healed - abliterated, 0.0456),
        "gap": difference(healed - original, 0.789),
        "minimum_detectable_effect": 0.0345,
        "flips": {"broken": 2, "fixed": 1, "newly_broken": 1, "still_broken": 1, "unlocked": 0},
        "recovery": recovery if verdict == "recovered" else None,
        "verdict": verdict,
    }


def panel(name: str, *rates: float, harmless: bool, **about: Any) -> dict[str, Any]:
    """A row of `refusal`."""
    classes = {
        "full_refusal": 0.11,
        "partial_refusal": 0.12,
        "compliance": 0.71,
        "degenerate": 0.06,
    }
    return {
        "name": name,
        "harmless": harmless,
        **about,
        "n": 3,
        **by_model(*map(interval, rates)),
        "gain": difference(0.125, 0.5),
        "gap": difference(-0.125, 0.5),
        "classes": by_model(classes, classes, classes),
        "by_category": [{"category": "one of two", "n": 2, **by_model(*map(interval, rates))}],
        "advisories": by_model(*({"answers": 0.21, "tokens": 0.0321} for _ in MODELS)),
        "calibrated": {"healed": interval(0.09) | {"num_labels": 40}},
    }


def divergence(kl: float) -> dict[str, Any]:
    """What a row of `divergence` says of a model."""
    spread = {"median_kl": kl / 2, "p95_kl": 2 * kl, "p99_kl": 3 * kl}
    bins = [(0, 1), (1, 2), (2, 4), (4, 8)]
    return {
        "mean_kl": kl,
        **spread,
        "top1_agreement": 0.987,
        "first_token_kl": kl / 4,
        "answered_kl": kl / 5,
        "after_first_token_kl": kl / 3,
        "by_position": [
            {"from": a, "to": b, "n": 10 * (b - a), "mean_kl": kl * (a + 1)} for a, b in bins
        ],
        "reverse": {"mean_kl": 1.5 * kl, **spread},
    }


def gate(name: str, value: float | None, bound: str, limit: float, passed: bool) -> dict[str, Any]:
    """A row of `accept.gates`."""
    return {"name": name, "value": value, "bound": bound, "limit": limit, "passed": passed}


def results() -> dict[str, Any]:
    """Everything that results.json can hold."""
    return {
        "schema_version": 1,
        "recipe": "made-up",
        "margin": 0.05,
        "benchmarks": [
            benchmark("sums", 0.9375, 0.5, 0.875, verdict="recovered"),
            benchmark("words", 0.75, 0.6875, 0.7421875, verdict="not shown"),
            benchmark("hidden", 0.03, 0.8, 0.81, role="unlocked", verdict="undamaged"),
        ],
        "pooled": {
            "benchmarks": ["sums"],
            "n": 4,
            "damage": difference(-0.4375, 0.0123),
            "recovery": interval(0.8571),
        },
        "refusal": [
            panel("closed", 0.96, 0.01, 0.02, harmless=False, **JUDGED),
            panel("plain", 0.0123, 0.02, 0.03, harmless=True),
        ],
        "refusal_instrument": {
            "name": "rule and model",
            "agreement": 0.951,
            "kappa": 0.8765,
            "rate_error": 0.021,
            "by_model": {"one model": {"kappa": 0.9}},
            "measured_on": "labelled answers",
        },
        "divergence": [
            {
                "name": "prompts",
                "n": 3,
                "num_tokens": 150,
                "num_answered": 2,
                "abliterated": divergence(0.0625),
                "healed": divergence(0.03125),
                "cross_entropy": by_model(0.51, 0.62, 0.53),
                "length": by_model(
                    *({"mean_tokens": n, "cut": n / 100} for n in (20.5, 31.25, 21.5))
                ),
                "repetition": by_model(0.01, 0.09, 0.02),
            }
        ],
        "cross_entropy": [
            {
                "name": "prose",
                "num_tokens": 1000,
                **by_model(*map(interval, (2.5, 2.75, 2.625))),
                "damage": difference(0.25, 0.01),
                "gap": difference(0.125, 0.02),
            }
        ],
        "direction": {
            "residual": {"abliterated": 1.5e-7, "healed": 2.5e-8},
            "residual_bfloat16": {"abliterated": 1.5e-3, "healed": 2.5e-4},
            "residual_nf4": None,
            "reestimated": {
                **by_model(*({"cosine": c, "norm_ratio": abs(c)} for c in (1.0, -0.25, 0.125))),
                "reason": None,
            },
        },
        "accept": {
            "passed": True,
            "gates": [
                gate("refusal[closed].healed.value", 0.02, "max", 0.05, True),
                gate("pooled.recovery.value", 0.8571, "min", 0.8, True),
            ],
        },
        "provenance": {
            "versions": {"python": "3.11", "torch": "2.13"},
            "seed": 7,
            "fingerprints": {"abliteration": "f1", "train": "f2"},
        },
    }


def items() -> list[Item]:
    """Items with answers, those of harmful panels among them."""
    return [
        *_items("benchmarks", "sums", OPEN, [FIXED, STILL, NEWLY, SAME]),
        *_items("benchmarks", "words", OPEN, [SAME, (0, 0, 1), (0, 1, 0), SAME]),
        *_items("benchmarks", "hidden", SECRET, [(0, 1, 1), (0, 1, 0), SAME, SAME]),
        *_items("refusal", "closed", SECRET, [(1, 0, 0), (1, 0, 1), SAME]),
        *_items("refusal", "plain", OPEN, [(0, 0, 1), (0, 1, 0), SAME]),
        Item("divergence", "prompts", "healed", 0, 0.5, details={"text": SECRET}),
    ]


def questions() -> Questions:
    """What the items ask."""
    open_rows = ("sums", "words", "plain")
    return {
        (item.kind, item.name): {
            n: f"Asked {OPEN if item.name in open_rows else SECRET} {n}?" for n in range(4)
        }
        for item in items()
    }


def _items(kind: Any, name: str, text: str, values: list[tuple[int, ...]]) -> list[Item]:
    return [
        Item(
            kind,
            name,
            model,
            number,
            float(by_item[place]),
            cluster=f"{text} {number}",
            details={"text": f"{model}: {text} {number}"},
        )
        for place, model in enumerate(MODELS)
        for number, by_item in enumerate(values)
    ]


def folders(root: Path) -> dict[str, Path]:
    """The folders of the stages before, with what a report reads in them."""
    abliteration, train = root / "abliteration", root / "train"
    abliteration.mkdir(parents=True)
    train.mkdir()
    first_report.write(
        abliteration / "report.html",
        first_report.Report(
            name="made-up",
            model="some/model",
            layer=1,
            position=-1,
            norms=[[0.0, 0.0], [1.0, 2.0], [1.5, 2.5]],
            separation=[0.5, 3.0, 2.0],
            scores=[
                Scored(1, -1, -2.0, 3.0, 0.01),
                Scored(2, -1, 1.0, 3.0, 0.2, "kl above max_kl"),
            ],
            residuals=[Residual("model.layers.1.mlp.down_proj", "mlp", 1, 1e-7)],
        ),
    )
    artifacts.write_jsonl(train / "log.jsonl", log())
    best = {"step": 20, "recovery": 0.9}
    artifacts.write_json(
        train / "summary.json", {"stopping": {"best": best, "reason": "it was enough"}}
    )
    return {"abliteration": abliteration, "train": train}


def log() -> list[dict[str, Any]]:
    """The log of a training with quick evaluations."""
    steps = [
        {
            "step": step,
            "loss": 1 / step,
            "rewards/margins": 0.01 * step,
            "anchors/original": 0.5 / step,
            "anchors/abliterated": 0.001 * step,
            "ablation/residual": 1e-9 * step,
        }
        for step in range(1, 31)
    ]
    quick = [
        {
            "step": step,
            "quick/recovery": step / 40,
            "quick/recovery_low": step / 50,
            "quick/recovery_high": step / 30,
            "quick/refusal": 0.01,
            "quick/over_refusal": 0.0,
            "quick/kl": 1 / (step + 1),
            "quick/seconds": 12.5,
        }
        for step in (0, 10, 20, 30)
    ]
    end = {"step": 30, "train_loss": 0.1, "train_runtime": 1.0}
    return [*sorted([*steps, *quick], key=lambda entry: entry["step"]), end]
