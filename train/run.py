"""The main command: a recipe through its stages, each reused where its result is there already.

accelerate launch --config_file configs/cpu.yaml train/run.py recipe.yaml [key=value ...] [--check] [--until STAGE]

Exit codes of `python train/run.py`: 0 done, 1 a stage failed, 2 the recipe or its inputs are wrong, 3 a gate was
missed, 130 interrupted. accelerate's launcher turns every failure into 1.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] == str(ROOT / "train"):
    # Run as a script: with this file's folder first, a module here could shadow a library of the same name.
    sys.path[0] = str(ROOT)

from common.errors import GateError, HealingError, InputError, RecipeError  # noqa: E402
from common.recipe import Recipe, dump, load_recipe, placed, raw_section  # noqa: E402

if TYPE_CHECKING:  # torch comes late: a wrong recipe is told in a blink
    from common.artifacts import Entry, Store

STAGES = ("abliteration", "train", "eval", "release")
INTERRUPTED = 130

logger = logging.getLogger("healing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    _quieten()
    runs: list[Path] = []
    try:
        recipe = _load(options)
        _run(recipe, options, runs)
    except HealingError as error:
        return _fail(str(error), error.exit_code, runs)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", INTERRUPTED, runs)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train/run.py",
        description="Abliterate a chat model, heal it, evaluate it, release it.",
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted keys of the recipe to replace"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check recipe and inputs, print the plan, load no weights",
    )
    parser.add_argument("--until", choices=STAGES, default="release", help="stop after this stage")
    # Intermixed: options may stand between the overrides.
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace) -> Recipe:
    """The recipe, or every problem of its structure and of its pass-through blocks together."""
    try:
        return load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        if not options.recipe.is_file():
            raise
        raise RecipeError([*error.problems, *_block_problems(options)]) from None


def _block_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the blocks for trl and peft in a recipe whose structure is wrong as well."""
    from train.settings import check  # noqa: PLC0415  # imports trl

    section = raw_section(options.recipe, options.overrides, "train")
    trainer, adapter = section.get("trainer"), section.get("adapter")
    problems = check(
        trainer if isinstance(trainer, dict) else {}, adapter if isinstance(adapter, dict) else None
    )
    return placed(problems, options.recipe, options.overrides)


@dataclass(frozen=True)
class Step:
    """A stage with its place in the store.

    Attributes:
        name: of the stage.
        entry: its folder and fingerprint.
        run: does it, given its folder, the finished stages and a wandb run.
        compared: how many prompts were held against how many benchmark items, for the manifest.
    """

    name: str
    entry: "Entry"
    run: Callable[..., None]
    compared: Mapping[str, int]


def _run(recipe: Recipe, options: argparse.Namespace, runs: list[Path]) -> None:
    from common import distributed  # noqa: PLC0415  # imports torch
    from common.artifacts import Store  # noqa: PLC0415

    distributed.start(recipe.processes)
    if not distributed.is_main():
        logger.setLevel(logging.WARNING)
    stages = _stages()
    excluded, compared = _check(recipe, options, stages)
    store = Store(Path(recipe.output_dir))
    steps = _plan(recipe, stages, store, excluded, compared)[: STAGES.index(options.until) + 1]
    if options.check:
        _print_plan(recipe, steps)
        return
    run_folder = _make_run_folder(recipe, runs)
    with _locked(store, f"run-{recipe.name}"):
        for step in steps:
            _run_step(
                recipe,
                step,
                store,
                run_folder,
                {done.name: done.entry.folder for done in _before(step, steps)},
            )
            if step.name == "eval":
                _report(step.entry.folder)
        if distributed.is_main():
            (run_folder / "failure.json").unlink(missing_ok=True)
            if steps[-1].name == "release":
                logger.info("release: %s", run_folder / "release")


def _stages() -> dict[str, ModuleType]:
    import abliteration.stage  # noqa: PLC0415  # these import torch and trl
    import eval.release.stage  # noqa: PLC0415
    import eval.stage  # noqa: PLC0415
    import train.stage  # noqa: PLC0415

    modules = (abliteration.stage, train.stage, eval.stage, eval.release.stage)
    return dict(zip(STAGES, modules, strict=True))


def _check(
    recipe: Recipe, options: argparse.Namespace, stages: Mapping[str, ModuleType]
) -> tuple[frozenset[str], dict[str, int]]:
    """Every check of every stage, and what all of them share: no prompt may be one of the benchmarks' items.

    Returns:
        The normalized items of the benchmarks, and how many texts of each side were compared.
    """
    from common.overlap import normalize, shared  # noqa: PLC0415

    problems = [problem for stage in stages.values() for problem in stage.check(recipe)]
    if problems:
        raise RecipeError(placed(list(dict.fromkeys(problems)), options.recipe, options.overrides))
    items = stages["eval"].items(recipe)
    compared = {"benchmark items": len(items)}
    for name in ("abliteration", "train"):
        prompts = stages[name].prompts_used(recipe)
        common = shared(prompts, items)
        compared |= {f"{name} prompts": len(prompts), f"{name} prompts shared": len(common)}
        if common:
            raise InputError(
                f"{name}: {len(common)} of its prompts are items of a benchmark or panel of eval (for example "
                f"{common[0]!r}), so the evaluation would measure what was trained on; use other prompts or items"
            )
    return frozenset(normalize(item) for item in items), compared


