"""What would stop a study, or make it senseless, found before anything runs."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common.errors import HealingError, RecipeError
from common.recipe import Recipe, StudySection
from train.study import Road, limits_of, section_of
from train.study_space import Setting, extremes, overrides, shown
from train.study_storage import check_sampler, check_storage

if TYPE_CHECKING:
    from train.run import Plan

# The only objective that quick evaluations measure, and so the only one to prune by.
RECOVERY = "pooled.recovery.value"
# What is not for a trial to decide.
UNTRIED = ("name", "seed", "study", "output_dir", "processes", "tracking", "release")


def check(plan: "Plan", road: Road, given: Sequence[str], until: str) -> list[str]:
    """What would stop a study or make it senseless, each with its dotted key.

    Args:
        plan: of the recipe as it stands.
        road: of `train/run.py`.
        given: `key=value` pairs of the command line.
        until: the last stage that was asked for.
    """
    section = section_of(plan.recipe)
    problems = list(_command_problems(section, given, until))
    if plan.recipe.eval.part != "all":
        problems.append("eval.part: is set by the study for each of its evaluations; delete it")
    problems += check_sampler(section)
    if section.storage is not None and (problem := check_storage(section.storage)):
        problems.append(f"study.storage: {problem}")
    if section.pruner is not None and plan.recipe.train.stopping is None:
        problems.append(
            "study.pruner: prunes by quick evaluations, which this recipe does not make; add train.stopping, or "
            "delete it"
        )
    if section.pruner is not None and list(section.objectives) != [RECOVERY]:
        problems.append(
            f"study.pruner: quick evaluations measure recovery; make {RECOVERY} the objective, or delete it"
        )
    problems += [
        problem
        for part in ("search", "confirmation", "test")
        for problem in _problems_of(road, [f"eval.part={part}"])
    ]
    problems += _result_problems(plan.recipe, road)
    for key in section.parameters:
        problems += _value_problems(section, key, road)
    return problems


def _command_problems(section: StudySection, given: Sequence[str], until: str) -> Iterator[str]:
    if until not in ("eval", "release"):
        yield f"study: trials are judged by their evaluation, so --until {until} is too early; delete it"
    for key in section.parameters:
        if key.split(".")[0] in UNTRIED or key == "eval.part":
            yield f"study.parameters.{key}: is no setting of a trial; delete it (study.seeds repeats trials)"
    for text in given:
        key = text.partition("=")[0].strip()
        if key in section.parameters:
            yield f"study.parameters.{key}: is tried by the study, so {text} has no effect; delete one of the two"


def _result_problems(recipe: Recipe, road: Road) -> list[str]:
    """Objectives and constraints on what is not measured, found by the checks that gates pass."""
    section = section_of(recipe)
    gates = {name: {"min": 0} for name in section.objectives} | {
        name: limit.model_dump(exclude_none=True) for name, limit in limits_of(recipe).items()
    }
    return [
        f"study.{'objectives' if name in section.objectives else 'constraints'}: {text}"
        for name, limit in gates.items()
        for text in _problems_of(road, [f"eval.accept={json.dumps({name: limit})}"])
    ]


def _value_problems(section: StudySection, key: str, road: Road) -> list[str]:
    """What the recipe's own checks say to the values of one parameter, each laid over the recipe alone."""
    beside = _beside(section, key)
    return [
        f"study.parameters.{key}: {shown(value)}: {text}"
        for value in extremes(section.parameters[key])
        for text in _problems_of(road, overrides({**beside, key: value}))
    ]


def _beside(section: StudySection, key: str) -> Setting:
    """Choices of other parameters under which a parameter is tried at all."""
    found: Setting = {}
    for other, values in section.parameters[key].when.items():
        found |= {**_beside(section, other), other: values[0]}
    return found


def _problems_of(road: Road, changes: Sequence[str]) -> list[str]:
    try:
        road.make_plan([*changes, "study=null"])
    except RecipeError as error:
        marks = [f"override {change}: " for change in changes]
        return [_without(problem, marks) for problem in error.problems]
    except HealingError as error:
        return [str(error)]
    return []


def _without(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.removeprefix(mark)
    return text
