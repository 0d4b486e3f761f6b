"""How far a study is, in the terminal: its trials, the front so far, and when it may be done."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import optuna

from common.errors import InputError
from common.recipe import Recipe, StudySection, load_recipe
from train import study_choice
from train.study_choice import Record
from train.study_space import Space, in_words
from train.study_storage import JOURNAL, open_storage, record_of

# Trials of the front that are shown.
MOST_SHOWN = 10


def load(folder: Path) -> tuple[Recipe, StudySection]:
    """The recipe that a study was begun with.

    Raises:
        InputError: if the folder holds no study.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        others = sorted(found.parent.name for found in folder.parent.glob("*/study.id"))
        known = f" (studies there: {', '.join(others)})" if others else ""
        raise InputError(
            f"{folder}: there is no study{known}; name one, or its folder's parent with --output-dir"
        )
    recipe = load_recipe(path)
    if recipe.study is None:
        raise InputError(
            f"{folder}: is a single run, not a study; its results are in {folder}/eval"
        )
    return recipe, recipe.study


def read(recipe: Recipe, section: StudySection, folder: Path) -> list[Record]:
    """All trials, as in the storage at this moment."""
    if section.storage is None and not (folder / JOURNAL).is_file():
        return []
    storage = open_storage(section, folder)
    try:
        study = optuna.load_study(study_name=recipe.name, storage=storage)
    except KeyError:
        return []
    return [record_of(trial) for trial in study.get_trials(deepcopy=False)]


def lines(
    recipe: Recipe, section: StudySection, folder: Path, records: Sequence[Record]
) -> list[str]:
    """What the terminal shows."""
    counts = Counter(record.state for record in records)
    total = num_trials(section)
    told = ", ".join(f"{counts[state]} {state}" for state in study_choice.STATES if counts[state])
    of_all = f" of {total:g}" if math.isfinite(total) else ""
    shown = [
        f"study {recipe.name}: {len(records)}{of_all} trials begun or queued ({told or 'none'})"
    ]
    leading = study_choice.ranking(records, section.objectives)
    front = {record.number for record in study_choice.front(records, section.objectives)}
    shown.append(f"within all limits: {len(leading)}; on the front so far: {len(front)}")
    for record in [record for record in leading if record.number in front][:MOST_SHOWN]:
        values = ", ".join(f"{name} {value:.4f}" for name, value in record.values.items())
        shown.append(f"  trial {record.number}: {values}  ({in_words(record.setting)})")
    nearest = study_choice.closest(records, section.objectives)
    if not leading and nearest is not None:
        shown.append(f"  nearest: trial {nearest.number}, but {'; '.join(nearest.missed)}")
    if is_done(folder):
        found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        best = "none held its limits" if found["best"] is None else f"trial {found['best']}"
        return [*shown, f"done; best: {best}; see {folder}/study.html"]
    left = seconds_left(records, total)
    if left is not None:
        shown.append(f"about {timedelta(seconds=round(left))} left at this pace")
    shown.append(f"to go on, or to help: train/run.py {folder}/recipe.yaml")
    return shown


def is_done(folder: Path) -> bool:
    """Whether the study has come to its end."""
    return (folder / "study.json").is_file()


def num_trials(section: StudySection) -> float:
    """How many trials there will be; inf if only time ends them."""
    if section.sampler_name == "GridSampler":
        return len(Space(section.parameters).grid())
    return section.num_trials if section.num_trials is not None else math.inf


def seconds_left(records: Sequence[Record], total: float) -> float | None:
    """An estimate from the middle trial so far and the number of workers; None where nothing is known."""
    took = [record.seconds for record in records if record.seconds is not None]
    done = sum(record.state in ("complete", "failed", "pruned") for record in records)
    if not took or math.isinf(total):
        return None
    workers = max(sum(record.state == "running" for record in records), 1)
    return statistics.median(took) * max(total - done, 0) / workers
