"""What a study leaves: study.json, study.html, and the tables that go to wandb."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common import artifacts
from common.charts import Axis, Chart, axis_over, colour, legend, number, parallel
from common.recipe import Limit, StudySection
from common.webpage import Markup, Section, contents, facts, html
from common.webpage import page as whole_page
from train import study_choice
from train.study_choice import Record
from train.study_importance import importances
from train.study_space import in_words, short_names, shown

SCHEMA_VERSION = 1
# A parameter that is this many times as large at its end as at its beginning is drawn by its logarithm.
WIDE = 30


def summary(
    name: str,
    section: StudySection,
    limits: Mapping[str, Limit],
    records: Sequence[Record],
    confirmations: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """study.json, but for `test`: what the best trial's own model reached on the items that neither saw.

    Args:
        name: of the study.
        section: of the recipe.
        limits: that trials had to hold.
        records: all trials.
        confirmations: of the best trials, in the order they were tried.
        best: the one of these that held the limits, if one did.
    """
    directions = section.objectives
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "sampler": section.sampler_name,
        "objectives": dict(directions),
        "constraints": {key: limit.model_dump(exclude_none=True) for key, limit in limits.items()},
        "parameters": {
            key: parameter.model_dump(mode="json", exclude_defaults=True)
            for key, parameter in section.parameters.items()
        },
        "trials": [record.as_data() for record in records],
        "front": [record.number for record in study_choice.front(records, directions)],
        "best": best["number"] if best is not None else None,
        "confirmations": [dict(found) for found in confirmations],
        "test": None,
        "importances": {
            objective: importances(records, section.parameters, objective)
            for objective in directions
        },
        "stages": study_choice.savings(records),
    }


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Leave study.json and study.html in a study's folder."""
    artifacts.write_json(folder / "study.json", found)
    artifacts.write_text(folder / "study.html", page(found))


def page(found: Mapping[str, Any]) -> str:
    """study.html, from what is in study.json."""
    sections = [html(section) for section in _sections(found)]
    facts_of = facts(_facts(found))
    head = f"<h1>Study {escape(found['name'])}</h1>{facts_of}{contents(sections)}"
    return whole_page(f"Study {found['name']}", f"<header>{head}</header>", sections)


