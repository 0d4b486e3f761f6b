"""The main command: a recipe through its stages, each reused where its result is there already.

accelerate launch --config_file configs/cpu.yaml train/run.py recipe.yaml [key=value ...] [--check] [--until STAGE]

A recipe with a study is run once for each of its trials (train/study.py). `--key=value` is read as `key=value`: so
an agent of wandb's sweeps gives its settings.

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
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] == str(ROOT / "train"):
    # Run as a script: with this file's folder first, a module here could shadow a library of the same name.
    sys.path[0] = str(ROOT)

from common.command import INTERRUPTED  # noqa: E402
from common.errors import GateError, HealingError, InputError, RecipeError  # noqa: E402
from common.recipe import (  # noqa: E402
    Recipe,
    dump,
    load_recipe,
    overlay,
    placed,
    raw_section,
)

if TYPE_CHECKING:  # torch comes late: a wrong recipe is told in a blink
    from common.artifacts import Entry, Store

STAGES = ("abliteration", "train", "eval", "release")

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
        _leave()
        return _fail(str(error), error.exit_code, runs)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it stopped", INTERRUPTED, runs)
    _leave()
    return 0


def _leave() -> None:
    # A wrong recipe is told before torch is imported.
    distributed = sys.modules.get("common.distributed")
    if distributed is not None:
        distributed.leave()


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
    return parser.parse_intermixed_args(_as_overrides(arguments))


def _as_overrides(arguments: Sequence[str] | None) -> list[str]:
    """The arguments with `--key=value` as `key=value`, but for the command's own options."""
    given = sys.argv[1:] if arguments is None else arguments
    return [
        text[2:]
        if text.startswith("--") and "=" in text and not text.startswith("--until=")
        else text
        for text in given
    ]


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
        run: does it, given its folder, the finished stages and a wandb run; returns what the manifest should hold.
        compared: how many prompts were held against how many benchmark items, for the manifest.
    """

    name: str
    entry: "Entry"
    run: Callable[..., Mapping[str, object] | None]
    compared: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """A recipe with its stages' places in the store.

    Attributes:
        recipe: that every stage has checked.
        steps: in their order.
    """

    recipe: Recipe
    steps: Sequence[Step]

    def entry(self, stage: str) -> "Entry":
        """A stage's place in the store."""
        return next(step.entry for step in self.steps if step.name == stage)


def _run(recipe: Recipe, options: argparse.Namespace, runs: list[Path]) -> None:
    from common import distributed  # noqa: PLC0415  # imports torch
    from common.artifacts import Store  # noqa: PLC0415

    distributed.start(recipe.processes)
    if not distributed.is_main():
        _speak(logging.WARNING)
    stages = _stages()
    store = Store(Path(recipe.output_dir))
    plan = _make_plan(recipe, options, stages, store)
    if recipe.study is not None:
        _run_study(plan, options, stages, store, runs)
        return
    if options.check:
        _print_plan(recipe, plan.steps[: STAGES.index(options.until) + 1])
        return
    run_folder = _make_run_folder(recipe, runs)
    with _locked(store, f"run-{recipe.name}"):
        _walk(store, plan, run_folder, until=options.until, reached=partial(_report, plan))
        if distributed.is_main() and options.until == "release":
            logger.info("release: %s", run_folder / "release")


