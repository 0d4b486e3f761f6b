"""Benchmarks and gates on the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.webpage import Markup, Section
from eval.items import MODELS
from eval.report import pictures
from eval.report.figures import TITLES, estimate, figure, joined

Row = Mapping[str, Any]
# Counts of items by what changed on them.
COUNTS = {
    "broken": "Broken",
    "fixed": "Fixed",
    "still_broken": "Still broken",
    "newly_broken": "Newly broken",
}


def sections(results: Row) -> Iterator[Section]:
    """The benchmarks as a table and as a picture, and the gates."""
    if results.get("suites"):
        yield _suites(results["suites"])
    if results["benchmarks"]:
        yield _benchmarks(results)
        yield _intervals(results)
        if any(row["answer_logp"]["original"] is not None for row in results["benchmarks"]):
            yield _right_answers(results["benchmarks"])
    if results["accept"]["gates"]:
        yield _gates(results)


def _suites(suites: Sequence[Row]) -> Section:
    return Section(
        "suites",
        "Averages of suites",
        "As their tables are published, with 95 % intervals; differences are paired by item. The prompts go through "
        "the chat template, so that published figures are near and not the same.",
        [],
        ["Suite", "Tasks", "Items", *TITLES, "Abliterated - original", "Healed - original"],
        [
            line
            for suite in suites
            for line in (
                _average(f"suites[{suite['name']}]", f"{suite['name']}, average", suite),
                *(
                    _average(
                        f"suites[{suite['name']}].groups[{group['name']}]",
                        f"{suite['name']}: {group['name']}",
                        group,
                    )
                    for group in suite["groups"]
                ),
            )
        ],
        folded=False,
    )


def _average(path: str, name: str, row: Row) -> list[object]:
    return [
        name,
        figure(f"{path}.num_tasks", row["num_tasks"], "d"),
        figure(f"{path}.n", row["n"], "d"),
        *(estimate(f"{path}.{model}", row[model]) for model in MODELS),
        estimate(f"{path}.damage", row["damage"]),
        estimate(f"{path}.gap", row["gap"]),
    ]


def _benchmarks(results: Row) -> Section:
    rows = results["benchmarks"]
    counts = [
        f"{sum(row['verdict'] == verdict for row in rows)} {verdict}"
        for verdict in ("recovered", "undamaged", "not shown", "worse")
        if any(row["verdict"] == verdict for row in rows)
    ]
    noun = "benchmark" if len(rows) == 1 else "benchmarks"
    return Section(
        "benchmarks",
        f"{len(rows)} {noun}: {', '.join(counts)}",
        f"Rates with 95 % intervals; differences are paired by item. Recovered: damaged by the edit, and now not below "
        f"the original by more than {results['margin']:g}. Undamaged: no significant damage, and likewise not below. "
        "Not shown: neither can be said with so few items. The detectable difference is the smallest that would be "
        "found with 80 % power.",
        [],
        [
            "Benchmark",
            "Items",
            *TITLES,
            "Healed - original",
            "Detectable",
            "Recovery",
            "Verdict",
        ],
        [_benchmark(row) for row in rows],
        folded=False,
    )


def _benchmark(row: Row) -> list[object]:
    path = f"benchmarks[{row['name']}]"
    name = joined([row["name"], Markup(f" <small>{_about(row)}</small>")], "")
    # The name of the field before it was given this one.
    smallest = "minimum_detectable_effect" if "minimum_detectable_effect" in row else "mde"
    return [
        name,
        figure(f"{path}.n", row["n"], "d"),
        *(estimate(f"{path}.{model}", row[model]) for model in MODELS),
        estimate(f"{path}.gap", row["gap"]),
        figure(f"{path}.{smallest}", row[smallest]),
        estimate(f"{path}.recovery", row["recovery"], ".2f"),
        Markup(f'<span class="verdict {row["verdict"].replace(" ", "-")}">{row["verdict"]}</span>'),
    ]


def _about(row: Row) -> str:
    return f"{row['metric']}{', unlocked' if row['role'] == 'unlocked' else ''}"


def _intervals(results: Row) -> Section:
    rows = results["benchmarks"]
    return Section(
        "intervals",
        "What the edit took, and what is missing after healing",
        "Differences from the original, paired by item. An interval that reaches across 0 shows no difference; one "
        "that ends to the right of the dashed margin is not inferior. Of what only the edit unlocked, healed is held "
        "against the abliterated model.",
        [pictures.forest(rows, results["margin"])],
        [
            "Benchmark",
            *("Abliterated - original", "p (Holm)", "Healed - abliterated", "p (Holm)"),
            *COUNTS.values(),
        ],
        [_changes(row) for row in rows],
    )


def _changes(row: Row) -> list[object]:
    path, counts = f"benchmarks[{row['name']}]", row.get("flips") or {}
    return [
        row["name"],
        estimate(f"{path}.damage", row["damage"]),
        figure(f"{path}.damage.p_adjusted", row["damage"]["p_adjusted"], ".2g"),
        estimate(f"{path}.gain", row["gain"]),
        figure(f"{path}.gain.p_adjusted", row["gain"]["p_adjusted"], ".2g"),
        *(figure(f"{path}.flips.{name}", counts.get(name), "d") for name in COUNTS),
    ]


def _right_answers(rows: Sequence[Row]) -> Section:
    return Section(
        "right-answers",
        "How likely the right answer is",
        "Mean log-probability of the right answer, in nats. It falls before answers turn wrong.",
        [],
        ["Benchmark", *TITLES, "Abliterated - original", "Healed - original"],
        [
            [
                row["name"],
                *(
                    figure(f"{path}.answer_logp.{model}", row["answer_logp"][model])
                    for model in MODELS
                ),
                *(
                    estimate(f"{path}.answer_logp_change.{key}", changes.get(key))
                    for key in ("damage", "gap")
                ),
            ]
            for row in rows
            for path in [f"benchmarks[{row['name']}]"]
            for changes in [row.get("answer_logp_change") or {}]
        ],
        folded=False,
    )


def _gates(results: Row) -> Section:
    gates = results["accept"]["gates"]
    held = sum(gate["passed"] for gate in gates)
    return Section(
        "gates",
        f"{held} of {len(gates)} gates hold",
        "Limits of the recipe on fields of results.json. A missed one stops the release.",
        [],
        ["Gate", "Value", "Limit", "Outcome"],
        [
            (
                gate["name"],
                figure(f"accept.gates[{gate['name']}].value", gate["value"], ".4g"),
                f"{'at least' if gate['bound'] == 'min' else 'at most'} {gate['limit']:.4g}",
                "holds" if gate["passed"] else "missed",
            )
            for gate in gates
        ],
        folded=False,
    )