def tables(found: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """By name the columns and rows of the front and of the importances."""
    keys, objectives = list(found["parameters"]), list(found["objectives"])
    front = [trial for trial in found["trials"] if trial["number"] in found["front"]]
    rows = [
        [
            trial["number"],
            *(_plain(trial["setting"].get(key)) for key in keys),
            *(trial["values"][name] for name in objectives),
        ]
        for trial in front
    ]
    weights = [
        [objective, key, share["value"], share["low"], share["high"]]
        for objective, by_key in found["importances"].items()
        for key, share in by_key.items()
    ]
    return {
        "front": (["trial", *keys, *objectives], rows),
        "importances": (["objective", "parameter", "value", "low", "high"], weights),
    }


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    trials = found["trials"]
    states = {
        state: sum(trial["state"] == state for trial in trials) for state in study_choice.STATES
    }
    lines = {
        "Trials": ", ".join(f"{count} {state}" for state, count in states.items() if count),
        "Within all limits": str(sum(trial["feasible"] for trial in trials)),
        "Proposed by": found["sampler"],
    }
    if found["best"] is None:
        return lines | {"Best": "none held its limits"}
    best = next(trial for trial in trials if trial["number"] == found["best"])
    lines["Best"] = f"trial {best['number']}: {in_words(best['setting'])}"
    return lines


def _sections(found: Mapping[str, Any]) -> Iterator[Section]:
    done = [trial for trial in found["trials"] if trial["state"] == "complete"]
    if found["confirmations"]:
        yield _confirmation(found)
    if done:
        yield _front(found, done)
        yield _coordinates(found, done)
    if any(found["importances"].values()):
        yield _importances(found)
    yield _savings(found)
    yield _trials(found)


def _confirmation(found: Mapping[str, Any]) -> Section:
    """The winner's curse, told: the search's value beside the ones that nothing was chosen by."""
    rows: list[Sequence[object]] = []
    for one in found["confirmations"]:
        trial = found["trials"][one["number"]]
        for name in found["objectives"]:
            tested = found["test"] if one["number"] == found["best"] else None
            rows.append(
                [
                    one["number"],
                    name,
                    trial["values"][name],
                    one["values"][name],
                    one["winners_curse"][name],
                    tested["values"][name] if tested else None,
                    "; ".join(one["missed"]) or "all held",
                ]
            )
    return Section(
        "confirmation",
        "What the search promised, and what came of it",
        "The best of many trials is in part the luckiest. It was run again with seeds and on items that the search "
        "never saw (confirmed), and its own model was measured on items that neither had seen (test).",
        [],
        ["trial", "objective", "search", "confirmed", "winner's curse", "test", "limits"],
        rows,
        folded=False,
    )


def _front(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> Section:
    """The objective against a second one, or against the first limit; else against the trials' order."""
    names = list(found["objectives"])
    across = names[1] if len(names) > 1 else next(iter(found["constraints"]), None)

    def x_of(trial: Mapping[str, Any]) -> float:
        if across is None:
            return float(trial["number"])
        value = trial["values"].get(across, trial["limited"].get(across))
        return math.nan if value is None else float(value)

    chart = Chart(
        f"{names[0]} of every trial",
        axis_over(across or "trial", map(x_of, done)),
        axis_over(names[0], [trial["values"][names[0]] for trial in done]),
    )
    for trial in sorted(done, key=lambda trial: trial["number"] in found["front"]):
        tip = f"trial {trial['number']}: {in_words(trial['setting'])}"
        chart.dot(x_of(trial), trial["values"][names[0]], _style(found, trial), tip, radius=4)
        if trial["number"] == found["best"]:
            chart.ring(x_of(trial), trial["values"][names[0]])
    limit = found["constraints"].get(across, {})
    for bound in ("min", "max"):
        if bound in limit and chart.x.low <= limit[bound] <= chart.x.high:
            chart.upright(limit[bound], "limit")
    return Section(
        "front",
        "Every trial, and the front",
        "On the front is what no other trial within the limits is better than; the ring is the best trial.",
        [chart.svg() + _legend()],
        [],
        [],
    )


def _coordinates(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> Section:
    order = sorted(
        done,
        key=lambda trial: (trial["number"] == found["best"], trial["number"] in found["front"]),
    )
    keys = list(found["parameters"])
    names = short_names(keys)
    axes: dict[str, Sequence[float | str | None]] = {}
    for key in keys:
        column = [trial["setting"].get(key) for trial in order]
        axes |= _axis(names[key], column)
    for name in found["objectives"]:
        axes[name] = [trial["values"][name] for trial in order]
    picture = parallel(
        "Settings and objectives of every trial, one line each",
        axes,
        [_style(found, trial) for trial in order],
    )
    return Section(
        "settings",
        "Where the lines of the front meet, a setting matters",
        "One line for each trial, from its settings to what it reached.",
        [picture + _legend()],
        [],
        [],
    )


def _axis(name: str, column: Sequence[Any]) -> dict[str, list[float | str | None]]:
    """A parameter's axis: words as they are, numbers that span decades by their logarithm."""
    numbers = [value for value in column if isinstance(value, int | float)]
    if any(isinstance(value, bool) for value in column) or len(numbers) < sum(
        value is not None for value in column
    ):
        return {name: [None if value is None else shown(value) for value in column]}
    if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= WIDE:
        return {f"log10 {name}": [None if v is None else math.log10(v) for v in column]}
    return {name: [None if value is None else float(value) for value in column]}


def _importances(found: Mapping[str, Any]) -> Section:
    pictures, rows = [], []
    for objective, by_key in found["importances"].items():
        if not by_key:
            continue
        names = short_names(list(by_key))
        labels = tuple(names[key] for key in by_key)
        chart = Chart(
            f"Share of the variation of {objective}",
            Axis(f"Share of the variation of {objective}", 0, 1),
            Axis("", -0.5, len(labels) - 0.5, names=labels),
            height=90 + 30 * len(labels),
        )
        for place, (key, share) in enumerate(by_key.items()):
            chart.line([(share["low"], place), (share["high"], place)], colour(0))
            tip = f"{key}: {number(share['value'])}"
            chart.dot(share["value"], place, colour(0), tip, radius=5)
            rows.append([objective, key, share["value"], share["low"], share["high"]])
        pictures.append(chart.svg())
    return Section(
        "importances",
        "Which settings mattered",
        "fANOVA: the share of an objective's variation over the trials that a setting explains by itself. Lines are "
        "the middle 90% of the same estimate on resampled trials: where they overlap, the order is not known.",
        pictures,
        ["objective", "setting", "share", "low", "high"],
        rows,
    )


def _savings(found: Mapping[str, Any]) -> Section:
    rows = [
        [stage, row["asked"], row["run"], row["seconds"], row["seconds_saved"]]
        for stage, row in found["stages"].items()
    ]
    saved = sum(row["seconds_saved"] for row in found["stages"].values())
    spent = sum(row["seconds"] for row in found["stages"].values())
    return Section(
        "stages",
        "What sharing stages saved",
        f"A stage that several trials ask for is run once: {spent:.0f} s of work in place of {spent + saved:.0f} s.",
        [],
        ["stage", "asked for", "run", "seconds", "seconds saved"],
        rows,
        folded=False,
    )


def _trials(found: Mapping[str, Any]) -> Section:
    keys, objectives = list(found["parameters"]), list(found["objectives"])
    names = short_names(keys)
    rows: list[Sequence[object]] = []
    for trial in found["trials"]:
        said = trial["reason"] or "; ".join(trial["missed"]) or "all limits held"
        rows.append(
            [
                _links(trial),
                trial["state"],
                *(_plain(trial["setting"].get(key)) for key in keys),
                *(trial["values"].get(name) for name in objectives),
                said,
            ]
        )
    return Section(
        "trials",
        "All trials",
        "Each with its settings, what it reached, and its own report.",
        [],
        ["trial", "state", *(names[key] for key in keys), *objectives, "limits"],
        rows,
        folded=False,
    )


def _links(trial: Mapping[str, Any]) -> Markup:
    """The trial's number, with a link to the report of each of its runs."""
    if trial["state"] != "complete":
        return Markup(trial["number"])
    folder = f"trials/{trial['number']}"
    seeds = trial["seeds"]
    folders = [folder] if len(seeds) == 1 else [f"{folder}/seed-{seed}" for seed in seeds]
    links = [f'<a href="{one}/eval/report.html">{trial["number"]}</a>' for one in folders]
    return Markup(" ".join(links))


def _style(found: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    if trial["number"] == found["best"]:
        return "strong"
    if trial["number"] in found["front"]:
        return "c1"
    return "c2" if trial["feasible"] else "faint"


def _legend() -> str:
    return legend(
        {
            "best": "strong",
            "on the front": "c1",
            "within the limits": "c2",
            "beyond a limit": "faint",
        }
    )


def _plain(value: object) -> object:
    """A value as a cell: numbers as they are, all else as it is written."""
    return value if isinstance(value, int | float) or value is None else shown(value)
