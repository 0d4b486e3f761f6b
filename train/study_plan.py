"""The plan of a study that `--check` prints: the tree of its stages, and what they cost with and without sharing."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common.model import resolve, weight_files
from common.recipe import Recipe
from train.study import Road, changes_of, first_settings, limits_of, section_of
from train.study_space import Setting, Space, in_words

if TYPE_CHECKING:
    from train.run import Plan

STAGES = ("abliteration", "train", "eval")
GIB = 2**30
# Longer trees are cut.
MOST_LINES = 60


def plan_lines(plan: "Plan", road: Road) -> list[str]:
    """The plan in words.

    Args:
        plan: of the recipe as it stands.
        road: of `train/run.py`.
    """
    recipe, section = plan.recipe, section_of(plan.recipe)
    settings = first_settings(recipe) if section.sampler_name == "GridSampler" else []
    trials = str(len(settings) or section.num_trials or "any number of")
    seeds = f", {section.seeds} seeds each" if section.seeds > 1 else ""
    lines = [
        f"study {recipe.name}: {trials} trials by {section.sampler_name}{seeds} -> {recipe.output_dir}/{recipe.name}"
    ]
    for name, direction in section.objectives.items():
        lines.append(f"  {direction} {name}")
    limits = limits_of(recipe)
    lines += [f"  within {name}: {_bounds(limit)}" for name, limit in limits.items()]
    if not limits:
        lines.append("  within no limits: a trial whose model refuses counts like any other")
    lines += _grid_lines(recipe, road, settings) if settings else _space_lines(recipe)
    again = section.confirmation_seeds
    lines.append(
        f"  then          the best trial again with {again} new seeds on new items, and its evaluation and release"
    )
    lines.append(f"  disk          {_disk_line(recipe, len(settings))}")
    return lines


def _disk_line(recipe: Recipe, num_settings: int) -> str:
    """The room that whole models take: edited ones, those of full trainings, and the release."""
    section = section_of(recipe)
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    size = sum(file.stat().st_size for file in weight_files(base)) / GIB
    trials = num_settings or section.num_trials or math.inf
    ablations = min(trials, Space(section.parameters).size(0)) * section.seeds
    models = ablations + section.confirmation_seeds + 1
    if recipe.train.adapter is None:
        models += trials * section.seeds + section.confirmation_seeds
    if math.isinf(models):
        return f"{size:.2f} GiB for each edited model, of which there may be any number"
    return f"at most {models * size:.2f} GiB, for {models:g} whole models"


def _bounds(limit: object) -> str:
    low, high = getattr(limit, "min", None), getattr(limit, "max", None)
    parts = [f"at least {low:g}"] if low is not None else []
    return " and ".join([*parts, *([f"at most {high:g}"] if high is not None else [])])


def _grid_lines(recipe: Recipe, road: Road, settings: Sequence[Setting]) -> Iterator[str]:
    """What each stage costs, and the tree; every trial is planned in full, so what cannot run is told here."""
    seeds = range(recipe.seed, recipe.seed + section_of(recipe).seeds)
    asked = [
        (
            setting,
            seed,
            road.make_plan(changes_of(setting, name=recipe.name, seed=seed, part="search")).steps[
                :3
            ],
        )
        for setting in settings
        for seed in seeds
    ]
    for index, stage in enumerate(STAGES):
        entries = {steps[index].entry.fingerprint: steps[index].entry for _, _, steps in asked}
        done = sum(entry.complete for entry in entries.values())
        there = f", {done} of them there already" if done else ""
        yield f"  {stage:<13} {len(entries)} runs with sharing{there}, {len(asked)} without"
    seen: set[str] = set()
    lines: list[str] = []
    for setting, seed, steps in asked:
        shown = in_words(setting) + (f", seed={seed}" if len(seeds) > 1 else "")
        for depth, step in enumerate(steps):
            if step.entry.fingerprint not in seen:
                seen.add(step.entry.fingerprint)
                state = "there" if step.entry.complete else "to run"
                name = f"{'  ' * depth}{step.name}"
                lines.append(f"  {name:<18} {step.entry.fingerprint[:12]}  {state:<6}  {shown}")
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"  ... and {len(lines) - MOST_LINES} more"


def _space_lines(recipe: Recipe) -> Iterator[str]:
    """The most that each stage can cost: what is proposed is not known before trials end."""
    section, space = section_of(recipe), Space(section_of(recipe).parameters)
    trials = section.num_trials or math.inf
    for depth, stage in enumerate(STAGES):
        most = min(trials, space.size(depth)) * section.seeds
        without = trials * section.seeds
        yield (f"  {stage:<13} at most {_count(most)} runs with sharing, {_count(without)} without")


def _count(number: float) -> str:
    return "any number of" if math.isinf(number) else f"{number:g}"
