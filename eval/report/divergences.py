"""How far the models have moved, on the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.webpage import Section
from eval.items import MODELS
from eval.report import pictures
from eval.report.figures import NOTHING, TITLES, estimate, figure

Row = Mapping[str, Any]
# Fields of a divergence by their heads, in the order of the table.
SPREAD = {
    "mean_kl": "mean",
    "answered_kl": "where the original answers",
    "median_kl": "median",
    "p95_kl": "p95",
    "p99_kl": "p99",
    "first_token_kl": "first token",
    "after_first_token_kl": "after it",
}
# What may have changed in the answers.
DRIFTS = ("cross_entropy", "length", "repetition")


def sections(results: Row) -> Iterator[Section]:
    """Divergences by panel and by position, drift of the answers, and cross-entropy on plain text."""
    rows = results["divergence"]
    if rows:
        yield _divergences(rows)
    drawn = [row for row in rows if row["healed"].get("by_position")]
    if drawn:
        yield _positions(drawn)
    drifted = [row for row in rows if any(key in row for key in DRIFTS)]
    if drifted:
        yield _drift(drifted)
    if results.get("cross_entropy"):
        yield _plain_text(results["cross_entropy"])


def _divergences(rows: Sequence[Row]) -> Section:
    return Section(
        "divergence",
        "How far the models have moved from the original",
        "Kullback-Leibler divergence from the original on its own answers, nats per token, and the share of tokens of "
        "which both hold the same to be the likeliest. Where the original refuses, an edit that removes "
        "refusals is meant to move the model: the prompts that it answers stand alone too. Reverse: the other way "
        "round, from the model to the original.",
        [],
        [
            "Panel",
            "Model",
            "Tokens",
            "Answered",
            *SPREAD.values(),
            "same top token",
            "reverse, mean",
        ],
        [_divergence(row, model) for row in rows for model in MODELS[1:]],
        folded=False,
    )


def _divergence(row: Row, model: str) -> list[object]:
    path, found = f"divergence[{row['name']}].{model}", row[model]
    reverse = found.get("reverse") or {}
    return [
        row["name"],
        model,
        figure(f"divergence[{row['name']}].num_tokens", row["num_tokens"], "d"),
        figure(f"divergence[{row['name']}].num_answered", row.get("num_answered"), "d"),
        *(figure(f"{path}.{key}", found.get(key), ".4f") for key in SPREAD),
        figure(f"{path}.top1_agreement", found["top1_agreement"]),
        figure(f"{path}.reverse.mean_kl", reverse.get("mean_kl"), ".4f"),
    ]


def _positions(rows: Sequence[Row]) -> Section:
    return Section(
        "positions",
        "Where in the answers the models diverge",
        "Mean over stretches of tokens that double in length. A high beginning means other openings; a rising end, "
        "answers that drift apart.",
        [pictures.by_position(row) for row in rows],
        ["Panel", "Tokens of the answer", "Abliterated", "Healed"],
        [
            (
                row["name"],
                pictures.stretch(found),
                *(
                    figure(
                        f"divergence[{row['name']}].{model}.by_position[{index}].mean_kl",
                        row[model]["by_position"][index]["mean_kl"],
                        ".4f",
                    )
                    for model in MODELS[1:]
                ),
            )
            for row in rows
            for index, found in enumerate(row["healed"]["by_position"])
        ],
    )


def _drift(rows: Sequence[Row]) -> Section:
    """Whatever of length, repetition and cross-entropy a row has, one line for each and model."""
    found = [
        (
            row["name"],
            f"{key.replace('_', ' ')}{': ' if name else ''}{name.replace('_', ' ')}",
            paths,
        )
        for row in rows
        for key in DRIFTS
        if isinstance(row.get(key), Mapping)
        for name, paths in _by_model(row[key], f"divergence[{row['name']}].{key}").items()
    ]
    return Section(
        "drift",
        "How the answers themselves have changed",
        "Cross-entropy on the original's own answers (nats per token), the length of each model's own answers, and how "
        "much they repeat themselves.",
        [],
        ["Panel", "Measure", *TITLES],
        [
            (panel, measure, *(figure(*paths[m], ".4g") if m in paths else NOTHING for m in MODELS))
            for panel, measure, paths in found
        ],
        folded=False,
    )


def _by_model(block: Row, path: str) -> dict[str, dict[str, tuple[str, float | None]]]:
    """Numbers by model turned into numbers by measure; a model's only number has no name."""
    found: dict[str, dict[str, tuple[str, float | None]]] = {}
    for model in MODELS:
        values = block.get(model)
        if isinstance(values, Mapping):
            for name, value in values.items():
                found.setdefault(name, {})[model] = (f"{path}.{model}.{name}", value)
        elif values is not None:
            found.setdefault("", {})[model] = (f"{path}.{model}", values)
    return found


def _plain_text(rows: Sequence[Row]) -> Section:
    return Section(
        "plain-text",
        "Cross-entropy on plain text",
        "Nats per token, with 95 % intervals: lower is better. It rises where a model has forgotten how people write.",
        [],
        ["Text", "Tokens", *TITLES, "Abliterated - original", "Healed - original"],
        [
            [
                row["name"],
                figure(f"cross_entropy[{row['name']}].num_tokens", row["num_tokens"], "d"),
                *(
                    estimate(f"cross_entropy[{row['name']}].{key}", row.get(key), ".4f")
                    for key in (*MODELS, "damage", "gap")
                ),
            ]
            for row in rows
        ],
        folded=False,
    )
