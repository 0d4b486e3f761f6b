"""What a card claims: every number that says how good or how safe a model is has to come with n and an interval."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# A value with its interval, as `eval.table.interval` writes one.
_NUMBER = r"-?\d+(?:\.\d+)?\s?%?"
_WITH_INTERVAL = re.compile(rf"{_NUMBER}\s\[{_NUMBER}, {_NUMBER}\]")
# What says how sure a number is, and is none itself.
_CONFIDENCE = re.compile(
    r"\b\d+(?:\.\d+)?\s?% (?:confidence|intervals?|power|of the time|of (?:all )?(?:samples|runs))",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\d\s?%")
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")
_MEASURES = re.compile(
    r"\b(accura\w+|exact match|f1|pass@\d+|perplexity|rates?|scor(?:e[sd]?|ing)|mmlu|gsm8k|gpqa|hellaswag|arc|"
    r"truthfulqa|winogrande|ifeval|bbh|humaneval)\b",
    re.IGNORECASE,
)
_COUNT = re.compile(r"\bn\s*=\s*\d", re.IGNORECASE)
# Heads of a column that says how many were measured.
_COUNT_HEADS = {"n", "items", "prompts", "tokens"}
_MODEL_HEADS = {
    "original",
    "abliterated",
    "healed",
    "score",
    "accuracy",
    "value",
    "base",
    "this model",
}


def claim_problems(body: str) -> Iterator[str]:
    """What the text of a card claims without n or interval.

    Args:
        body: the card behind its front matter.
    """
    text = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().splitlines()
        if len(lines) > 1 and lines[0].lstrip().startswith("|"):
            yield from _table_problems([_cells(line) for line in lines])
        else:
            for line in _sentences(lines):
                yield from _prose_problems(line)


def _sentences(lines: Sequence[str]) -> list[str]:
    """A list's entries one by one, other lines joined to their paragraph."""
    joined: list[str] = []
    for line in lines:
        if joined and not line.lstrip().startswith(("-", "*", "#")):
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def _prose_problems(line: str) -> Iterator[str]:
    rest = _CONFIDENCE.sub("", _WITH_INTERVAL.sub("", line))
    if _PERCENT.search(rest) or (_MEASURES.search(rest) and _DECIMAL.search(rest)):
        yield f'README.md: "{_short(line)}" gives a number without its interval; write it as 0.930 [0.900, 0.950]'
    elif _WITH_INTERVAL.search(line) and not _COUNT.search(line):
        yield f'README.md: "{_short(line)}" gives a number without its n; write n = 300'


def _table_problems(table: Sequence[Sequence[str]]) -> Iterator[str]:
    heads = [cell.lower() for cell in table[0]]
    body = [row for row in table[1:] if not all(set(cell) <= set("-: ") for cell in row)]
    numbers = [
        cell for row in body for cell in row if _DECIMAL.search(cell) or _PERCENT.search(cell)
    ]
    # What a gate asks for and what was found is in another table with n and interval.
    if not numbers or heads[0] == "gate":
        return
    where = f'README.md: the table "{_short(" | ".join(table[0]))}"'
    if not _COUNT_HEADS & set(heads):
        yield f"{where} says nowhere how many were measured; add a column n"
    is_scored = bool(_MODEL_HEADS & set(heads))
    if is_scored and not any(_WITH_INTERVAL.search(cell) for cell in numbers):
        yield f"{where} gives numbers without intervals; write them as 0.930 [0.900, 0.950]"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 80 else text[:77] + "..."


def index_problems(index: object, results: Mapping[str, Any]) -> Iterator[str]:
    """What the metadata claims without n and interval, or otherwise than the evaluation.

    Args:
        index: `model-index` of the front matter.
        results: as in results.json.
    """
    measured = {row["name"]: row for kind in ("benchmarks", "refusal") for row in results[kind]}
    for name, metric in _metrics(index):
        where = f"README.md: model-index: {name}"
        args = metric.get("args")
        if not isinstance(args, Mapping) or not {"n", "low", "high"} <= set(args):
            yield f"{where} has no n, low and high in its args: a claim needs its number of items and its interval"
            continue
        row = measured.get(name)
        if row is None:
            yield f"{where} is not in results.json; delete it, or measure it"
        elif any(
            abs(float(said) - float(found)) > 1e-4
            for said, found in (
                (metric.get("value", "nan"), row["healed"]["value"]),
                (args["n"], row["n"]),
                (args["low"], row["healed"]["low"]),
                (args["high"], row["healed"]["high"]),
            )
        ):
            yield f"{where} claims another number than results.json; write the card again"


def _metrics(index: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for model in index if isinstance(index, list) else []:
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                yield str(result.get("dataset", {}).get("name")), metric
