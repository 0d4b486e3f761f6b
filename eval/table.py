"""The table at the end of an evaluation: aligned text for the screen, Markdown for the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Block:
    """One table: a short name, a title, the heads of its columns, and its cells."""

    name: str
    title: str
    heads: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def screen_table(results: Mapping[str, Any]) -> str:
    """The results as aligned text."""
    return "\n\n".join([*(aligned(block) for block in blocks(results)), *_remarks(results)])


def card_tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown tables."""
    return "\n\n".join([*(markdown(block) for block in blocks(results)), *_remarks(results)])


def blocks(results: Mapping[str, Any]) -> list[Block]:
    """The tables of an evaluation; one that would be empty is left out."""
    found = [
        _benchmarks(results),
        _suites(results),
        _refusal(results),
        _divergence(results),
        _cross_entropy(results),
        _gates(results),
    ]
    return [block for block in found if block.cells]


def interval(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    """An estimate with its interval: `0.930 [0.900, 0.950]`, or a dash where nothing was measured."""
    if estimate is None:
        return "-"
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _benchmarks(results: Mapping[str, Any]) -> Block:
    heads = (
        "benchmark",
        "n",
        "original",
        "abliterated",
        "healed",
        "healed - original",
        "MDE",
        "flips",
        "recovery",
        "verdict",
    )
    return Block(
        "benchmarks",
        "Benchmarks (rate, 95 % interval; differences are paired)",
        heads,
        tuple(
            (
                f"{row['name']} ({row['metric']}{', unlocked' if row['role'] == 'unlocked' else ''})",
                str(row["n"]),
                *(interval(row[model]) for model in ("original", "abliterated", "healed")),
                interval(row["gap"]),
                _number(row.get("minimum_detectable_effect"), 3),
                _flips(row.get("flips")),
                interval(row["recovery"], 2),
                row["verdict"],
            )
            for row in results["benchmarks"]
        ),
    )


def _suites(results: Mapping[str, Any]) -> Block:
    rows = [
        row
        for suite in results.get("suites", [])
        for row in (
            *({**group, "name": f"{suite['name']}: {group['name']}"} for group in suite["groups"]),
            {**suite, "name": f"{suite['name']}: average"},
        )
    ]
    return Block(
        "suites",
        "Suites (averages as published, 95 % interval; differences are paired)",
        ("suite", "tasks", "n", "original", "abliterated", "healed", "healed - original"),
        tuple(
            (
                row["name"],
                str(row["num_tasks"]),
                str(row["n"]),
                *(interval(row[model]) for model in ("original", "abliterated", "healed")),
                interval(row["gap"]),
            )
            for row in rows
        ),
    )


def _refusal(results: Mapping[str, Any]) -> Block:
    return Block(
        "refusal",
        "Refusals (rate, 95 % interval)",
        ("panel", "n", "original", "abliterated", "healed"),
        tuple(
            (
                f"{row['name']} ({'harmless: over-refusal' if row['harmless'] else 'refused by the original'})",
                str(row["n"]),
                *(interval(row[model]) for model in ("original", "abliterated", "healed")),
            )
            for row in results["refusal"]
        ),
    )


def _divergence(results: Mapping[str, Any]) -> Block:
    def cells(row: Mapping[str, Any], model: str) -> tuple[str, ...]:
        kl = row[model]
        return (
            f"{row['name']}, {model}",
            str(row["num_tokens"]),
            *(f"{kl[key]:.4f}" for key in ("mean_kl", "median_kl", "p99_kl", "first_token_kl")),
            _number(kl.get("reverse", {}).get("mean_kl"), 4),
            f"{kl['top1_agreement']:.3f}",
        )

    return Block(
        "divergence",
        "Divergence from the original on its own answers (KL in nats per token)",
        (
            "panel, model",
            "tokens",
            "mean",
            "median",
            "p99",
            "first token",
            "reverse mean",
            "same top token",
        ),
        tuple(
            cells(row, model)
            for row in results["divergence"]
            for model in ("abliterated", "healed")
        ),
    )


def _cross_entropy(results: Mapping[str, Any]) -> Block:
    return Block(
        "cross_entropy",
        "Cross-entropy of plain text (nats per token, 95 % interval; lower is better)",
        ("text", "tokens", "original", "abliterated", "healed", "healed - original"),
        tuple(
            (
                row["name"],
                str(row["num_tokens"]),
                *(interval(row[key]) for key in ("original", "abliterated", "healed", "gap")),
            )
            for row in results.get("cross_entropy", ())
        ),
    )


def _flips(counts: Mapping[str, int] | None) -> str:
    """Items that the edit broke, how many of them healing fixed, and how many it broke itself: `-12+9-1`."""
    if counts is None:
        return "-"
    return f"-{counts['broken']}+{counts['fixed']}-{counts['newly_broken']}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _gates(results: Mapping[str, Any]) -> Block:
    return Block(
        "gates",
        "Gates",
        ("gate", "value", "limit", "outcome"),
        tuple(
            (
                gate["name"],
                "not measured" if gate["value"] is None else f"{gate['value']:.4g}",
                f"{'at least' if gate['bound'] == 'min' else 'at most'} {gate['limit']:.4g}",
                "passed" if gate["passed"] else "missed",
            )
            for gate in results["accept"]["gates"]
        ),
    )


def _remarks(results: Mapping[str, Any]) -> list[str]:
    remarks = []
    pooled = results["pooled"]
    if pooled["recovery"] is not None:
        remarks.append(
            f"Recovery of all damaged capabilities together ({', '.join(pooled['benchmarks'])}; n "
            f"= {pooled['n']}): "
            f"{interval(pooled['recovery'], 2)} of {interval(pooled['damage'])}."
        )
    if any(row.get("flips") for row in results["benchmarks"]):
        remarks.append(
            "MDE: the smallest difference of healed and original that as many items show with 80 % "
            "power.\nflips: items that the edit broke, of them fixed by healing, newly broken by it."
        )
    remarks += _direction_remarks(results["direction"])
    if any(row["role"] == "unlocked" for row in results["benchmarks"]):
        remarks.append(
            "unlocked: answerable only after the edit; the verdict holds healed against "
            "abliterated."
        )
    return remarks


def _direction_remarks(direction: Mapping[str, Any]) -> list[str]:
    """One line per form of the weights, and one for the direction as it is found again."""
    remarks = []
    forms = {
        "residual": "",
        "residual_bfloat16": ", weights in bfloat16",
        "residual_nf4": ", quantized to NF4",
    }
    for key, form in forms.items():
        residual = direction.get(key)
        if residual is not None:
            remarks.append(
                f"Largest share of the original's writing along the removed direction{form}: "
                f"{residual['abliterated']:.1e} left by the edit, {residual['healed']:.1e} moved by "
                f"healing."
            )
    again = direction.get("reestimated")
    if again is not None and again["reason"] is None:
        found = ", ".join(
            f"{model} {again[model]['cosine']:+.3f} ({again[model]['norm_ratio']:.2f})"
            for model in ("original", "abliterated", "healed")
        )
        remarks.append(
            "Cosine of the direction, estimated again, with the removed one (and its length "
            f"relative to the original's): {found}."
        )
    elif again is not None:
        remarks.append(f"The direction was not estimated again: {again['reason']}.")
    return remarks


def aligned(block: Block) -> str:
    """A table as aligned text."""
    lines = [block.heads, *block.cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(block.heads))]
    rule = tuple("-" * width for width in widths)
    body = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [block.heads, rule, *block.cells]
    )
    return "\n".join([block.title, *body])


def markdown(block: Block) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(" --- " for _ in block.heads) + "|"
    return "\n".join(
        [f"**{block.title}**", "", line(block.heads), rule, *(line(cells) for cells in block.cells)]
    )