def _plan(
    recipe: Recipe,
    stages: Mapping[str, ModuleType],
    store: "Store",
    excluded: frozenset[str],
    compared: Mapping[str, int],
) -> list[Step]:
    from common.model import identity_files, resolve  # noqa: PLC0415
    from eval.quick import QuickEvaluation  # noqa: PLC0415

    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    upstream = store.hash_of_files(identity_files(base))
    steps = []
    for name, stage in stages.items():
        own = stage.inputs(recipe, excluded) if name == "train" else stage.inputs(recipe)
        entry = store.entry(name, stage.VERSION, {"upstream": upstream, "seed": recipe.seed, **own})
        # Stage two evaluates while it trains; what that is only stage three knows.
        more = {"excluded": excluded, "quick": QuickEvaluation} if name == "train" else {}
        run = partial(stage.run, **more)
        steps.append(Step(name, entry, run, compared))
        upstream = entry.fingerprint
    return steps


def _before(step: Step, steps: Sequence[Step]) -> Sequence[Step]:
    return steps[: [other.name for other in steps].index(step.name)]


def _run_step(
    recipe: Recipe, step: Step, store: "Store", run_folder: Path, upstream: Mapping[str, Path]
) -> None:
    """Do a stage, or reuse it; either way it is linked into the run folder."""
    from common import distributed  # noqa: PLC0415
    from common.tracking import artifact, tracked  # noqa: PLC0415

    if distributed.broadcast(step.entry.complete):
        logger.info("%s: reused (%s)", step.name, step.entry.fingerprint[:12])
        if distributed.is_main():
            store.link(step.entry, run_folder)
        return
    logger.info("%s: running (%s)", step.name, step.entry.fingerprint[:12])
    began = time.monotonic()
    if distributed.is_main():
        step.entry.folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    with _locked(store, f"{step.name}-{step.entry.fingerprint[:24]}"):
        with tracked(recipe, step.name, run_folder, upstream) as tracker:
            step.run(recipe, step.entry.folder, upstream, tracker)
            distributed.barrier()
            if distributed.is_main():
                store.finish(
                    step.entry,
                    seconds=time.monotonic() - began,
                    about=_about(recipe, step.compared),
                )
                tracker.log_artifact(artifact(recipe, step.name, step.entry.folder))
        if distributed.is_main():
            store.link(step.entry, run_folder)
    distributed.barrier()
    logger.info("%s: done in %.0f s", step.name, time.monotonic() - began)


def _about(recipe: Recipe, compared: Mapping[str, int]) -> dict[str, object]:
    from importlib.metadata import version  # noqa: PLC0415

    from common import distributed  # noqa: PLC0415

    libraries = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "lm_eval",
        "optuna",
        "wandb",
    )
    return {
        "seed": recipe.seed,
        "processes": distributed.world_size(),
        "overlap": dict(compared),
        "versions": {library: version(library) for library in libraries},
    }


def _make_run_folder(recipe: Recipe, runs: list[Path]) -> Path:
    from common import distributed  # noqa: PLC0415
    from common.artifacts import write_text  # noqa: PLC0415

    folder = Path(recipe.output_dir) / recipe.name
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"output_dir: {error.filename} is a file where the run folder {folder} should be; move it away, or "
                "choose another name or output_dir"
            ) from error
        except OSError as error:
            raise InputError(
                f"output_dir: {folder} cannot be made ({error.strerror}); choose another"
            ) from error
        runs.append(folder)
        write_text(folder / "recipe.yaml", dump(recipe))
    distributed.barrier()
    return folder


@contextlib.contextmanager
def _locked(store: "Store", name: str) -> Iterator[None]:
    from common import distributed  # noqa: PLC0415

    with store.locked(name) if distributed.is_main() else contextlib.nullcontext():
        yield


def _report(folder: Path) -> None:
    """Print the table, and stop where a gate was missed.

    Raises:
        GateError: naming every missed gate.
    """
    from common import distributed  # noqa: PLC0415
    from eval.table import screen_table  # noqa: PLC0415

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if distributed.is_main():
        sys.stdout.write("\n" + screen_table(results) + "\n\n")
        sys.stdout.flush()
    if not results["accept"]["passed"]:
        missed = [gate for gate in results["accept"]["gates"] if not gate["passed"]]
        lines = [
            f"eval.accept: {gate['name']} is {gate['value']}, limit {gate['limit']}"
            for gate in missed
        ]
        raise GateError("\n".join([*lines, "no release was made; heal longer or loosen the gate"]))


def _print_plan(recipe: Recipe, steps: Sequence[Step]) -> None:
    from common import distributed  # noqa: PLC0415
    from train.plan import plan_lines  # noqa: PLC0415

    if not distributed.is_main():
        return
    lines = plan_lines(
        recipe, [(step.name, step.entry.complete, step.entry.fingerprint) for step in steps]
    )
    sys.stdout.write("\n".join(lines) + "\n")


def _fail(message: str, code: int, runs: Sequence[Path]) -> int:
    """Tell the user, and whoever reads files: the run folder, and the launcher of several processes."""
    record = {"exit_code": code, "message": message}
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
        for folder in runs:
            (folder / "failure.json").write_text(
                json.dumps(record, indent=1) + "\n", encoding="utf-8"
            )
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        detail = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": detail}), encoding="utf-8")
    return code


def _quieten() -> None:
    """Our own lines on the screen; of the libraries only what is an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("healing", "abliteration", "train", "eval", "common"):
        logging.getLogger(name).setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
