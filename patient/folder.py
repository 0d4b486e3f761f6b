"""The patient's folder: what is accepted there, and how a new one comes into place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError
from patient.files import RECORD
from patient.levels import Level


def existing_patient(folder: Path, architecture: str, seed: int) -> list[Level] | None:
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
    record_path = folder / RECORD
    if not record_path.is_file():
        raise InputError(
            f"--output {folder} is not empty and holds no patient ({RECORD} is missing); "
            "name another folder, or empty this one"
        )
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{record_path} is damaged ({error}); remove {folder}") from error
    if (record["architecture"], record["seed"]) != (architecture, seed):
        raise InputError(
            f"--output {folder} holds another patient ({record['architecture']}, seed "
            f"{record['seed']}); name another folder, or remove this one"
        )
    return [Level(**level) for level in record["levels"].values()]


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
