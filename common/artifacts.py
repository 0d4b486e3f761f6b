"""Finished work on disk: content hashes, fingerprints, manifests, and the store that stages are reused from.

A stage's fingerprint hashes what its result depends on and nothing else. Its folder in the store is complete
when its manifest is there: the manifest is written last, by rename. A killed run leaves a folder without one,
which the next run goes on with.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import InputError, StageError

MANIFEST = "manifest.json"
# In a run folder: the fingerprints of its stages, also of those that have not ended. Pruning spares them.
STAGES = "stages.json"
BLOCK_BYTES = 1 << 22
# Seconds between two looks at a lock that another process holds.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

logger = logging.getLogger(__name__)


class BusyError(InputError):
    """Another process holds a lock."""


def hash_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_data(data: object) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hash_text(json.dumps(data, sort_keys=True, ensure_ascii=True))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents of files; their folders do not count."""
    return hash_data(
        [[path.name, hash_file(path)] for path in sorted(paths, key=lambda path: path.name)]
    )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name beside a file's to write to, so that the file is there whole or not at all.

    No other process has that name: two machines on one disk may well have the same process number.
    """
    beside = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    yield beside
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Write plain data as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True) + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(
        path, "".join(json.dumps(row, sort_keys=True, ensure_ascii=True) + "\n" for row in rows)
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


@dataclass(frozen=True)
class Entry:
    """One stage's place in the store.

    Attributes:
        stage: the stage's name.
        fingerprint: SHA-256 of what the result depends on.
        folder: where it lies.
    """

    stage: str
    fingerprint: str
    folder: Path

    @property
    def complete(self) -> bool:
        """Whether the stage has run to its end here."""
        return (self.folder / MANIFEST).is_file()

    def manifest(self) -> dict[str, Any]:
        """What the stage left on record."""
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest


class Store:
    """The folders of finished stages below `<output_dir>/.store`, one per stage and fingerprint."""

    def __init__(self, output_dir: Path) -> None:
        """Name the store; nothing is written yet."""
        self.output_dir = output_dir
        self.root = output_dir / ".store"

    def entry(self, stage: str, version: int, inputs: Mapping[str, object]) -> Entry:
        """The place of a stage with these inputs."""
        fingerprint = hash_data({"stage": stage, "version": version, "inputs": inputs})
        return Entry(stage, fingerprint, self.root / stage / fingerprint[:24])

    def finish(self, entry: Entry, *, seconds: float, about: Mapping[str, object]) -> None:
        """Declare a stage's folder complete."""
        write_json(
            entry.folder / MANIFEST,
            {
                "stage": entry.stage,
                "fingerprint": entry.fingerprint,
                "seconds": round(seconds, 2),
                **about,
            },
        )

    def link(self, entry: Entry, run_folder: Path) -> None:
        """Show a stage of the store in a run folder, in place of an older one."""
        link = run_folder / entry.stage
        target = os.path.relpath(entry.folder, run_folder)
        if link.is_symlink() and os.readlink(link) == target:
            return
        if link.exists() and not link.is_symlink():
            raise InputError(
                f"{link} is not a link of this program; move it away, or choose another name"
            )
        with whole(link) as beside:
            beside.unlink(missing_ok=True)  # of a killed process with this number
            beside.symlink_to(target)

    @contextmanager
    def locked(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold a lock that ends with this process, however it ends.

        It is a lock of the operating system (flock), on a file that stays. Between machines it holds where the file
        system carries flock over: NFS from version 4 on and Lustre mounted with `flock` do, and free the locks of a
        process that died at once, those of a machine that died after their lease.

        Args:
            name: of what is locked; may name folders.
            wait: whether to wait for the process that holds it.

        Raises:
            BusyError: if another process holds it, and it is not waited for.
        """
        path = self.root / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            pause = 0.0
            while not _try_lock(file):
                if not wait:
                    raise BusyError(
                        f"another process is at work on {name} (lock {path}); wait for it, or end it, then run again"
                    )
                if pause == FIRST_PAUSE:
                    logger.info("waiting for another process that is at work on %s", name)
                pause = min(2 * pause or FIRST_PAUSE / 2, LONGEST_PAUSE)
                time.sleep(pause)
            yield

    def hash_of_files(self, paths: Sequence[Path]) -> str:
        """Like `hash_files`, but a file that has not changed since is not read again."""
        cache_path = self.root / "hashes.json"
        cache: dict[str, str] = json.loads(cache_path.read_text()) if cache_path.is_file() else {}
        hashes = []
        for path in sorted(paths, key=lambda path: path.name):
            state = path.stat()
            key = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}:{state.st_ino}"
            cache[key] = cache.get(key) or hash_file(path)
            hashes.append([path.name, cache[key]])
        if self.root.is_dir():
            write_json(cache_path, cache)
        return hash_data(hashes)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Fail early if a file system lacks the room for what a stage will write.

    Raises:
        StageError: naming both sizes.
    """
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StageError(
            f"{what} needs {num_bytes / 2**30:.1f} GiB below {folder}, where {free / 2**30:.1f} GiB are free; make "
            "room, or set output_dir to a larger disk"
        )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        """Start."""
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began
