"""Refusals on the page: rates, classes, categories, unsolicited advice, and refusal against capability."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.schema import LABELS
from common.webpage import Markup, Section
from eval.items import MODELS
from eval.report import pictures
from eval.report.figures import NOTHING, TITLES, estimate, figure, joined, quoted

Row = Mapping[str, Any]


def sections(results: Row) -> Iterator[Section]:
    """What is still refused, in what way, and what that cost in capability."""
    rows = results["refusal"]
    if not rows:
        return
    yield Section(
        "refusals",
        "What is still refused",
        "Share of answers that refuse, with 95 % intervals. Refusing harmless prompts is over-refusal. Below a panel's "
        "name stand its system prompt and who judged, where the recipe names one.",
        [],
        ["Panel", "Prompts", "Items", *TITLES],
        [
            [
                _panel(row),
                "harmless" if row["harmless"] else "refused by the original",
                figure(f"refusal[{row['name']}].n", row["n"], "d"),
                *(estimate(f"refusal[{row['name']}].{model}", row[model]) for model in MODELS),
            ]
            for row in rows
        ],
        folded=False,
    )
    if any(row.get("classes") for row in rows):
        yield _classes(rows)
    if any("harmful" in row for row in rows):
        yield _harmful(rows)
    if any(row.get("by_category") for row in rows):
        yield _categories(rows)
    if any(row.get("advisories") for row in rows):
        yield _advisories(rows)
    if places := pictures.places(results):
        yield _tradeoff(places)


def _panel(row: Row) -> Markup:
    """A panel's name, and how it was asked and judged."""
    about = []
    if "system" in row:
        about.append(joined(["system prompt: ", quoted(row["system"])], ""))
    if "judge" in row:
        about.append(joined(["judged by ", row["judge"]], ""))
    return joined([row["name"], *(Markup(f" <small>{line}</small>") for line in about)], "")


def _harmful(rows: Sequence[Row]) -> Section:
    return Section(
        "harmful",
        "How many answers are harmful",
        "Share of the answers that a judge of harm finds harmful, of those that it could be understood on, with 95 % "
        "intervals.",
        [],
        ["Panel", "Judge", *TITLES],
        [
            [
                row["name"],
                row["harm_judge"],
                *(
                    estimate(f"refusal[{row['name']}].harmful.{m}", row["harmful"][m])
                    for m in MODELS
                ),
            ]
            for row in rows
            if "harmful" in row
        ],
        folded=False,
    )


def _classes(rows: Sequence[Row]) -> Section:
    return Section(
        "classes",
        "How the prompts were answered",
        "Shares of the answers. A calibrated rate is the share of refusals, corrected with the labels that people gave "
        "some of the answers.",
        [],
        [
            "Panel",
            "Model",
            "Full refusal",
            "Partial refusal",
            "Compliance",
            "Degenerate",
            "Calibrated",
        ],
        [
            [
                row["name"],
                model,
                *(
                    _rate(
                        f"refusal[{row['name']}].classes.{model}.{name}",
                        row["classes"][model].get(name),
                    )
                    for name in LABELS
                ),
                _calibrated(row, model),
            ]
            for row in rows
            if row.get("classes")
            for model in MODELS
        ],
        folded=False,
    )


def _calibrated(row: Row, model: str) -> Markup:
    path, found = f"refusal[{row['name']}].calibrated.{model}", row.get("calibrated") or {}
    if found.get(model) is None:
        return NOTHING
    num_labels = figure(f"{path}.num_labels", found[model]["num_labels"], "d")
    return joined([estimate(path, found[model]), " (", num_labels, " labels)"], "")


def _categories(rows: Sequence[Row]) -> Section:
    return Section(
        "categories",
        "Refusals by category",
        "Share of the prompts of a category that are refused. Few prompts leave wide intervals.",
        [],
        ["Panel", "Category", "Items", *TITLES],
        [
            [
                row["name"],
                found["category"],
                figure(f"{path}.n", found["n"], "d"),
                *(_rate(f"{path}.{model}", found[model]) for model in MODELS),
            ]
            for row in rows
            for found in row.get("by_category") or []
            for path in [f"refusal[{row['name']}].by_category[{found['category']}]"]
        ],
        folded=False,
    )


def _rate(path: str, found: float | Row | None) -> Markup:
    return estimate(path, found) if isinstance(found, Mapping) else figure(path, found)


def _advisories(rows: Sequence[Row]) -> Section:
    return Section(
        "advisories",
        "Advice that nobody asked for",
        "Share of the answers that hold a disclaimer, and of their tokens that are spent on it.",
        [],
        ["Panel", "Model", "Answers", "Tokens"],
        [
            [
                row["name"],
                model,
                *(
                    _rate(
                        f"refusal[{row['name']}].advisories.{model}.{key}",
                        row["advisories"][model].get(key),
                    )
                    for key in ("answers", "tokens")
                ),
            ]
            for row in rows
            if row.get("advisories")
            for model in MODELS
        ],
        folded=False,
    )


def _tradeoff(places: Sequence[pictures.Place]) -> Section:
    return Section(
        "tradeoff",
        "Refusal against capability",
        "Wanted: healed as far to the right as the original, and as low as the abliterated model. Means over the "
        "benchmarks and over the panels; their intervals are made of those in the tables.",
        [pictures.tradeoff(places)],
        ["Model", "Prompts", "Capability", "low", "high", "Refused", "low", "high"],
        [
            (
                place.model,
                "harmless" if place.harmless else "harmful",
                *(place.capability.value, place.capability.low, place.capability.high),
                *(place.refusal.value, place.refusal.low, place.refusal.high),
            )
            for place in places
        ],
    )
