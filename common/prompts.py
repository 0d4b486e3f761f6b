"""Prompts from a file (JSONL, CSV or text) or a data set, as the recipe names them."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.recipe import PromptSource, Source
from common.schema import PLACEHOLDER


def load_prompts(source: PromptSource) -> list[str]:
    """Load the prompts of a source, in order.

    Args:
        source: a file or a data set with its column, slice and template.

    Returns:
        At least one prompt, inside the template if there is one; blank ones are skipped.

    Raises:
        InputError: if the file or data set is missing or damaged, lacks the column, or holds no prompt.
    """
    prompts = [_prompt_of(row, source.column, describe(source)) for row in load_rows(source)]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise InputError(f"{describe(source)} holds no prompts; a source needs at least one")
    if source.template is None:
        return prompts
    # Not str.format: braces elsewhere in the template, and all in the prompt, are ordinary letters.
    return [source.template.replace(PLACEHOLDER, prompt) for prompt in prompts]


def check_prompts(source: PromptSource, key: str) -> list[str]:
    """What is wrong with a source, beginning with its dotted key in the recipe."""
    try:
        load_prompts(source)
    except InputError as error:
        return [f"{key}: {error}"]
    return []


def load_rows(source: Source) -> list[dict[str, Any]]:
    """Load the rows of a file or data set, in order.

    Raises:
        InputError: as `load_prompts`.
    """
    rows = _file_rows(Path(source.path)) if source.path is not None else _dataset_rows(source)
    if source.slice is None:
        return rows
    start, stop = (int(part) if part else None for part in source.slice.split(":"))
    return rows[start:stop]


def describe(source: Source) -> str:
    """The source in words, for messages."""
    return (
        str(source.path)
        if source.path is not None
        else f"data set {source.dataset} ({source.split})"
    )


def _file_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is no file; correct the path (it is taken from the current folder)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    if path.suffix in (".jsonl", ".json"):
        return _jsonl_rows(path, text)
    if path.suffix == ".csv":
        return _csv_rows(path, text)
    if path.suffix == ".txt":
        return [{"prompt": line} for line in text.split("\n") if line.strip()]
    raise InputError(f"{path} ends in {path.suffix!r}; name a .jsonl, .csv or .txt file")


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        # As a file, not as lines: a quoted field may hold line breaks.
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(
            f"{path} is not CSV that can be read ({error}); convert it to JSONL"
        ) from error


def _jsonl_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines, which also cuts at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number} is not JSON ({error.msg}); a JSONL file has one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{number} is no JSON object; a JSONL file has one object a line"
            )
        rows.append(row)
    return rows


def _dataset_rows(source: Source) -> list[dict[str, Any]]:
    import datasets  # noqa: PLC0415  # slow to import and not needed for files

    try:
        loaded = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the library raises a dozen kinds, none of which the user should read as a traceback
        reason = " ".join(f"{type(error).__name__}: {error}".split("\n")[0].split())[:200]
        raise InputError(
            f"{describe(source)} could not be loaded ({reason}); check the name, split and network, or "
            "name a local file with `path`"
        ) from error
    return [dict(row) for row in loaded]


def _prompt_of(row: dict[str, Any], column: str, name: str) -> str:
    if column not in row:
        raise InputError(
            f"{name} has no column {column!r} (found: {', '.join(map(str, row))}); set `column`"
        )
    value = row[column]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # A conversation: its first user message. A list must never become one long prompt.
        value = next(
            (message.get("content") for message in value if message.get("role") == "user"), None
        )
    if not isinstance(value, str):
        raise InputError(
            f"{name}: column {column!r} holds {type(value).__name__}, not text; name another column"
        )
    return value
