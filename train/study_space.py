"""What a study tries: the recipe's keys with their values, as Optuna's distributions and as settings of a trial.

A setting is by key the value that goes into the recipe. Optuna keeps words, numbers and truth values; a choice of
another form (a list, a mapping) is kept as its JSON text. Numbers of a range are rounded, or trials would never have
a stage in common: to two digits where they are drawn by their logarithm, else to ten to a hundred values.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from common.recipe import Parameter

Setting = dict[str, Any]

# The stages in the order in which a recipe runs them, by the sections of the recipe that each reads first.
SECTIONS: Mapping[str, int] = {"model": 0, "abliteration": 0, "seed": 0, "train": 1}


@dataclass(frozen=True)
class Space:
    """The parameters of a study.

    Attributes:
        parameters: by dotted key; a key stands behind those that it depends on.
    """

    parameters: Mapping[str, Parameter]

    def suggest(self, trial: Trial) -> Setting:
        """Draw a setting, or read back the one that a trial has been given before."""
        setting: Setting = {}
        for key, parameter in self.parameters.items():
            if applies(parameter, setting):
                drawn = _suggest(trial, key, distribution(parameter))
                setting[key] = value_of(parameter, drawn)
        return setting

    def grid(self) -> list[Setting]:
        """Every combination, with those next to each other that have early stages in common."""
        keys = sorted(self.parameters, key=_stage)
        found: list[Setting] = []
        for values in itertools.product(*(list_values(self.parameters[key]) for key in keys)):
            whole = dict(zip(keys, values, strict=True))
            setting = {
                key: whole[key]
                for key, parameter in self.parameters.items()
                if self._applies_in(parameter, whole)
            }
            if setting not in found:
                found.append(setting)
        return found

    def stored(self, setting: Setting) -> dict[str, Any]:
        """The setting in Optuna's form, to be enqueued."""
        return {
            key: _encode(value) if self.parameters[key].choices is not None else value
            for key, value in setting.items()
        }

    def size(self, depth: int) -> float:
        """How many settings there are up to a stage (0: abliteration, 1: train, 2: eval); inf if without limit."""
        counts = [
            len(list_values(parameter)) if _is_listed(parameter) else math.inf
            for key, parameter in self.parameters.items()
            if _stage(key) <= depth
        ]
        return math.prod(counts)

    def _applies_in(self, parameter: Parameter, whole: Setting) -> bool:
        """Whether a parameter counts in a combination, given that its own conditions may not count either."""
        return applies(parameter, whole) and all(
            self._applies_in(self.parameters[other], whole) for other in parameter.when
        )


def applies(parameter: Parameter, setting: Setting) -> bool:
    """Whether a parameter is tried beside what has been chosen."""
    return all(key in setting and setting[key] in values for key, values in parameter.when.items())


def distribution(parameter: Parameter) -> BaseDistribution:
    """The parameter as Optuna knows it."""
    if parameter.choices is not None:
        return CategoricalDistribution([_encode(choice) for choice in parameter.choices])
    low, high, step = parameter.low, parameter.high, parameter.step
    assert low is not None
    assert high is not None
    if parameter.whole:
        return IntDistribution(int(low), int(high), log=parameter.log, step=int(step or 1))
    return FloatDistribution(float(low), float(high), log=parameter.log, step=step)


def value_of(parameter: Parameter, drawn: Any) -> Any:  # noqa: ANN401  # as the recipe's key takes it
    """The value that goes into the recipe, from Optuna's."""
    if parameter.choices is not None:
        return next(choice for choice in parameter.choices if _encode(choice) == drawn)
    if parameter.whole:
        return int(drawn)
    assert parameter.low is not None
    assert parameter.high is not None
    return float(min(max(_snapped(parameter, drawn), parameter.low), parameter.high))


def list_values(parameter: Parameter) -> list[Any]:
    """All values of a parameter that has choices, a step or whole numbers."""
    if parameter.choices is not None:
        return list(parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    step = parameter.step or 1
    count = math.floor((parameter.high - parameter.low) / step + 1e-9) + 1
    return [value_of(parameter, parameter.low + index * step) for index in range(count)]


def extremes(parameter: Parameter) -> list[Any]:
    """What the schema is asked about: every choice, or both ends of a range."""
    if parameter.choices is not None:
        return list(parameter.choices)
    assert parameter.low is not None
    assert parameter.high is not None
    return [value_of(parameter, parameter.low), value_of(parameter, parameter.high)]


def overrides(setting: Mapping[str, Any]) -> list[str]:
    """The setting as `key=value` pairs behind a recipe."""
    return [f"{key}={json.dumps(value)}" for key, value in setting.items()]


def same_start(setting: Setting) -> str:
    """A name that two settings share if and only if they ask the same of stage one."""
    return json.dumps({key: setting[key] for key in sorted(setting) if _stage(key) == 0})


def in_words(setting: Mapping[str, Any]) -> str:
    """The setting in one line, keys shortened as far as they stay distinct."""
    names = short_names([*setting])
    return ", ".join(f"{names[key]}={shown(value)}" for key, value in setting.items())


def shown(value: object) -> str:
    """A value as a person writes it in a recipe."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last words: as few as tell it from the others."""

    def ending(key: str, length: int) -> str:
        return ".".join(key.split(".")[-length:])

    names = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        alone = (
            ending(key, length)
            for length in lengths
            if sum(ending(other, length) == ending(key, length) for other in set(keys)) == 1
        )
        names[key] = next(alone, key)
    return names


def _suggest(trial: Trial, key: str, known: BaseDistribution) -> Any:  # noqa: ANN401  # of the distribution's kind
    if isinstance(known, CategoricalDistribution):
        return trial.suggest_categorical(key, known.choices)
    if isinstance(known, IntDistribution):
        return trial.suggest_int(key, known.low, known.high, step=known.step, log=known.log)
    assert isinstance(known, FloatDistribution)
    return trial.suggest_float(key, known.low, known.high, step=known.step, log=known.log)


def _encode(choice: object) -> str | float | int | bool | None:
    return choice if isinstance(choice, str | float | int | bool | None) else json.dumps(choice)


def _is_listed(parameter: Parameter) -> bool:
    return parameter.choices is not None or parameter.step is not None or parameter.whole


def _snapped(parameter: Parameter, drawn: float) -> float:
    """The nearest of the values that a range is tried at."""
    if parameter.log:
        return float(f"{drawn:.2g}")
    if parameter.step is None:
        assert parameter.low is not None
        assert parameter.high is not None
        width = parameter.high - parameter.low
        drawn = round(drawn, -math.floor(math.log10(width / 10) + 1e-9))
    return float(f"{drawn:.12g}")  # 0.30000000000000004 is 0.3


def _stage(key: str) -> int:
    """The first stage that a key changes: 0 abliteration, 1 train, 2 eval."""
    return SECTIONS.get(key.split(".")[0].split("[")[0], 2)
