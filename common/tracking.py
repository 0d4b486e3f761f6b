"""wandb: one run per stage, grouped by recipe, with what the stage used and made as artifacts.

Job type and group are passed at every start, since wandb reads their environment variables once per process.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb

from common import distributed
from common.recipe import Recipe, resolved

ARTIFACT_TYPES = {"abliteration": "edit", "train": "adapter", "eval": "results", "release": "model"}
# What of a stage goes into its artifact: small files that say what was done. Weights stay where they are; their
# hashes are in the manifest. No file with answers: they can hold what should not leave the machine.
ARTIFACT_FILES = (
    "manifest.json",
    "edit.safetensors",
    "candidates.json",
    "summary.json",
    "results.json",
    "README.md",
    "recipe.yaml",
    "SHA256SUMS",
)


@contextmanager
def tracked(
    recipe: Recipe,
    stage: str,
    run_folder: Path,
    upstream: Mapping[str, Path],
    group: str | None = None,
) -> Iterator[wandb.Run]:
    """A wandb run for one stage; on processes other than the main one, a disabled run.

    Args:
        recipe: names project, group and mode.
        stage: the job type.
        run_folder: offline runs are written to its `wandb` folder.
        upstream: folders of the finished stages that this one builds on: its inputs in wandb's lineage.
        group: the study whose trial this is; None: the recipe stands alone, and its name is the group.

    Yields:
        The run; it is finished at the end, as failed after an error.
    """
    mode = tracking_mode(recipe) if distributed.is_main() else "disabled"
    run = wandb.init(
        project=recipe.tracking.project,
        entity=recipe.tracking.entity,
        group=group or recipe.name,
        job_type=stage,
        name=f"{recipe.name}-{stage}",
        config=resolved(recipe),
        dir=str(run_folder),
        mode=mode,  # type: ignore[arg-type]  # one of wandb's literals
        settings=wandb.Settings(silent=True, console="off"),
    )
    for name, folder in upstream.items():
        _use_artifact(run, artifact(recipe, name, folder), mode)
    try:
        yield run
    except BaseException:  # Ctrl-C too: wandb must not show a run that was broken off as finished
        run.finish(exit_code=1)
        raise
    run.finish()


def tracking_mode(recipe: Recipe) -> str:
    """The recipe's mode; left open, WANDB_MODE's, else online with a key and offline without."""
    if recipe.tracking.mode is not None:
        return recipe.tracking.mode
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if wandb.login(prompt=False) else "offline"


def artifact(recipe: Recipe, stage: str, folder: Path) -> wandb.Artifact:
    """The artifact of a finished stage: its small files, with the fingerprint that identifies its weights."""
    made = wandb.Artifact(
        f"{recipe.name}-{stage}",
        type=ARTIFACT_TYPES[stage],
        metadata={"fingerprint": folder.resolve().name},
    )
    for name in ARTIFACT_FILES:
        if (folder / name).is_file():
            made.add_file(str(folder / name))
    return made


def _use_artifact(run: wandb.Run, used: wandb.Artifact, mode: str) -> None:
    if mode == "offline":
        # Offline, Run.use_artifact raises (wandb 0.31) because it waits for the server. This is the call it makes
        # before it waits: the record is written, and `wandb sync` marks the artifact as used.
        run._log_artifact(used, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(used)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> wandb.Table:
    """A wandb table."""
    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])
