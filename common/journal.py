"""What a long job has done, in a file beside its work: a killed job goes on where it was.

A line is written when what it says is true. It holds for as long as this machine runs: after a crash of the
machine itself, only what was synced to the disk before its line was written is believed.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import InputError

NAME = "journal.jsonl"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The lines that can be believed.

    Attributes:
        begun: how the work on each part was begun.
        steps: what is on record of each step of each part.
        finished: the parts that are done and synced.
    """

    def __init__(self, file: BinaryIO, lines: list[dict[str, Any]]) -> None:
        """Take over the lines of an earlier process; new ones go to the end of the file."""
        self._file = file
        self._boot = _boot()
        self.begun: dict[str, str] = {}
        self.steps: dict[str, dict[str, dict[str, Any]]] = {}
        self.finished: set[str] = set()
        synced = {line["part"] for line in lines if "finished" in line}
        for line in lines:
            if line["boot"] == self._boot or line["part"] in synced:
                self._take(line)

    def begin(self, part: str, how: str) -> None:
        """Say that a part is begun, from nothing."""
        self._write(part, begun=how)

    def step(self, part: str, step: str, **about: object) -> None:
        """Say that a step of a part is done."""
        self._write(part, step=step, **about)

    def finish(self, part: str) -> None:
        """Say that a part is done, and on the disk."""
        self._write(part, finished=True)

    def _write(self, part: str, **about: object) -> None:
        line = {"part": part, "boot": self._boot, **about}
        # One call: a killed process leaves the line whole or not at all.
        os.write(self._file.fileno(), (json.dumps(line) + "\n").encode())
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        part = line["part"]
        if "begun" in line:
            self.begun[part] = line["begun"]
            self.steps[part] = {}
        elif "step" in line:
            self.steps.setdefault(part, {})[line["step"]] = line
        else:
            self.finished.add(part)


@contextlib.contextmanager
def journaled(folder: Path, job: str) -> Iterator[Journal]:
    """Work in a folder that no other process works in; what another job left in it is removed.

    Args:
        folder: made if it is not there.
        job: identifies the job: the same text for the same work.

    Raises:
        InputError: if the folder cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+b", buffering=0)
    except OSError as error:
        raise InputError(
            f"output: {folder} cannot be made ({error.strerror}); name a folder you may write"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is at work in {folder}; wait for it, or end it, then run again"
            ) from error
        lines, length = _lines(folder / NAME)
        if not lines or lines[0].get("job") != job:
            _empty(folder)
            lines, length = [], 0
        file.truncate(length)  # what a crash of the machine left of a line
        if not lines:
            os.write(file.fileno(), (json.dumps({"job": job}) + "\n").encode())
        yield Journal(file, lines[1:])


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and their length in bytes."""
    lines: list[dict[str, Any]] = []
    length = 0
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
        length += len(text)
    return lines, length


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _boot() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.is_file() else ""
