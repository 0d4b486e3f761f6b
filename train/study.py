"""A study: one recipe run with many settings, each a trial; the best one is confirmed, and released.

A trial is a resolved recipe, run through the same steps as any other, so that what trials have in common comes from
the store. Its items are one part of the benchmarks' items; the best trial is confirmed on a second part, with seeds
that are new to it, and its release is measured on a third (`eval.part`). Any number of processes and machines work on
one study with the same command; each may itself be a launch of several processes, of which the main one speaks with
the storage. `train/run.py` hands over what it alone knows: how a recipe is planned, run and read.
"""

import contextlib
import gc
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from common import artifacts, distributed
from common.artifacts import Store
from common.errors import GateError, HealingError, StageError
from common.recipe import Limit, Recipe, StudySection, resolved
from common.tracking import table, tracked, tracking_mode
from train import study_choice, study_report
from train.study_choice import Record
from train.study_space import (
    Setting,
    Space,
    in_words,
    list_values,
    overrides,
    value_of,
)
from train.study_storage import (
    Claim,
    Queue,
    open_study,
    record_of,
)

if TYPE_CHECKING:
    from train.run import Plan

# How many of the best trials are tried in confirmation until one holds the limits there, too.
CANDIDATES = 3
# Seconds between two looks at trials that others are at work on.
PAUSE = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Road:
    """What `train/run.py` knows.

    Attributes:
        make_plan: the plan of the study's recipe with some keys changed, given as `key=value`; raises RecipeError.
        walk: does the stages of a plan; see `train.run._walk`.
        report: prints the table of a plan's evaluation and raises GateError where the recipe's gates are missed.
        number: looks a field of results.json up; None where nothing was there to measure.
    """

    make_plan: Callable[[Sequence[str]], "Plan"]
    walk: Callable[..., None]
    report: Callable[["Plan", str], None]
    number: Callable[[Mapping[str, Any], str], float | None]


def section_of(recipe: Recipe) -> StudySection:
    """The recipe's study."""
    assert recipe.study is not None
    return recipe.study


def limits_of(recipe: Recipe) -> dict[str, Limit]:
    """What trials must hold: the study's constraints, or the gates on rates of refusal."""
    section = section_of(recipe)
    if section.constraints is not None:
        return dict(section.constraints)
    return {name: limit for name, limit in recipe.eval.accept.items() if name.startswith("refusal")}


def changes_of(setting: Setting, *, name: str, seed: int, part: str) -> list[str]:
    """What makes the study's recipe that of one run.

    Args:
        setting: of the trial.
        name: of the run.
        seed: of the run.
        part: of the items that it is evaluated on.
    """
    own = [f"name={json.dumps(name)}", f"seed={seed}", f"eval.part={part}", "study=null"]
    return [*overrides(setting), *own]


def first_settings(recipe: Recipe) -> list[Setting]:
    """The settings that are tried before any is proposed: of a grid all, else that of the recipe as it stands."""
    section = section_of(recipe)
    if section.sampler_name == "GridSampler":
        return Space(section.parameters).grid()
    data: Any = resolved(recipe)
    own: Setting = {}
    for key, parameter in section.parameters.items():
        if not all(own.get(other) in values for other, values in parameter.when.items()):
            continue
        value = _look_up(data, key)
        if value is None or not _is_tried(section, key, value):
            return []
        own[key] = value
    return [own]


def _look_up(data: Any, key: str) -> Any:  # noqa: ANN401  # plain data
    from common.document import parse_key  # noqa: PLC0415  # only here

    for step in parse_key(key):
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _is_tried(section: StudySection, key: str, value: object) -> bool:
    parameter = section.parameters[key]
    if parameter.choices is not None:
        return value in parameter.choices
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if parameter.step is not None or parameter.whole:
        return value in list_values(parameter)
    assert parameter.low is not None
    assert parameter.high is not None
    return parameter.low <= value <= parameter.high and value == value_of(parameter, value)


def run(plan: "Plan", road: Road, store: Store, folder: Path, until: str) -> None:
    """Work on a study until it is done, and see to its end.

    Args:
        plan: of the recipe as it stands.
        road: of `train/run.py`.
        store: of the stages.
        folder: of the study; made.
        until: `release`, or `eval` to stop after the best trial's evaluation.

    Raises:
        StageError: if no trial could be finished.
        GateError: if no trial held the limits, in the search or in the confirmation, or the release's gates are
            missed.
    """
    worker = Worker(plan, road, store, folder)
    worker.work()
    worker.end(until)


