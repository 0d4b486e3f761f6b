"""The patient's folder: what is accepted there, and how a new one comes into place."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import InputError
from patient.files import RECORD
from patient.levels import Level


def existing_patient(
    folder: Path, architecture: str, seed: int, *, over_refusing: bool = False
) -> list[Level] | None:
    """The levels of the patient that is there already, if it is the one asked for.

    Returns:
        None if a patient has to be built: the folder is missing, or empty.

    Raises:
        InputError: if something else is in the way.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder that does not exist yet")
    if not any(folder.iterdir()):
        return None
    if not (folder / RECORD).is_file():
        raise InputError(
            f"--output {folder} is not empty and holds no patient ({RECORD} is missing); "
            "name another folder, or empty this one"
        )
    record = _read_record(folder)
    found, wanted = _name_of(record), _name(architecture, seed, over_refusing=over_refusing)
    if found != wanted:
        raise InputError(
            f"--output {folder} holds another patient ({found}); name another folder, or remove this one"
        )
    return [Level(**level) for level in record["levels"].values()]


def check_base(folder: Path, architecture: str, seed: int) -> None:
    """Whether a folder holds the finished patient that an over-refusing one is tuned from.

    Raises:
        InputError: if it does not.
    """
    wanted = _name(architecture, seed, over_refusing=False)
    if not (folder / RECORD).is_file():
        raise InputError(
            f"--base {folder} holds no patient ({RECORD} is missing); name the folder of a finished one ({wanted}), "
            "or leave --base out to train it as well"
        )
    found = _name_of(_read_record(folder))
    if found != wanted:
        raise InputError(
            f"--base {folder} holds another patient ({found}) than the one to tune ({wanted}); name that one's folder"
        )


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); remove {folder}") from error
    return record


def _name_of(record: Mapping[str, Any]) -> str:
    over_refusing = record.get("over_refusing", False)
    return _name(record["architecture"], record["seed"], over_refusing=over_refusing)


def _name(architecture: str, seed: int, *, over_refusing: bool) -> str:
    return f"{architecture}, seed {seed}" + (", over-refusing" if over_refusing else "")


@contextmanager
def in_place_at_the_end(folder: Path) -> Iterator[Path]:
    """Give a folder to fill beside the final one, and rename it there if nothing went wrong.

    An interrupted build leaves nothing at the final place.
    """
    folder = folder.absolute()
    beside = folder.with_name(f".{folder.name}.building-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"--output {folder} cannot be made ({error.strerror}); name a folder you may write"
        ) from error
    try:
        yield beside
        # An empty folder may be there; rename replaces it.
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
