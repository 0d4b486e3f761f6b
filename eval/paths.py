"""Fields of results.json by dotted path, as gates, studies and documents name them.

`benchmarks[addition].healed.value`: a name in brackets selects the row of a list by its `name`, so
it may hold dots itself.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import InputError

_STEP = re.compile(r"\.?(?P<key>[^.\[\]]+)(?:\[(?P<row>[^\]]+)\])?")


def field(results: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401  # whatever the field holds
    """Look a field up.

    Args:
        results: as in results.json.
        path: for example `pooled.recovery.value`.

    Returns:
        The field, or None if it or something on the way to it is null (nothing was there to
        measure).

    Raises:
        InputError: if there is no such field; names what is there instead.
    """
    found: Any = results
    walked = ""
    for key, row in _steps(path):
        if found is None:
            return None
        if not isinstance(found, Mapping) or key not in found:
            raise InputError(_missing(path, walked or "results.json", key, _keys(found)))
        found = found[key]
        walked = f"{walked}.{key}".lstrip(".")
        if row is not None:
            found = _row(found, row, path, walked)
            walked = f"{walked}[{row}]"
        elif isinstance(found, list) and path != walked:
            raise InputError(
                f'"{path}": {walked} is a list; name one of its rows in brackets, e.g. {walked}'
                f"[{next(iter(_names(found)), 'name')}]"
            )
    return found


def number(results: Mapping[str, Any], path: str) -> float | None:
    """Look a number up; None if nothing was there to measure.

    Raises:
        InputError: if there is no such field, or it is no number.
    """
    found = field(results, path)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        inside = f"; name one of its fields ({', '.join(_keys(found))})" if _keys(found) else ""
        raise InputError(f'"{path}" is no number but {type(found).__name__}{inside}')
    return float(found)


def _steps(path: str) -> list[tuple[str, str | None]]:
    steps, end = [], 0
    while end < len(path):
        match = _STEP.match(path, end)
        if match is None or (end == 0) == match.group().startswith("."):
            raise InputError(
                f'"{path}" is no path; write it like benchmarks[addition].healed.value'
            )
        steps.append((match["key"], match["row"]))
        end = match.end()
    if not steps:
        raise InputError(
            "an empty path names no field; write it like benchmarks[addition].healed.value"
        )
    return steps


def _row(rows: object, name: str, path: str, walked: str) -> Mapping[str, Any]:
    if not isinstance(rows, list) or (rows and not isinstance(rows[0], Mapping)):
        raise InputError(
            f'"{path}": {walked} has no rows to select with brackets; write the path without '
            f"[{name}]"
        )
    for row in rows:
        if row["name"] == name:
            return dict(row)
    raise InputError(_missing(path, walked, name, _names(rows)))


def _missing(path: str, where: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    guess = f'; did you mean "{near[0]}"?' if near else "; correct the path"
    return f'"{path}": {where} has no "{key}"{guess} (known: {", ".join(known) or "nothing"})'


def _keys(found: object) -> list[str]:
    return sorted(map(str, found)) if isinstance(found, Mapping) else []


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(row["name"]) for row in rows if isinstance(row, Mapping)]
