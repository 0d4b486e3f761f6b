"""A study in Optuna's storage: who may work on which trial, what is proposed next, and what is on record.

Storage is a journal file in the study's folder, or a database. Either way all workers of a study share its output
folder, where the stages lie. A trial belongs to the process that holds its lock, a lock of the operating system
that ends with its owner: a trial that is on record as running and whose lock is free was left by a killed worker,
and whoever finds it goes on with it under its own number. Claims are made one at a time, under a lock of their own,
so that a trial is never claimed twice and a proposal always knows those before it.
"""

import contextlib
import fcntl
import inspect
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from common.artifacts import BusyError, Store
from common.errors import InputError
from common.recipe import StudySection
from common.schema import nearest
from train.study_choice import Record
from train.study_space import Setting, Space, same_start

JOURNAL = "study.journal"
# A trial that has ended its worker as often is not tried again: it may be what ends them (no memory left).
MOST_ATTEMPTS = 5
# What a study hands a sampler itself.
OWN_ARGUMENTS = {
    "seed": "the recipe's seed",
    "constraints_func": "study.constraints",
    "search_space": "study.parameters",
}

optuna.logging.set_verbosity(optuna.logging.ERROR)
logger = logging.getLogger(__name__)


class FileLock:
    """The journal's lock: ends with its owner, unlike Optuna's, which the others wait half a minute for.

    Whoever takes it cuts off half a line that a killed writer left, which would make the file unreadable.
    """

    def __init__(self, journal: Path) -> None:
        """Name the file to guard."""
        self.journal = journal
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = self.journal.with_suffix(".lock").open("ab")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if self.journal.is_file():
            cut_half_line(self.journal)
        return True

    def release(self) -> None:
        """Give it back."""
        assert self._file is not None
        self._file.close()
        self._file = None


def cut_half_line(path: Path) -> None:
    """Cut off what stands behind the last line's end."""
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def open_study(
    name: str, section: StudySection, folder: Path, identity: str, token: str
) -> optuna.Study:
    """The study in its storage; made, if this is its first worker.

    Args:
        name: of the study.
        section: of the recipe.
        folder: of the study; the journal lies there.
        identity: hash of what its trials depend on.
        token: of the output folder; workers with another one do not share stages and locks.

    Raises:
        InputError: if the storage cannot be used, or holds a study of this name that asks something else.
    """
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(section, folder),
        directions=list(section.objectives.values()),
        load_if_exists=True,
    )
    wanted = {"identity": identity, "token": token}
    for key, value in wanted.items():
        if key not in study.user_attrs:
            study.set_user_attr(key, value)
    found = study.user_attrs
    if found["identity"] != identity:
        raise InputError(
            f"study: {name} was begun with other parameters, objectives, limits, seeds, model or data, or by another "
            "version of this program, so its trials cannot be compared with new ones; give the recipe another name, "
            "or go back to what it was"
        )
    if found["token"] != token:
        raise InputError(
            f"study: {name} is at work in another output folder than {folder.parent}; all workers of a study share "
            "one, on one disk: set output_dir to it, or give the recipe another name"
        )
    return study


def open_storage(section: StudySection, folder: Path) -> BaseStorage:
    """The journal file in the study's folder, or the database.

    Raises:
        InputError: if the database cannot be reached, or its driver is missing.
    """
    if section.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / JOURNAL
        lock: Any = FileLock(journal)
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    problem = check_storage(section.storage)
    if problem:
        raise InputError(f"study.storage: {problem}")
    return RDBStorage(section.storage)


def check_storage(url: str) -> str | None:
    """What keeps a database from being used, if anything does."""
    import sqlalchemy  # noqa: PLC0415  # only a database needs it

    try:
        place = sqlalchemy.make_url(url)
        shown = place.render_as_string(hide_password=True)
        if place.password:
            return f"{shown} holds a password, which would be written to the run folder; use ~/.pgpass or PGPASSWORD"
        with contextlib.closing(sqlalchemy.create_engine(url).connect()):
            return None
    except sqlalchemy.exc.ArgumentError:
        return f"{url!r} is no database URL; write e.g. postgresql+psycopg://user@host/name"
    except ModuleNotFoundError as error:
        hint = "run `pip install -e '.[postgresql]'`" if "psycopg" in str(error) else "install it"
        return f"{shown} needs the Python package {error.name}, which is not installed; {hint}"
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        return f"{shown} cannot be reached ({reason}); start the database, or correct the URL"


