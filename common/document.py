"""A YAML file read with the place of every value, and dotted `key=value` pairs laid over it.

PyYAML's YAML 1.1 reading is kept with three changes, each where only one meaning makes sense here:
`5e-7` is a number, and dates and base-60 numbers (`10:20`) are text. A key that stands twice in
a mapping is a problem instead of a silent overwrite.
"""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from common.errors import RecipeError

Key = tuple[str | int, ...]

_TAG: Final = "tag:yaml.org,2002:"
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT: Final = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_SCALARS: Final = {_TAG + kind for kind in ("str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """SafeLoader in which `5e-7` is a number and dates and base-60 numbers are text."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text `5e-7`, so that what it writes reads back unchanged."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag in (_TAG + "bool", _TAG + "null")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "merge", re.compile("<<$"), ["<"])
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and line or an override, and the text that stood there."""

    label: str
    line: int = 0
    text: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it was written, under which key, and what to do."""

    place: Place
    key: Key
    text: str

    def __str__(self) -> str:
        """Return `file:line: dotted.key: what is wrong`."""
        parts = (self.place.label, dotted(self.key), self.text)
        return ": ".join(part for part in parts if part)


@dataclass
class Document:
    """Plain data, the place of each of its keys, and the problems met while reading."""

    source: str
    data: dict[str, Any]
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> Place:
        """Return the place of a key, or of the nearest thing around it that has one."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return Place(self.source)

    def text(self, key: Key) -> str | None:
        """Return what was literally written for a key, where it is a plain scalar."""
        place = self.places.get(key)
        return place.text if place else None

    def problem(self, key: Key, text: str) -> None:
        """Note a problem of a key."""
        self.problems.append(Problem(self.place(key), key, text))


def dotted(key: Key) -> str:
    """Write a key as a person would: `train.anchors[1].weight`."""
    text = ""
    for step in key:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def parse_key(text: str) -> Key:
    """Read `train.anchors[1].weight` or `train.anchors.1.weight` back into its steps.

    A gate's name holds dots itself, so below `eval.accept` everything up to `.min` or `.max` is
    one step.
    """
    gate = text.removeprefix("eval.accept.")
    if gate != text:
        name, _, limit = gate.rpartition(".")
        return ("eval", "accept", *((name, limit) if limit in ("min", "max") else (gate,)))
    steps = re.sub(r"\[(\d+)\]", r".\1", text).split(".")
    return tuple(int(step) if step.isdecimal() else step for step in steps)


def read(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        RecipeError: if the file cannot be read or is not YAML.
    """
    source = str(path)
    text = _read_text(path)
    document = Document(source, {})

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError([f"{source}: the file is empty; start from a recipe in recipes/"])
        data = _Reader(loader, document, lambda line: Place(f"{source}:{line}", line)).value(
            node, ()
        )
    except yaml.YAMLError as error:
        raise RecipeError([_syntax_problem(error, text, source)]) from None
    except RecursionError:
        raise RecipeError([f"{source}: nested too deeply to be a recipe"]) from None
    if not isinstance(data, dict):
        raise RecipeError(
            [f"{source}:1: the top level is not a mapping; a recipe is made of `key: value` lines"]
        )
    document.data = data
    return document


def override(document: Document, text: str, default: Callable[[Key], object]) -> None:
    """Lay one `dotted.key=value` over a document, in place.

    Args:
        document: Changed, and given a problem where the override does not fit.
        text: The override; its value is YAML (`0.5`, `null`, `[a, b]`, `{name: fixed, layer: 3}`).
        default: What a mapping holds before an override adds to it, when the file does not have it.
    """
    name, equals, value_text = text.partition("=")
    place = Place(f"override {text}", text=value_text.strip())
    key = parse_key(name.strip())
    problem = None
    if not equals or "" in key:
        problem = "is not of the form key=value, e.g. train.anchors[0].weight=2"
        key = ()
    elif key in document.places and document.places[key].line == 0:
        problem = "the key is overridden twice; keep one of the two"
    else:
        try:
            loader = _Loader(value_text)
            node = loader.get_single_node()
            # What the file says below the key is gone, and so are its lines.
            for old in [old for old in document.places if old[: len(key)] == key]:
                del document.places[old]
            reader = _Reader(loader, document, lambda _: place)
            value = reader.value(node, key) if node else None
            problem = _assign(document.data, key, value, default)
        except yaml.YAMLError as error:
            what = getattr(error, "problem", None) or "a character is not allowed"
            problem = f"the value is not YAML ({what}); put text in quotes"
    if problem:
        document.problems.append(Problem(place, key, problem))
    else:
        document.places[key] = place
        # What the override made on its way is its own, too: a misspelt section has no other place.
        for depth in range(1, len(key)):
            document.places.setdefault(key[:depth], place)


def dump(data: object) -> str:
    """Write plain data as YAML that `read` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _assign(
    data: dict[str, Any], key: Key, value: object, default: Callable[[Key], object]
) -> str | None:
    """Set a value deep in nested data; return what is in the way, if anything is."""
    here: Any = data
    for depth, step in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(here, list):
            if not isinstance(step, int) or step >= len(here):
                return f"{dotted(key[:depth])} has {len(here)} entries, and none of them is {step}"
        elif isinstance(here, dict):
            step = str(step)
            if not last and here.get(step) is None:
                here[step] = default(key[: depth + 1]) or {}
        else:
            return f"{dotted(key[:depth])} is a single value, so it has no key {step!r}"
        if last:
            here[step] = value
        else:
            here = here[step]
    return None


class _Reader:
    """Turns YAML nodes into plain data and notes the place of each."""

    def __init__(self, loader: _Loader, document: Document, place: Callable[[int], Place]) -> None:
        self.loader = loader
        self.document = document
        self.place = place
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, key: Key) -> object:
        """Return the plain data of a node."""
        if any(node is outer for outer in self.open):
            self.problem(key, node, "contains itself (a YAML alias points to what holds it)")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, key)
        self.note(key, node)
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.value(child, (*key, i)) for i, child in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self.mapping(node, key)
        finally:
            self.open.pop()
        self.problem(key, node, f"the tag {node.tag} is not supported; write plain YAML")
        return None

    def scalar(self, node: yaml.ScalarNode, key: Key) -> object:
        """Return the word, number, boolean or null of a node."""
        self.note(key, node, node.value if node.style is None else None)
        if node.tag not in _SCALARS:
            self.problem(key, node, f"the tag {node.tag} is not supported; write plain YAML")
            return None
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            self.problem(key, node, f"{node.value!r} is not a {node.tag.removeprefix(_TAG)}")
            return None

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, object]:
        """Return a mapping whose keys are words, each standing once."""
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            name: Hashable = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key_node.tag == _TAG + "merge":
                self.problem(key, key_node, "`<<` merges are not supported; write the keys out")
            elif not isinstance(name, str) or key_node.tag != _TAG + "str":
                shown = name if isinstance(name, str) else "a list or mapping"
                self.problem(key, key_node, f"the key {shown} is not a word; put it in quotes")
            elif name in result:
                first = self.document.places[(*key, name)].line
                self.problem(
                    (*key, name), key_node, f"stands twice, first in line {first}; delete one"
                )
            else:
                result[name] = self.value(value_node, (*key, name))
                # The line of the key is where a person looks, also for a block that starts below.
                self.note((*key, name), key_node, self.document.text((*key, name)))
        return result

    def note(self, key: Key, node: yaml.Node, text: str | None = None) -> None:
        """Remember where a key stands."""
        self.document.places[key] = replace(self.place(node.start_mark.line + 1), text=text)

    def problem(self, key: Key, node: yaml.Node, text: str) -> None:
        """Note a problem at the line of a node, which may not be the line of the key."""
        place = self.place(node.start_mark.line + 1)
        self.document.problems.append(Problem(place, key, text))


def _read_text(path: Path) -> str:
    """Read a text file, or say why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = f" ({path.parent} has: {', '.join(others)})" if others else ""
        raise RecipeError([f"{path}: there is no such file{near}"]) from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: is a folder; name a recipe file in it"]) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            [f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"]
        ) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from None


def _syntax_problem(error: yaml.YAMLError, text: str, source: str) -> str:
    """Say in one line what PyYAML says in six."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = str(error.problem or error.context)
        hint = "indent with spaces, not tabs" if "'\\t'" in problem else "check quotes and indent"
        return f"{source}:{line}: not valid YAML: {problem}; {hint}"
    position = getattr(error, "position", 0)
    line = text.count("\n", 0, position) + 1
    return f"{source}:{line}: not valid YAML: a character that YAML does not allow; delete it"
