"""Suites of tasks by name: one YAML file adds one, and its name is its recipe key.

A file lists groups of tasks of lm-evaluation-harness with the shots, the metric and the way of averaging under which
figures have been published. What differs from the published conditions stands in the file itself.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

Weight = Literal["task", "item"]


@dataclass(frozen=True)
class Standing:
    """Where a task stands in a suite, as it is copied into its row of results.json.

    Attributes:
        name: of the suite.
        group: of the group.
        weight: whether the group is the mean of its tasks or of their items.
        chance: the rate that guessing reaches and that counts as 0; 0 leaves the rate as it is.
        num_fewshot: examples before each item.
    """

    name: str
    group: str
    weight: Weight
    chance: float
    num_fewshot: int

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """A task as it is to be measured.

    Attributes:
        name: of its row.
        task: the harness's name of a task or of a group of tasks.
        metric: the one that is reported; None: the first that is a mean of right answers.
        num_fewshot: examples before each item; None: as the task says.
        limit: items; None: all.
        num_options: a column that holds an item's options, and how many the items have that are kept; None: all are.
        standing: in a suite.
    """

    name: str
    task: str
    metric: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    num_options: tuple[str, int] | None = None
    standing: Standing | None = None


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Entry(_Section):
    task: str
    name: str | None = None
    metric: str | None = None
    chance: float = Field(default=0.0, ge=0, lt=1)
    num_options: dict[str, int] = Field(default={}, max_length=1)


class _Group(_Section):
    name: str
    metric: str
    num_fewshot: int = Field(ge=0)
    weight: Weight = "task"
    tasks: tuple[str | _Entry, ...] = Field(min_length=1)


class _File(_Section):
    limit: int | None = Field(default=None, gt=0)
    groups: tuple[_Group, ...] = Field(min_length=1)


def known() -> list[str]:
    """The suites' names."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


@cache
def load(name: str) -> tuple[Asked, ...]:
    """The tasks of a suite, in order; a group of the harness's is one entry."""
    path = Path(__file__).with_name(f"{name}.yaml")
    suite = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    return tuple(task for group in suite.groups for task in _tasks(name, suite, group))


def _tasks(suite_name: str, suite: _File, group: _Group) -> Iterator[Asked]:
    for listed in group.tasks:
        entry = listed if isinstance(listed, _Entry) else _Entry(task=listed)
        yield Asked(
            name=entry.name or entry.task,
            task=entry.task,
            metric=entry.metric or group.metric,
            num_fewshot=group.num_fewshot,
            limit=suite.limit,
            num_options=next(iter(entry.num_options.items()), None),
            standing=Standing(
                suite_name, group.name, group.weight, entry.chance, group.num_fewshot
            ),
        )
