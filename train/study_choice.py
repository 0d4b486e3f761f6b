"""What a study found: its trials as plain records, the front, the best of them, and what confirmation takes back.

Pure arithmetic on records; a value of None was not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from common.recipe import Limit

# Done with all values; missed nothing to measure or a stage; ended early; under way; not begun.
STATES = ("complete", "failed", "pruned", "running", "waiting")
Directions = Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """One trial.

    Attributes:
        number: from 0, in the order they were begun.
        state: one of `STATES`.
        setting: the recipe's keys with their values.
        values: objectives by field of results.json, mean over the seeds; empty unless complete.
        limited: the fields that constraints name, mean over the seeds.
        missed: what constraints and gates of the recipe were not held, in words.
        feasible: whether all constraints are held.
        reason: why it failed or was pruned.
        seconds: from its beginning to its end, waiting included.
        seeds: of its runs.
        stages: by stage the fingerprints and seconds of its runs.
        attempts: how many workers have begun it.
    """

    number: int
    state: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    limited: Mapping[str, float | None] = field(default_factory=dict)
    missed: Sequence[str] = ()
    feasible: bool = False
    reason: str | None = None
    seconds: float | None = None
    seeds: Sequence[int] = ()
    stages: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    attempts: int = 0

    def as_data(self) -> dict[str, Any]:
        """The trial as it stands in study.json."""
        return asdict(self)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean over seeds; None if one of them was not measured."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def violation(value: float | None, limit: Limit) -> float:
    """How far a value is beyond a limit: 0 or less holds it, as Optuna's constraints do."""
    if value is None:
        return 1.0
    below = limit.min - value if limit.min is not None else None
    above = value - limit.max if limit.max is not None else None
    return max(part for part in (below, above) if part is not None)


def missed(values: Mapping[str, float | None], limits: Mapping[str, Limit]) -> list[str]:
    """The limits that are not held, in words."""
    found = []
    for name, limit in limits.items():
        if violation(values.get(name), limit) > 0:
            value = values.get(name)
            said = "not measured" if value is None else f"{value:.4g}"
            bounds = [f"at least {limit.min:g}"] if limit.min is not None else []
            bounds += [f"at most {limit.max:g}"] if limit.max is not None else []
            found.append(f"{name} is {said}, limit {' and '.join(bounds)}")
    return found


def front(records: Sequence[Record], directions: Directions) -> list[Record]:
    """The trials within all limits that no other is better than in every objective."""
    within = [record for record in records if record.state == "complete" and record.feasible]
    return [
        record
        for record in within
        if not any(_dominates(other, record, directions) for other in within)
    ]


def ranking(records: Sequence[Record], directions: Directions) -> list[Record]:
    """The trials within all limits, best first.

    With one objective by its value; with several the front first, by the distance to the point that has the best
    value of every objective, each as a share of what the trials within the limits span. Ties go to the earlier.
    """
    within = [record for record in records if record.state == "complete" and record.feasible]
    leading = {record.number for record in front(records, directions)}

    def distance(record: Record) -> float:
        total = 0.0
        for name, direction in directions.items():
            column = [other.values[name] for other in within]
            span = max(column) - min(column)
            best = max(column) if direction == "maximize" else min(column)
            total += ((record.values[name] - best) / span) ** 2 if span else 0.0
        return total

    return sorted(
        within,
        key=lambda record: (record.number not in leading, distance(record), record.number),
    )


def closest(records: Sequence[Record], directions: Directions) -> Record | None:
    """The best of the trials that are beyond a limit, to be told where none is within."""
    done = [record for record in records if record.state == "complete"]
    if not done:
        return None
    fewest = min(len(record.missed) for record in done)
    near = [record for record in done if len(record.missed) == fewest]
    name, direction = next(iter(directions.items()))
    sign = -1 if direction == "maximize" else 1
    return min(near, key=lambda record: (sign * record.values[name], record.number))


def curse(
    searched: Mapping[str, float], confirmed: Mapping[str, float | None], directions: Directions
) -> dict[str, float | None]:
    """The winner's curse: by how much each objective is worse in confirmation than in the search that chose it."""
    losses: dict[str, float | None] = {}
    for name, direction in directions.items():
        again = confirmed.get(name)
        sign = 1 if direction == "maximize" else -1
        losses[name] = None if again is None else sign * (searched[name] - again)
    return losses


def savings(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By stage: how often trials asked for it, how often it was run, and the seconds that sharing saved."""
    found: dict[str, dict[str, float]] = {}
    for stage in dict.fromkeys(stage for record in records for stage in record.stages):
        runs = [run for record in records for run in record.stages.get(stage, ())]
        distinct = dict(runs)
        asked = sum(seconds for _, seconds in runs)
        found[stage] = {
            "asked": len(runs),
            "run": len(distinct),
            "seconds": sum(distinct.values()),
            "seconds_saved": asked - sum(distinct.values()),
        }
    return found


def _dominates(one: Record, other: Record, directions: Directions) -> bool:
    signs = {name: 1 if direction == "maximize" else -1 for name, direction in directions.items()}
    mine = [sign * one.values[name] for name, sign in signs.items()]
    theirs = [sign * other.values[name] for name, sign in signs.items()]
    return all(a >= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
