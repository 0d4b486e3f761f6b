"""The store of finished stages: what is in it, what holds it, and how it is pruned without loss.

A stage is kept while a run folder links to it or has it planned (`stages.json`, there until a run or trial has come
to its end, so that what a killed one has begun stays), and while a process holds its lock. What trainings and
evaluations share beside stages is told, and left alone.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.artifacts import MANIFEST, STAGES, BusyError, Entry, Store

# The stages, in the order in which a recipe runs them. Other folders of the store are what trainings and
# evaluations share.
NAMES = ("abliteration", "train", "eval", "release")
LOCKS = "studies"


@dataclass(frozen=True)
class Kept:
    """A stage in the store.

    Attributes:
        entry: its place.
        num_bytes: on disk.
        age: seconds since it was last written to.
        users: the run folders that link to it or have it planned, below the output folder.
    """

    entry: Entry
    num_bytes: int
    age: float
    users: Sequence[str]


def entries(store: Store) -> list[Kept]:
    """All stages, with who uses them."""
    users = users_by_folder(store)
    found = []
    for name in NAMES:
        for folder in sorted((store.root / name).glob("*")):
            if folder.is_dir():
                entry = Entry(name, _fingerprint(folder), folder)
                last = max((path.lstat().st_mtime for path in _files(folder)), default=0.0)
                age = max(time.time() - last, 0.0)
                found.append(Kept(entry, size_of(folder), age, users.get(folder.resolve(), [])))
    return found


def shared(store: Store) -> dict[str, int]:
    """What trainings and evaluations share (reference log-probabilities, answers...), with its size in bytes."""
    if not store.root.is_dir():
        return {}
    return {
        folder.name: size_of(folder)
        for folder in sorted(store.root.iterdir())
        if folder.is_dir() and folder.name not in (*NAMES, LOCKS)
    }


def users_by_folder(store: Store) -> dict[Path, list[str]]:
    """By folder of a stage the run folders, those of trials too, that link to it or have it planned."""
    found: dict[Path, list[str]] = {}

    def use(folder: Path, run: Path) -> None:
        known = found.setdefault(folder, [])
        name = str(run.relative_to(store.output_dir))
        if name not in known:
            known.append(name)

    for run in _run_folders(store):
        for name in NAMES:
            link = run / name
            if link.is_symlink():
                use(link.resolve(), run)
        for name, fingerprint in _planned(run).items():
            use((store.root / name / fingerprint[:24]).resolve(), run)
    return found


def prune(store: Store, *, remove: bool) -> list[Kept]:
    """What nothing uses, removed if so asked.

    Args:
        store: any.
        remove: whether to remove it, or only to tell.

    Returns:
        The stages that are, or would be, removed.
    """
    unused = [kept for kept in entries(store) if not kept.users]
    return [kept for kept in unused if not remove or _remove(store, kept.entry)]


def _remove(store: Store, entry: Entry) -> bool:
    """Remove a stage unless a process holds it, or a run has planned it meanwhile."""
    lock = f"{entry.stage}-{entry.folder.name}"
    with suppress(BusyError), store.locked(lock):
        # A run writes down what it plans before it looks whether it is there, and looks with this lock in hand.
        if entry.folder.resolve() in users_by_folder(store):
            return False
        # What says that it is whole goes first.
        (entry.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(entry.folder)
        return True
    return False


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links do not count."""
    return sum(path.lstat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _run_folders(store: Store) -> Iterator[Path]:
    """Every folder below the output folder that links to stages or plans them; the store itself is left out."""
    for parent, folders, names in os.walk(store.output_dir):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "wandb"]
        if STAGES in names or any(Path(parent, name).is_symlink() for name in NAMES):
            # Not below what belongs to a stage.
            folders[:] = [name for name in folders if name not in NAMES]
            yield Path(parent)


def _planned(run: Path) -> Mapping[str, str]:
    try:
        planned: Mapping[str, str] = json.loads((run / STAGES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return planned


def _fingerprint(folder: Path) -> str:
    """The whole fingerprint from the manifest; of a stage that has not ended what its folder says."""
    path = folder / MANIFEST
    if not path.is_file():
        return folder.name
    return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