def _run_study(
    plan: Plan,
    options: argparse.Namespace,
    stages: Mapping[str, ModuleType],
    store: "Store",
    runs: list[Path],
) -> None:
    """Hand a study what it does not know itself: how a setting is planned, run and read."""
    from common import distributed  # noqa: PLC0415
    from eval.paths import number  # noqa: PLC0415
    from train import study, study_checks, study_plan  # noqa: PLC0415

    known: dict[str, Mapping[str, Sequence[str]]] = {}

    def make_plan(changes: Sequence[str]) -> Plan:
        """The plan of the recipe with some keys changed; raises RecipeError."""
        changed = argparse.Namespace(**vars(options))
        changed.overrides = overlay(options.overrides, changes)
        return _make_plan(_load(changed), changed, stages, store, known)

    road = study.Road(make_plan, partial(_walk, store), _report, number)
    problems = study_checks.check(plan, road, options.overrides, options.until)
    if problems:
        raise RecipeError(placed(problems, options.recipe, options.overrides))
    if options.check:
        if distributed.is_main():
            sys.stdout.write("\n".join(study_plan.plan_lines(plan, road)) + "\n")
        return
    run_folder = _make_run_folder(plan.recipe, runs)
    study.run(plan, road, store, run_folder, options.until)


def _make_plan(
    recipe: Recipe,
    options: argparse.Namespace,
    stages: Mapping[str, ModuleType],
    store: "Store",
    known: dict[str, Mapping[str, Sequence[str]]] | None = None,
) -> Plan:
    """Every check of every stage, and where in the store their results belong."""
    excluded, compared = _check(recipe, options, stages, {} if known is None else known)
    return Plan(recipe, _plan(recipe, stages, store, excluded, compared))


def _walk(
    store: "Store",
    plan: Plan,
    run_folder: Path,
    *,
    until: str,
    group: str | None = None,
    observe: Callable[[int, Mapping[str, float]], None] | None = None,
    reached: Callable[[str], None] | None = None,
) -> None:
    """Do the stages of a recipe, each reused where its result is there.

    Args:
        store: of the stages.
        plan: of the recipe.
        run_folder: gets links to the stages.
        until: the last stage to do.
        group: the study whose trial this is.
        observe: told the step and scores of every quick evaluation while it trains.
        reached: told the name of each stage that is done.
    """
    from common import distributed  # noqa: PLC0415
    from common.artifacts import STAGES as PLANNED  # noqa: PLC0415
    from common.artifacts import write_json  # noqa: PLC0415

    steps = plan.steps[: STAGES.index(until) + 1]
    if distributed.is_main():
        # Before anything is looked up: what stands here is not pruned.
        write_json(run_folder / PLANNED, {step.name: step.entry.fingerprint for step in steps})
    for step in steps:
        if step.name == "train" and observe is not None:
            step = replace(step, run=partial(step.run, observe=observe))
        before = {done.name: done.entry.folder for done in _before(step, steps)}
        _run_step(plan.recipe, step, store, run_folder, before, group)
        if reached is not None:
            reached(step.name)
    if distributed.is_main():
        # From here on it is the links that keep the stages.
        (run_folder / PLANNED).unlink()
        (run_folder / "failure.json").unlink(missing_ok=True)


def _stages() -> dict[str, ModuleType]:
    import abliteration.stage  # noqa: PLC0415  # these import torch and trl
    import eval.release.stage  # noqa: PLC0415
    import eval.stage  # noqa: PLC0415
    import train.stage  # noqa: PLC0415

    modules = (abliteration.stage, train.stage, eval.stage, eval.release.stage)
    return dict(zip(STAGES, modules, strict=True))


