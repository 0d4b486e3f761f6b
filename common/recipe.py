"""Load a recipe: one YAML file and dotted `key=value` pairs, checked as a whole.

Every problem is reported at once, with its file and line, its key, why it cannot work and what to
do. Nothing here imports torch: a recipe is checked in a blink. `python -m common.recipe` writes
the JSON Schema that editors use (`recipes/schema.json`).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from common import document as documents
from common.document import Document, Key, Problem
from common.errors import RecipeError
from common.schema import (
    COMPONENTS,
    SEARCHED_STRENGTHS,
    TAG_MARK,
    AbliterationPrompts,
    AbliterationSection,
    Add,
    Anchor,
    Biprojected,
    ColumnNorm,
    Columns,
    CrossEntropy,
    DifferenceInMeans,
    Divergence,
    EditWeights,
    EndpointJudge,
    Engine,
    EvalSection,
    Filters,
    FixedSelection,
    GeometricMedian,
    LayerKernel,
    Limit,
    LmEval,
    LocalQuestions,
    LogisticRegression,
    Mix,
    ModelJudge,
    ModelSection,
    NliJudge,
    OnPolicy,
    Orthogonalize,
    PanelFormat,
    PanelPrompts,
    Parameter,
    PreferenceDataset,
    Projected,
    PromptSource,
    Questions,
    QuickQuestions,
    Recipe,
    Refusal,
    ReleaseSection,
    RowNorm,
    ScoresSelection,
    SearchSelection,
    Source,
    Stopping,
    StudySection,
    Svd,
    TaggedPrompts,
    TrackingSection,
    TrainSection,
    ValidationPrompts,
    WinsorizedMeans,
    nearest,
)

__all__ = [
    "COMPONENTS",
    "SEARCHED_STRENGTHS",
    "AbliterationPrompts",
    "AbliterationSection",
    "Add",
    "Anchor",
    "Biprojected",
    "ColumnNorm",
    "Columns",
    "CrossEntropy",
    "DifferenceInMeans",
    "Divergence",
    "EditWeights",
    "EndpointJudge",
    "Engine",
    "EvalSection",
    "Filters",
    "FixedSelection",
    "GeometricMedian",
    "LayerKernel",
    "Limit",
    "LmEval",
    "LocalQuestions",
    "LogisticRegression",
    "Mix",
    "ModelJudge",
    "ModelSection",
    "NliJudge",
    "OnPolicy",
    "Orthogonalize",
    "PanelFormat",
    "PanelPrompts",
    "Parameter",
    "PreferenceDataset",
    "Projected",
    "PromptSource",
    "Questions",
    "QuickQuestions",
    "Recipe",
    "Refusal",
    "ReleaseSection",
    "RowNorm",
    "ScoresSelection",
    "SearchSelection",
    "Source",
    "Stopping",
    "StudySection",
    "Svd",
    "TaggedPrompts",
    "TrackingSection",
    "TrainSection",
    "ValidationPrompts",
    "WinsorizedMeans",
    "dump",
    "json_schema",
    "load_recipe",
    "overlay",
    "placed",
    "raw_section",
    "resolved",
]

# What belongs there, for each wrong type that pydantic tells apart.
_TYPES: Final[Mapping[str, str]] = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BARE: Final = frozenset({"a whole number", "a number", "true or false"})
_LIMITS: Final[Mapping[str, str]] = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be {le:g} or less",
}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` pairs that replace or add values.

    Raises:
        RecipeError: with every problem found, each naming file and line, key, reason and remedy.
    """
    document = _document(path, overrides)
    problems = list(document.problems)
    reported = {problem.key for problem in problems}
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            problem = _problem(details, document)
            # pydantic counts only sound entries: a list of wrong ones is not empty to a person.
            empty = details["type"] == "too_short" and details["input"]
            if not empty and problem.key not in reported:
                problems.append(problem)
    if problems:
        # By line, overrides last: the order in which a person goes through the file.
        problems.sort(key=lambda problem: problem.place.line or sys.maxsize)
        raise RecipeError([str(problem) for problem in problems])
    return recipe