def build_sampler(section: StudySection, seed: int) -> BaseSampler:
    """The sampler that the recipe names.

    Raises:
        TypeError, ValueError: if its arguments do not fit; see `check_sampler`.
    """
    kind = getattr(optuna.samplers, section.sampler_name)
    arguments = dict(section.sampler.model_extra or {}) if section.sampler else {}
    if section.sampler_name == "QMCSampler":
        arguments |= {"warn_asynchronous_seeding": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an argument is experimental
        sampler: BaseSampler = kind(seed=seed, **arguments)
    return sampler


def build_pruner(section: StudySection) -> optuna.pruners.BasePruner:
    """The pruner that the recipe names, or one that prunes nothing."""
    if section.pruner is None:
        return optuna.pruners.NopPruner()
    kind = getattr(optuna.pruners, section.pruner.name)
    pruner: optuna.pruners.BasePruner = kind(**(section.pruner.model_extra or {}))
    return pruner


def check_sampler(section: StudySection) -> Iterator[str]:
    """What a sampler or pruner cannot do of what is asked, with the dotted key."""
    for key, given, module in (
        ("sampler", section.sampler, optuna.samplers),
        ("pruner", section.pruner, optuna.pruners),
    ):
        if given is not None:
            kind = getattr(module, given.name)
            yield from _argument_problems(f"study.{key}", kind, given.model_extra or {})
    name = section.sampler_name
    partly = [key for key, parameter in section.parameters.items() if parameter.when]
    if name in ("GPSampler", "QMCSampler") and partly:
        yield (
            f"study.sampler: {name} learns nothing about keys that only some trials have ({', '.join(partly)}); use "
            "TPESampler, or delete their `when`"
        )
    listed = [key for key, parameter in section.parameters.items() if parameter.choices]
    if name == "QMCSampler" and listed:
        yield (
            f"study.sampler: QMCSampler has no order for choices ({', '.join(listed)}) and would draw them at random; "
            "give ranges, or use another sampler"
        )
    startup = _default_of(section, "n_startup_trials") or _default_of(section, "population_size")
    if section.num_trials is not None and startup and startup >= section.num_trials:
        yield (
            f"study.sampler: {name} begins with {startup} trials at random, so that it would learn nothing within "
            f"num_trials {section.num_trials}; raise that, lower it here, or use RandomSampler"
        )


def _default_of(section: StudySection, argument: str) -> int | None:
    """A whole-number argument of the sampler, as given or as Optuna has it."""
    parameters = inspect.signature(getattr(optuna.samplers, section.sampler_name)).parameters
    if argument not in parameters:
        return None
    given = (section.sampler.model_extra or {}) if section.sampler else {}
    value = given.get(argument, parameters[argument].default)
    return value if isinstance(value, int) else None


def _argument_problems(key: str, kind: type, given: Mapping[str, Any]) -> Iterator[str]:
    known = set(inspect.signature(kind).parameters) - set(OWN_ARGUMENTS)
    if kind is optuna.samplers.GridSampler:
        known = set()
    for argument in given:
        if argument in OWN_ARGUMENTS:
            yield f"{key}.{argument}: is set by {OWN_ARGUMENTS[argument]}; delete it"
        elif argument not in known:
            yield f"{key}.{argument}: {kind.__name__} has no such argument{nearest(argument, known)}"
    if set(given) <= known:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if kind is not optuna.samplers.GridSampler:
                    kind(**given)
        except (TypeError, ValueError, AttributeError) as error:
            yield f"{key}: {kind.__name__} refuses its arguments ({error}); correct them"


@dataclass(frozen=True)
class Claim:
    """A trial that this worker alone may run.

    Attributes:
        trial: as Optuna hands it out.
        setting: its values for the recipe.
    """

    trial: optuna.Trial
    setting: Setting


class Queue:
    """The trials of a study, from the point of view of one worker."""

    def __init__(
        self,
        study: optuna.Study,
        section: StudySection,
        store: Store,
        seed: int,
        first: Sequence[Setting],
    ) -> None:
        """Take over.

        Args:
            study: as in storage.
            section: of the recipe.
            store: for the locks.
            seed: of the proposals.
            first: settings to begin with; of a grid all of them.
        """
        self.study, self.section, self.store, self.seed = study, section, store, seed
        self.space = Space(section.parameters)
        self.first = first
        self._starts = {
            _text_of(self.space.stored(setting)): same_start(setting) for setting in first
        }
        self.began = time.monotonic()
        self.study.pruner = build_pruner(section)
        self._locks = f"studies/{study.study_name}"

    def records(self) -> list[FrozenTrial]:
        """All trials on record, by number."""
        return self.study.get_trials(deepcopy=False)

    def is_over(self) -> bool:
        """Whether time is up for new trials."""
        limit = self.section.timeout
        return limit is not None and time.monotonic() - self.began > limit

    @contextlib.contextmanager
    def claimed(self) -> Iterator[Claim | None]:
        """The next trial for this worker, its own until the end of the block; None if there is none now."""
        with contextlib.ExitStack() as held:
            with self.store.locked(f"{self._locks}/claims", wait=True):
                claim = None if self.is_over() else self._claim(held)
            yield claim

    def _claim(self, held: contextlib.ExitStack) -> Claim | None:
        self._enqueue()
        for record in self._in_order():
            try:
                held.enter_context(self._lock(record.number))
            except BusyError:
                continue
            claim = self._take(record)
            if claim is not None:
                return claim
            held.pop_all().close()
        count = len(self.records())
        if self.section.sampler_name == "GridSampler":
            return None
        if self.section.num_trials is not None and count >= self.section.num_trials:
            return None
        # The proposals of a study depend on its seed and its trials, not on who makes them.
        same = self.section.sampler_name == "QMCSampler"
        seed = self.seed if same else (self.seed * 100_003 + count) % 2**32
        self.study.sampler = build_sampler(self.section, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self.study.ask()
            setting = self.space.suggest(trial)
        held.enter_context(self._lock(trial.number))
        return self._began(trial, setting)

    def _enqueue(self) -> None:
        """Put what is not in the storage yet of the settings to begin with; a kill may have stopped another worker."""
        for setting in self.first[len(self.records()) :]:
            self.study.enqueue_trial(self.space.stored(setting))

    def _in_order(self) -> list[FrozenTrial]:
        """Trials that may be free: left ones, then waiting ones, those last whose stage one is being made elsewhere."""
        records = self.records()
        running = [record for record in records if record.state == TrialState.RUNNING]
        waiting = [record for record in records if record.state == TrialState.WAITING]
        made = {start_of(record) for record in records if record.user_attrs.get("reached")}
        busy = {start_of(record) for record in running} - made
        waiting.sort(key=lambda record: (self._start(record) in busy, record.number))
        return [*running, *waiting]

    def _start(self, record: FrozenTrial) -> str:
        """What a waiting trial will ask of stage one."""
        return self._starts.get(_text_of(record.system_attrs.get("fixed_params", {})), "")

    def _take(self, record: FrozenTrial) -> Claim | None:
        """Make a trial whose lock is held this worker's own; None if it has been finished meanwhile."""
        storage = self.study._storage
        state = storage.get_trial(record._trial_id).state
        if state == TrialState.WAITING:
            # As Study.ask does with the first that waits; here the order is the study's.
            storage.set_trial_state_values(record._trial_id, state=TrialState.RUNNING)
        elif state != TrialState.RUNNING:
            return None
        self.study.sampler = optuna.samplers.RandomSampler(self.seed + record.number)
        trial = optuna.Trial(self.study, record._trial_id)
        if trial.user_attrs.get("attempts", 0) >= MOST_ATTEMPTS:
            reason = (
                f"it ended its worker {MOST_ATTEMPTS} times; it may need more memory than there is"
            )
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        if state == TrialState.RUNNING:
            logger.info(
                "study: trial %d was left by another worker; going on with it", trial.number
            )
        return self._began(trial, self.space.suggest(trial))

    def _began(self, trial: optuna.Trial, setting: Setting) -> Claim:
        trial.set_user_attr("setting", json.dumps(setting))
        trial.set_user_attr("attempts", trial.user_attrs.get("attempts", 0) + 1)
        return Claim(trial, setting)

    def _lock(self, number: int) -> contextlib.AbstractContextManager[None]:
        return self.store.locked(f"{self._locks}/trial-{number}")


def _text_of(stored: Mapping[str, Any]) -> str:
    return json.dumps(stored, sort_keys=True)


def setting_of(record: FrozenTrial) -> Setting:
    """The values that a trial has put into the recipe; none if it has not been begun."""
    setting: Setting = json.loads(record.user_attrs.get("setting", "{}"))
    return setting


def start_of(record: FrozenTrial) -> str:
    """What a trial asks of stage one."""
    return same_start(setting_of(record))


def record_of(trial: FrozenTrial) -> Record:
    """A trial as plain data."""
    states = {TrialState.FAIL: "failed"}
    outcome = json.loads(trial.user_attrs.get("outcome", "{}"))
    if trial.state != TrialState.COMPLETE:
        outcome = {}
    seconds = trial.duration.total_seconds() if trial.duration is not None else None
    return Record(
        number=trial.number,
        state=states.get(trial.state, trial.state.name.lower()),
        setting=setting_of(trial),
        reason=trial.user_attrs.get("reason"),
        seconds=seconds,
        attempts=trial.user_attrs.get("attempts", 0),
        **outcome,
    )