def _check(
    recipe: Recipe,
    options: argparse.Namespace,
    stages: Mapping[str, ModuleType],
    known: dict[str, Mapping[str, Sequence[str]]],
) -> tuple[frozenset[str], dict[str, int]]:
    """Every check of every stage, and what all of them share: no prompt may be one of the benchmarks' items.

    Args:
        recipe: any.
        options: of the command.
        stages: by name.
        known: items by the benchmarks that hold them; what is missing is added. To load them takes seconds.

    Returns:
        The normalized items of the benchmarks, and how many texts of each side were compared.
    """
    from common.overlap import normalize, shared  # noqa: PLC0415

    problems = [problem for stage in stages.values() for problem in stage.check(recipe)]
    if problems:
        raise RecipeError(placed(list(dict.fromkeys(problems)), options.recipe, options.overrides))
    benchmarks = json.dumps([spec.model_dump(mode="json") for spec in recipe.eval.benchmarks])
    if benchmarks not in known:
        known[benchmarks] = stages["eval"].items(recipe)
    problems = stages["eval"].part_problems(recipe, known[benchmarks])
    if problems:
        raise RecipeError(placed(problems, options.recipe, options.overrides))
    items = list(dict.fromkeys(text for texts in known[benchmarks].values() for text in texts))
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
    recipe: Recipe,
    step: Step,
    store: "Store",
    run_folder: Path,
    upstream: Mapping[str, Path],
    group: str | None = None,
) -> None:
    """Do a stage, or reuse it; either way it is linked into the run folder.

    A stage that another process is at work on is awaited, and then reused.
    """
    from common import distributed  # noqa: PLC0415
    from common.tracking import artifact, tracked  # noqa: PLC0415
    from train.launch import with_whole_models  # noqa: PLC0415

    with _locked(store, f"{step.name}-{step.entry.fingerprint[:24]}", wait=True):
        # With the lock in hand: whoever prunes the store takes it, too.
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
        with tracked(recipe, step.name, run_folder, upstream, group) as tracker:
            work = partial(step.run, recipe, step.entry.folder, upstream, tracker)
            # Stage two trains in shards what no process may have room for, and asks for whole models itself.
            found = work() if step.name == "train" else with_whole_models(recipe, work)
            distributed.barrier()
            if distributed.is_main():
                store.finish(
                    step.entry,
                    seconds=time.monotonic() - began,
                    about=_about(recipe, step.compared) | dict(found or {}),
                )
                tracker.log_artifact(artifact(recipe, step.name, step.entry.folder))
        if distributed.is_main():
            store.link(step.entry, run_folder)
    distributed.barrier()
    logger.info("%s: done in %.0f s", step.name, time.monotonic() - began)


def _about(recipe: Recipe, compared: Mapping[str, int]) -> dict[str, object]:
    from common import distributed  # noqa: PLC0415

    return {
        "seed": recipe.seed,
        "processes": distributed.world_size(),
        "overlap": dict(compared),
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    from importlib.metadata import version  # noqa: PLC0415

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
    return {library: version(library) for library in libraries}


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
def _locked(store: "Store", name: str, *, wait: bool = False) -> Iterator[None]:
    from common import distributed  # noqa: PLC0415

    with store.locked(name, wait=wait) if distributed.is_main() else contextlib.nullcontext():
        yield


def _report(plan: Plan, stage: str) -> None:
    """Print the table of a finished evaluation, and stop where a gate was missed.

    Raises:
        GateError: naming every missed gate.
    """
    from common import distributed  # noqa: PLC0415
    from eval.table import screen_table  # noqa: PLC0415

    if stage != "eval":
        return
    path = plan.entry("eval").folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
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
    """Print what would run and what it takes; raises StageError where the disk does not hold it."""
    from common import distributed  # noqa: PLC0415
    from common.artifacts import require_disk  # noqa: PLC0415
    from train import plan  # noqa: PLC0415

    if not distributed.is_main():
        return
    lines = plan.plan_lines(
        recipe, [(step.name, step.entry.complete, step.entry.fingerprint) for step in steps]
    )
    stages = _stages()
    takes = {
        "abliteration": stages["abliteration"].disk_bytes,
        "train": plan.disk_bytes,
        "release": stages["release"].disk_bytes,
    }
    due = [step.name for step in steps if not step.entry.complete and step.name in takes]
    needed = sum(takes[name](recipe) for name in due)
    lines.append(f"  disk          at most {needed / 2**30:.2f} GiB more")
    sys.stdout.write("\n".join(lines) + "\n")
    require_disk(Path(recipe.output_dir), needed, "what is to run")


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
    _speak(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def _speak(level: int) -> None:
    """Let our own lines through from a level on."""
    for name in ("healing", "abliteration", "train", "eval", "common"):
        logging.getLogger(name).setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
