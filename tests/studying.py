"""Studies over stages that only pretend: their results are arithmetic, and every one of their runs is on record.

As a program it is the main command with these stages: python tests/studying.py RECIPE [key=value ...]
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from common import distributed  # noqa: E402
from common.errors import StageError  # noqa: E402
from train import launch, run  # noqa: E402

# What the pretended edit strength costs, and the beta that heals best under it.
BEST_BETA = {1.0: 0.1, 2.0: 0.5}


def write_recipe(folder: Path, study: dict[str, Any], **changes: Any) -> Path:
    """A recipe with a study over a model folder that is none."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    prompts = {"path": "none.jsonl"}
    recipe = {
        "name": "trying",
        "output_dir": str(folder / "runs"),
        "model": {"name_or_path": str(model)},
        "abliteration": {
            "prompts": {"harmful": prompts, "harmless": {"path": "other.jsonl"}},
            "edit": {"name": "orthogonalize", "strength": 1.0},
        },
        "train": {
            "preferences": [{"name": "on_policy", "prompts": prompts}],
            "trainer": {"beta": 0.1, "learning_rate": 1e-3},
        },
        "eval": {
            "benchmarks": [
                {"name": "refusal", "panel": "restricted", "prompts": prompts, "harmless": False},
            ],
            "accept": {"refusal[restricted].healed.value": {"max": 0.02}},
        },
        "tracking": {"mode": "disabled"},
        "study": study,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def reward(strength: float, beta: float, seed: int = 0, part: str = "search") -> float:
    """The recovery that the pretended stages find; the search is luckier than what comes after it."""
    luck = 0.05 if part == "search" else 0.0
    best = BEST_BETA.get(strength, 0.1)
    return 0.9 - abs(beta - best) - 0.1 * (strength - 1) + luck - 0.001 * seed


def pretended() -> dict[str, Any]:
    """The four stages."""
    return {
        name: SimpleNamespace(
            VERSION=1,
            check=lambda _recipe: [],
            inputs=inputs,
            run=do,
            prompts_used=lambda _recipe: [],
            items=lambda _recipe: {},
            part_problems=lambda _recipe, _items: [],
        )
        for name, inputs, do in (
            (
                "abliteration",
                lambda recipe: {"edit": recipe.abliteration.edit.strength},
                _abliterate,
            ),
            ("train", lambda recipe, _excluded: {"trainer": recipe.train.trainer}, _train),
            (
                "eval",
                lambda recipe: {
                    "part": recipe.eval.part,
                    "accept": {name: limit.max for name, limit in recipe.eval.accept.items()},
                },
                _evaluate,
            ),
            ("release", lambda _recipe: {}, _release),
        )
    }


def install() -> None:
    """Put the pretended stages in the place of the real ones."""
    run._stages = pretended
    run._report = lambda _plan, _stage: None
    launch.models_fit = lambda _recipe: True  # there are none


def runs_of(log: Path) -> Counter[str]:
    """How often each stage was run to its end."""
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def _done(stage: str, folder: Path, **about: Any) -> None:
    """Take the time that is asked for, leave a result, and put it on record; on the main process."""
    if not distributed.is_main():
        return
    seconds = float(os.environ.get("STUDY_SECONDS", "0"))
    (folder / "half.json").write_text("begun")
    if os.environ.get("STUDY_KILL") == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    (folder / "half.json").unlink()
    (folder / "result.json").write_text(json.dumps(about))
    with open(os.environ.get("STUDY_LOG", os.devnull), "a") as log:
        log.write(f"{stage} {folder.name} {os.getpid()}\n")


def _abliterate(recipe, folder, upstream, tracker) -> None:
    _done("abliteration", folder)


def _train(recipe, folder, upstream, tracker, excluded, quick, observe=None) -> None:
    if observe is not None:
        for step in (1, 2, 3):
            observe(step, {"recovery": _reward_of(recipe)})
    if recipe.train.trainer["beta"] == 9:
        raise StageError("train: beta 9 breaks it")
    _done("train", folder)


def _evaluate(recipe, folder, upstream, tracker) -> None:
    strength, value = recipe.abliteration.edit.strength, _reward_of(recipe)
    if recipe.train.trainer["beta"] == 8:
        value = None
    refused = 0.0 if strength >= 1 else 0.5
    results = {
        "pooled": {"recovery": {"value": value}},
        "refusal": [{"name": "restricted", "healed": {"value": refused}}],
        "accept": {"passed": True, "gates": []},
    }
    if distributed.is_main():
        (folder / "results.json").write_text(json.dumps(results))
    _done("eval", folder)


def _release(recipe, folder, upstream, tracker) -> None:
    _done("release", folder, strength=recipe.abliteration.edit.strength)


def _reward_of(recipe) -> float:
    beta = recipe.train.trainer["beta"]
    return reward(recipe.abliteration.edit.strength, beta, recipe.seed, recipe.eval.part)


if __name__ == "__main__":
    install()
    sys.exit(run.main())