class Worker:
    """One launch at work on a study."""

    def __init__(self, plan: "Plan", road: Road, store: Store, folder: Path) -> None:
        """Open the storage, on the main process."""
        self.recipe, self.road, self.store, self.folder = plan.recipe, road, store, folder
        self.section, self.limits = section_of(plan.recipe), limits_of(plan.recipe)
        # What is loaded now stays: collecting after each trial need not walk through it.
        gc.freeze()
        self.queue: Queue | None = None
        if distributed.is_main():
            # One at a time: two that make the tables of an empty database at once break it.
            with store.locked(f"studies/{self.recipe.name}/open", wait=True):
                study = open_study(
                    self.recipe.name, self.section, folder, identity(plan), self._token()
                )
            first = first_settings(self.recipe)
            self.queue = Queue(study, self.section, store, self.recipe.seed, first)
        distributed.barrier()

    def _token(self) -> str:
        """What tells this output folder from those of machines that do not share it."""
        path = self.folder / "study.id"
        if not path.is_file():
            artifacts.write_text(path, uuid.uuid4().hex)
        return path.read_text(encoding="utf-8")

    def records(self) -> list[Record]:
        """All trials, on every process."""
        found = [record_of(trial) for trial in self.queue.records()] if self.queue else []
        return distributed.broadcast(found)

    def work(self) -> None:
        """Run trials until there is none left, also none that another worker may leave."""
        told = False
        while True:
            with self._claimed() as claim:
                number = distributed.broadcast(claim.trial.number if claim else None)
                if number is not None:
                    setting = distributed.broadcast(claim.setting if claim else {})
                    self._run_trial(number, setting, claim)
                    gc.collect()
                    told = False
                    continue
            if not distributed.broadcast(self._others_work()):
                return
            if not told:
                logger.info("study: waiting for the trials that other workers are at")
                told = True
            time.sleep(PAUSE)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[Claim | None]:
        if self.queue is None:
            yield None
            return
        with self.queue.claimed() as claim:
            yield claim

    def _others_work(self) -> bool:
        """Whether trials are under way elsewhere; after the time limit nobody waits for them."""
        if self.queue is None or self.queue.is_over():
            return False
        return any(trial.state == TrialState.RUNNING for trial in self.queue.records())

    def _run_trial(self, number: int, setting: Setting, claim: Claim | None) -> None:
        folder = self.folder / "trials" / str(number)
        logger.info("study: trial %d: %s", number, in_words(setting))
        try:
            outcome = self._measure(f"{self.recipe.name}-{number}", setting, folder, claim)
        except optuna.TrialPruned:
            self._tell(claim, TrialState.PRUNED, reason="a quick evaluation was poor beside others")
        except HealingError as error:
            self._tell(claim, TrialState.FAIL, reason=str(error))
            if distributed.world_size() > 1:
                # Other processes may not have met it: they would wait for this one for ever.
                raise
        else:
            self._tell(claim, TrialState.COMPLETE, outcome=outcome)
        if distributed.is_main():
            for planned in folder.rglob(artifacts.STAGES):
                planned.unlink()

    def _measure(
        self, name: str, setting: Setting, folder: Path, claim: Claim | None
    ) -> dict[str, Any]:
        """Run a setting with each seed of the search, and gather what the study judges by."""
        seeds = range(self.recipe.seed, self.recipe.seed + self.section.seeds)

        def reached(stage: str) -> None:
            if claim is not None and stage == "abliteration":
                claim.trial.set_user_attr("reached", True)

        def observe(step: int, scores: Mapping[str, float]) -> None:
            if distributed.broadcast(_is_poor(claim, step, scores)):
                raise optuna.TrialPruned

        runs = []
        for index, seed in enumerate(seeds):
            plan = self.road.make_plan(changes_of(setting, name=name, seed=seed, part="search"))
            own = folder if len(seeds) == 1 else folder / f"seed-{seed}"
            own.mkdir(parents=True, exist_ok=True)
            look = observe if self.section.pruner is not None and index == 0 else None
            self._walk(plan, own, observe=look, reached=reached)
            runs.append(plan)
        return self._outcome(runs, list(seeds))

    def _walk(self, plan: "Plan", folder: Path, **told: Any) -> None:  # noqa: ANN401  # callables of the road
        from common.recipe import dump  # noqa: PLC0415  # only here

        if distributed.is_main():
            artifacts.write_text(folder / "recipe.yaml", dump(plan.recipe))
        self.road.walk(plan, folder, until="eval", group=self.recipe.name, **told)

    def _outcome(self, runs: Sequence["Plan"], seeds: Sequence[int]) -> dict[str, Any]:
        """What is on record of a setting: means over its runs, and where their stages lie.

        Raises:
            StageError: if an objective was not measured.
        """
        results = [
            json.loads((plan.entry("eval").folder / "results.json").read_text(encoding="utf-8"))
            for plan in runs
        ]

        def mean(name: str) -> float | None:
            return study_choice.mean_of([self.road.number(found, name) for found in results])

        values = {name: mean(name) for name in self.section.objectives}
        limited = {name: mean(name) for name in self.limits}
        for name, value in values.items():
            if value is None:
                raise StageError(
                    f"{name} was not measured: there was nothing to measure, as where an edit does no significant "
                    "damage there is no recovery"
                )
        stages: dict[str, list[tuple[str, float]]] = {}
        for plan in runs:
            for step in plan.steps[:3]:
                seconds = float(step.entry.manifest().get("seconds", 0.0))
                stages.setdefault(step.name, []).append((step.entry.fingerprint[:24], seconds))
        missed = study_choice.missed(limited, self.limits)
        return {
            "values": values,
            "limited": limited,
            "missed": missed,
            "feasible": not missed,
            "seeds": list(seeds),
            "stages": stages,
        }

    def _tell(
        self,
        claim: Claim | None,
        state: TrialState,
        *,
        outcome: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> None:
        """Put the end of a trial on record."""
        if claim is None or self.queue is None:
            return
        trial = claim.trial
        if reason is not None:
            trial.set_user_attr("reason", reason)
            logger.warning("study: trial %d: %s: %s", trial.number, state.name.lower(), reason)
        if outcome is not None:
            trial.set_user_attr("outcome", json.dumps(outcome))
            for name, limit in self.limits.items():
                violation = study_choice.violation(outcome["limited"][name], limit)
                trial.set_constraint(name, violation)
            self._log_outcome(trial.number, outcome)
            self._track(trial.number, claim.setting, outcome)
        values = list(outcome["values"].values()) if outcome else None
        self.queue.study.tell(trial, values, state=state)

    def _log_outcome(self, number: int, outcome: Mapping[str, Any]) -> None:
        values = ", ".join(f"{name} {value:.4f}" for name, value in outcome["values"].items())
        held = "; ".join(outcome["missed"]) or "all limits held"
        logger.info("study: trial %d: %s; %s", number, values, held)

    def _track(self, number: int, setting: Setting, outcome: Mapping[str, Any]) -> None:
        """One run of wandb for the trial as a whole, beside those of the stages it has run."""
        if tracking_mode(self.recipe) == "disabled":
            return
        named = self.recipe.model_copy(update={"name": f"{self.recipe.name}-{number}"})
        folder = self.folder / "trials" / str(number)
        with tracked(named, "trial", folder, {}, self.recipe.name) as tracker:
            tracker.summary.update({f"parameters/{key}": value for key, value in setting.items()})
            for kind in ("values", "limited"):
                word = "objectives" if kind == "values" else "constraints"
                tracker.summary.update(
                    {f"{word}/{name}": value for name, value in outcome[kind].items()}
                )
            tracker.summary.update(
                {"feasible": outcome["feasible"], "missed": "; ".join(outcome["missed"])}
            )

    def end(self, until: str) -> None:
        """Choose, confirm, release and report; where several workers end, the others take over the first one's."""
        if distributed.is_main():
            assert self.queue is not None
            running = sum(t.state == TrialState.RUNNING for t in self.queue.records())
            if running:
                logger.info("study: time is up; %d trials of other workers are not done", running)
        else:
            running = 0
        if distributed.broadcast(running):
            return
        lock = self.store.locked(f"studies/{self.recipe.name}/end", wait=True)
        with lock if distributed.is_main() else contextlib.nullcontext():
            records = self.records()
            confirmations = self._confirm(records)
            best = next((found for found in confirmations if found["feasible"]), None)
            found = self._summarize(records, confirmations, best)
            if best is None:
                raise self._nothing(records, confirmations)
            self._release(next(r for r in records if r.number == best["number"]), found, until)

    def _confirm(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Run the best trials on items and with seeds that the search has not seen, until one holds the limits."""
        ranked = study_choice.ranking(records, self.section.objectives)
        start = self.recipe.seed + self.section.seeds
        seeds = range(start, start + self.section.confirmation_seeds)
        found: list[dict[str, Any]] = []
        for record in ranked[:CANDIDATES]:
            logger.info("study: confirming trial %d with new seeds on new items", record.number)
            plans = []
            for seed in seeds:
                name = f"{self.recipe.name}-{record.number}-confirmation-{seed}"
                changes = changes_of(
                    dict(record.setting), name=name, seed=seed, part="confirmation"
                )
                plans.append(self.road.make_plan(changes))
                folder = self.folder / "confirmation" / f"{record.number}-seed-{seed}"
                if distributed.is_main():
                    folder.mkdir(parents=True, exist_ok=True)
                self._walk(plans[-1], folder)
            outcome = self._outcome(plans, list(seeds))
            losses = study_choice.curse(record.values, outcome["values"], self.section.objectives)
            found.append({"number": record.number, **outcome, "winners_curse": losses})
            for name, value in record.values.items():
                again = outcome["values"][name]
                logger.info("study: %s: %.4f in the search, %.4f confirmed", name, value, again)
            if outcome["feasible"]:
                break
        return found

    def _nothing(
        self, records: Sequence[Record], confirmations: Sequence[Mapping[str, Any]]
    ) -> HealingError:
        """Why there is no release."""
        if confirmations:
            missed = "\n".join(
                f"trial {found['number']}: {text}"
                for found in confirmations
                for text in found["missed"]
            )
            return GateError(
                f"{missed}\nno trial held its limits in confirmation, so no release was made; {self.folder}/study.html "
                "shows all trials"
            )
        nearest = study_choice.closest(records, self.section.objectives)
        if nearest is None:
            reasons = [record.reason for record in records if record.reason]
            first = f" (the first: {reasons[0]})" if reasons else ""
            return StageError(f"study: none of {len(records)} trials could be finished{first}")
        missed = "\n".join(nearest.missed)
        return GateError(
            f"{missed}\nno trial held all limits; the nearest, told above, is trial {nearest.number}; no release was "
            f"made; widen study.parameters or loosen study.constraints ({self.folder}/study.html shows all trials)"
        )

    def _summarize(
        self,
        records: Sequence[Record],
        confirmations: Sequence[Mapping[str, Any]],
        best: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """What was found so far, on disk already: a missed gate of the release must not hide it."""
        if not distributed.is_main():
            return {}
        found = study_report.summary(
            self.recipe.name, self.section, self.limits, records, confirmations, best
        )
        study_report.write(found, self.folder)
        return found

    def _release(self, best: Record, found: Mapping[str, Any], until: str) -> None:
        """Evaluate the best trial's own model on the items that are left, and release it."""
        logger.info("study: best is trial %d: %s", best.number, in_words(best.setting))
        name, seed = self.recipe.name, self.recipe.seed
        changes = changes_of(dict(best.setting), name=name, seed=seed, part="test")
        plan = self.road.make_plan(changes)
        self.road.walk(plan, self.folder, until="eval", group=name)
        if distributed.is_main():
            found = {**found, "test": self._outcome([plan], [seed])}
            study_report.write(found, self.folder)
            self._track_study(found)
        if until == "release":
            self.road.report(plan, "eval")
            self.road.walk(plan, self.folder, until="release", group=name)
            logger.info("release: %s", self.folder / "release")
        logger.info("study: %s", self.folder / "study.html")

    def _track_study(self, found: Mapping[str, Any]) -> None:
        """One run of wandb for the study: its front and what mattered, as tables."""
        if tracking_mode(self.recipe) == "disabled":
            return
        with tracked(self.recipe, "study", self.folder, {}, self.recipe.name) as tracker:
            for name, (columns, rows) in study_report.tables(found).items():
                tracker.log({name: table(columns, rows)})
            tracker.summary.update({"best": found["best"], "trials": len(found["trials"])})


def _is_poor(claim: Claim | None, step: int, scores: Mapping[str, float]) -> bool:
    """Report a quick evaluation, and ask the pruner; on the main process."""
    if claim is None:
        return False
    claim.trial.report(scores["recovery"], step)
    return claim.trial.should_prune()


def identity(plan: "Plan") -> str:
    """A hash of what makes the trials of a study comparable: what is tried, how it is judged, model and data."""
    section = section_of(plan.recipe)
    kept = {"parameters", "objectives", "seeds"}
    return artifacts.hash_data(
        {
            "study": section.model_dump(mode="json", include=kept),
            "limits": {
                name: limit.model_dump(mode="json")
                for name, limit in limits_of(plan.recipe).items()
            },
            "recipe": plan.entry("eval").fingerprint,
        }
    )