def placed(problems: Sequence[str], path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Put file and line in front of problems that begin with a dotted key.

    For what the stages' own checks find in a recipe that has already been loaded.
    """
    document = _document(path, overrides)
    return [
        f"{document.place(documents.parse_key(problem.partition(': ')[0])).label}: {problem}"
        for problem in problems
    ]


def overlay(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return overrides without those that changes replace, followed by the changes."""

    def key_of(text: str) -> Key:
        return documents.parse_key(text.partition("=")[0].strip())

    changed = [key_of(text) for text in changes]
    kept = [
        text for text in overrides if not any(key_of(text)[: len(key)] == key for key in changed)
    ]
    return [*kept, *changes]


def raw_section(path: Path, overrides: Sequence[str], key: str) -> dict[str, Any]:
    """Return a top-level section as it stands in a recipe that may be wrong elsewhere.

    Raises:
        RecipeError: if the file cannot be read at all.
    """
    section = _document(path, overrides).data.get(key)
    return dict(section) if isinstance(section, Mapping) else {}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, with every default filled in."""
    return recipe.model_dump(mode="json")


def dump(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML, which loads to an equal recipe."""
    return documents.dump(resolved(recipe))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }


def _document(path: Path, overrides: Sequence[str]) -> Document:
    """Read the file and lay the overrides over it."""
    document = documents.read(path)
    for text in overrides:
        documents.override(document, text, _default)
    return document


def _problem(details: ErrorDetails, document: Document) -> Problem:
    """Translate one of pydantic's errors."""
    key = _key(details["loc"])
    kind = details["type"]
    value = details["input"]
    context = details.get("ctx", {})
    if kind == "recipe":
        return Problem(document.place(key), key, context["text"])
    if kind == "component":
        return _component_problem(details["loc"], details["msg"], value, document)
    if kind == "extra_forbidden":
        text = _unknown_key(details["loc"])
    elif kind == "missing":
        text = f"is missing; add it ({_description(details['loc'])})"
    elif kind in _LIMITS:
        text = f"is {value}, but {_LIMITS[kind].format(**context)}"
    elif kind == "literal_error":
        text = _not_one_of(value, _literals(details["loc"]), document.text(key))
    elif kind in _TYPES:
        text = _wrong_type(_TYPES[kind], value, document.text(key))
    elif kind == "finite_number":
        text = f"is {value}, which is not a usable number"
    elif kind in ("too_short", "string_too_short"):
        text = "is empty; give at least one, or delete the key"
    elif kind == "string_pattern_mismatch":
        text = f'"{value}" is not usable as a name; use letters, digits, ".", "_" and "-"'
    elif kind == "string_too_long":
        text = f"is longer than {context['max_length']} characters; shorten it"
    else:
        text = details["msg"]
    return Problem(document.place(key), key, text)


def _component_problem(loc: Key, kind: str, value: object, document: Document) -> Problem:
    """Say which names are known at a place, and which is near."""
    key = _key(loc)
    known = {name for member in _types(loc) for name in _names(member)}
    article = "an" if kind[0] in "aeiou" else "a"
    if not isinstance(value, Mapping):
        text = f"is not a mapping; write {{name: ...}} with {article} {kind}"
        return Problem(document.place(key), key, f"{text} (known: {', '.join(sorted(known))})")
    place = document.place((*key, "name"))
    if "name" not in value:
        text = f"is missing; name {article} {kind} (known: {', '.join(sorted(known))})"
    elif not isinstance(value["name"], str):
        text = _wrong_type("text", value["name"], document.text((*key, "name")))
    else:
        text = f'"{value["name"]}" is not {article} {kind}{nearest(value["name"], known)}'
    return Problem(place, (*key, "name"), text)


def _unknown_key(loc: Key) -> str:
    """Say which keys are known beside an unknown one, and whose key it is."""
    model = _model(loc[:-1])
    word = str(loc[-1])
    fields = model.model_fields if model else {}
    for siblings in COMPONENTS.values():
        if model in siblings.values():
            owners = [name for name, other in siblings.items() if word in other.model_fields]
            if owners:
                mine = next(name for name, other in siblings.items() if other is model)
                return f"is a key of {' and '.join(owners)}, not of {mine}; delete it"
    return f'"{word}" is not a key here{nearest(word, fields)}'


