"""The results of several runs in one table: what was measured down the side, the runs across."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError
from eval.table import Block, aligned, interval, markdown

Results = Mapping[str, Any]
Cell = Callable[[Results], str]
MODELS = ("original", "abliterated", "healed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "results", type=Path, nargs="+", help="folders of runs or releases, or results.json files"
    )
    parser.add_argument("--markdown", action="store_true", help="as Markdown instead of columns")


def run(options: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        InputError: if a file is missing, damaged or of another version.
    """
    runs = dict(zip(_names(options.results), map(read, options.results), strict=True))
    show = markdown if options.markdown else aligned
    print("\n\n".join([*(show(block) for block in blocks(runs)), *remarks(runs)]))


def read(path: Path) -> Results:
    """The results of a run's folder, an evaluation's or a release's, or of the file itself.

    Raises:
        InputError: if there are none that can be read.
    """
    places = [path, path / "results.json", path / "eval" / "results.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise InputError(
            f"{path} holds no results.json, nor eval/results.json; name a run whose evaluation is finished"
        )
    from eval.results import validate  # noqa: PLC0415  # slow to import

    try:
        found: Results = json.loads(file.read_text(encoding="utf-8"))
        validate(found)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file} holds no results that can be read ({str(error)[:160]}); evaluate again"
        ) from error
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each column: the folder's; the whole path where two are alike."""
    short = [_folder(path) for path in paths]
    return [
        str(path) if short.count(name) > 1 else name
        for path, name in zip(paths, short, strict=True)
    ]


def _folder(path: Path) -> str:
    folder = path.resolve().parent if path.is_file() else path.resolve()
    return (folder.parent if folder.name in ("eval", "release") else folder).name


def blocks(runs: Mapping[str, Results]) -> list[Block]:
    """One table for each kind of result, with a row for everything that any run has measured.

    Args:
        runs: results by the runs' names.
    """
    found = [_benchmarks(runs), _refusal(runs), _divergence(runs), _pooled(runs)]
    return [block for block in found if block.cells]


def _benchmarks(runs: Mapping[str, Results]) -> Block:
    def cells(name: str) -> Iterable[tuple[str, Cell]]:
        yield f"{name}, n", _of("benchmarks", name, lambda row: str(row["n"]))
        for model in MODELS:
            yield f"{name}, {model}", _of("benchmarks", name, _rate(model))
        yield f"{name}, recovery", _of("benchmarks", name, lambda row: interval(row["recovery"], 2))
        yield f"{name}, verdict", _of("benchmarks", name, lambda row: str(row["verdict"]))

    return _block("benchmarks", "Benchmarks (rate, 95 % interval)", runs, "benchmarks", cells)


def _refusal(runs: Mapping[str, Results]) -> Block:
    def cells(name: str) -> Iterable[tuple[str, Cell]]:
        yield f"{name}, n", _of("refusal", name, lambda row: str(row["n"]))
        for model in MODELS:
            yield f"{name}, {model}", _of("refusal", name, _rate(model))

    return _block("refusal", "Refusals (rate, 95 % interval)", runs, "refusal", cells)


def _divergence(runs: Mapping[str, Results]) -> Block:
    def cells(name: str) -> Iterable[tuple[str, Cell]]:
        yield f"{name}, tokens", _of("divergence", name, lambda row: str(row["num_tokens"]))
        for model in MODELS[1:]:
            yield f"{name}, {model}, mean", _of("divergence", name, _kl(model, "mean_kl"))
            yield f"{name}, {model}, p99", _of("divergence", name, _kl(model, "p99_kl"))

    title = "Divergence from the original (KL in nats per token)"
    return _block("divergence", title, runs, "divergence", cells)


def _pooled(runs: Mapping[str, Results]) -> Block:
    rows: list[tuple[str, Cell]] = [
        ("n", lambda results: str(results["pooled"]["n"])),
        ("benchmarks", lambda results: ", ".join(results["pooled"]["benchmarks"]) or "-"),
        ("damage", lambda results: interval(results["pooled"]["damage"])),
        ("recovery", lambda results: interval(results["pooled"]["recovery"], 2)),
        ("gates", lambda results: "passed" if results["accept"]["passed"] else "missed"),
    ]
    lines = tuple((label, *(cell(results) for results in runs.values())) for label, cell in rows)
    title = "All damaged capabilities together (95 % interval)"
    return Block("pooled", title, ("", *runs), lines)


def _block(
    name: str,
    title: str,
    runs: Mapping[str, Results],
    kind: str,
    cells: Callable[[str], Iterable[tuple[str, Cell]]],
) -> Block:
    lines = tuple(
        (label, *(cell(results) for results in runs.values()))
        for measured in _measured(runs, kind)
        for label, cell in cells(measured)
    )
    return Block(name, title, ("", *runs), lines)


def _measured(runs: Mapping[str, Results], kind: str) -> list[str]:
    """The names of the rows of a kind, in the order in which the runs first have them."""
    return list(dict.fromkeys(row["name"] for results in runs.values() for row in results[kind]))


def _of(kind: str, name: str, show: Callable[[Mapping[str, Any]], str]) -> Cell:
    """What a run's row of that name shows; a dash where it has none."""

    def cell(results: Results) -> str:
        row = _row(results, kind, name)
        return "-" if row is None else show(row)

    return cell


def _row(results: Results, kind: str, name: str) -> Mapping[str, Any] | None:
    return next((row for row in results[kind] if row["name"] == name), None)


def _rate(model: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: interval(row[model])


def _kl(model: str, key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[model][key]:.4f}"


def remarks(runs: Mapping[str, Results]) -> list[str]:
    """What must be known before two columns are held against each other."""
    found = [
        f"{kind}, {name}: not the same items, or not the same original, in all runs ({shown}): a difference between "
        "them need not come from the edit or the healing."
        for kind, key in (("benchmarks", "n"), ("refusal", "n"), ("divergence", "num_tokens"))
        for name in _measured(runs, kind)
        if (shown := _unequal(runs, kind, name, key)) is not None
    ]
    if len(runs) > 1:
        found.append("Intervals are of each run alone; differences between runs are not paired.")
    return found


def _unequal(runs: Mapping[str, Results], kind: str, name: str, key: str) -> str | None:
    """How the runs differ in what the original was asked and did; None where they do not.

    The same items put to the same original give the same rate and the same mean log-probability of right answers.
    """
    rows = {run: row for run, results in runs.items() if (row := _row(results, kind, name))}
    marks = {run: _marks(row, key) for run, row in rows.items()}
    if len(set(marks.values())) < 2:
        return None
    counts = {run: row[key] for run, row in rows.items()}
    if len(set(counts.values())) > 1:
        return "; ".join(f"{run}: {count}" for run, count in counts.items())
    return f"{key} = {next(iter(counts.values()))} in each"


def _marks(row: Mapping[str, Any], key: str) -> tuple[float | None, ...]:
    original = row.get("original") or {}
    logps = row.get("answer_logp") or {}
    return row[key], original.get("value"), _digits(logps.get("original"))


def _digits(value: float | None) -> float | None:
    """Rounded to what two machines agree on."""
    return None if value is None else round(value, 3)