def _not_one_of(value: object, known: Sequence[str], text: str | None) -> str:
    """Say which words are possible."""
    if isinstance(value, bool) and text is not None:
        reading = f"{text} without quotes is a boolean in YAML"
        return f"{reading}; write a word in quotes (known: {', '.join(known)})"
    if not isinstance(value, str):
        return f"{_wrong_type('a word', value, text)} (known: {', '.join(known)})"
    return f'"{value}" is not possible here{nearest(value, known)}'


def _wrong_type(wanted: str, value: object, text: str | None) -> str:
    """Say what stands there, what belongs there, and what to do about YAML's reading of it."""
    belongs = f"but {wanted} belongs here"
    if value is None:
        return f"is empty, {belongs}; give it a value or delete the key"
    if isinstance(value, bool | int | float):
        kind = "boolean" if isinstance(value, bool) else "number"
        written = text or str(value).lower()
        if wanted == "text":
            return f'{written} without quotes is a {kind} in YAML, {belongs}; write "{written}"'
        if wanted == "a whole number" and isinstance(value, float) and value.is_integer():
            return f"{written} is not a whole number; write {int(value)}"
        return f"{written} is a {kind}, {belongs}"
    if isinstance(value, str):
        # The text of quoted scalars is not kept, so this one was quoted for no reason.
        remedy = "; write it without quotes" if text is None and wanted in _BARE else ""
        return f'"{value}" is text, {belongs}{remedy}'
    return f"is {'a list' if isinstance(value, list) else 'a mapping'}, {belongs}"


def _key(loc: Key) -> Key:
    """Drop from pydantic's place of an error what is no key: tags of unions, marks of dict keys."""
    return tuple(
        step
        for step in loc
        if isinstance(step, int) or not (step.startswith(TAG_MARK) or step == "[key]")
    )


def _types(loc: Key) -> list[Any]:
    """Return the types that the schema allows at a place; none below a pass-through block."""
    here: list[Any] = [Recipe]
    for step in loc:
        if isinstance(step, str) and step.startswith(TAG_MARK):
            tagged = [kind for kind in here if step[len(TAG_MARK) :] in _names(kind)]
            here = tagged or here
        else:
            here = [inner for kind in here for inner in _flatten(_inner(kind, step))]
    return here


def _inner(kind: Any, step: str | int) -> Any:  # noqa: ANN401  # annotations have no common type
    """Go one step down: to a field, an entry or a value."""
    if _is_model(kind):
        known = kind.model_fields.get(step)
        return known.annotation if known else None
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _flatten(kind: Any) -> list[Any]:  # noqa: ANN401  # annotations have no common type
    """Return the members of a union, without what is attached to them."""
    if get_origin(kind) is Annotated:
        return _flatten(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [inner for member in get_args(kind) for inner in _flatten(member)]
    return [kind]


def _is_model(kind: object) -> bool:
    """Tell a section of the schema from the other types."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _names(kind: Any) -> tuple[str, ...]:  # noqa: ANN401  # annotations have no common type
    """Return the `name` that selects a component, or nothing for other types."""
    known = kind.model_fields.get("name") if _is_model(kind) else None
    return get_args(known.annotation) if known else ()


def _model(loc: Key) -> type[BaseModel] | None:
    """Return the section of the schema at a place."""
    return next((kind for kind in _types(loc) if _is_model(kind)), None)


def _literals(loc: Key) -> list[str]:
    """Return the words that are possible at a place."""
    return [word for kind in _types(loc) if get_origin(kind) is Literal for word in get_args(kind)]


def _description(loc: Key) -> str:
    """Return what the schema says about a key."""
    model = _model(loc[:-1])
    known = model.model_fields.get(str(loc[-1])) if model else None
    return (known.description if known and known.description else "no default").rstrip(".")


def _default(key: Key) -> dict[str, Any]:
    """Return what a mapping holds that the file does not have, before an override adds to it."""
    model = _model(key[:-1])
    known = model.model_fields.get(str(key[-1])) if model else None
    value = known.get_default() if known else None
    if isinstance(value, BaseModel) and hasattr(value, "name"):
        return {"name": value.name}
    return dict(value) if isinstance(value, dict) else {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
