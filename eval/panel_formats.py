"""Published sets of prompts as their authors lay them out: which column is the prompt, what it is about, who may ask.

The columns are those of the authors' own files; the copies on the hub have the same. Sources: XSTest (Röttger et al.
2024, arXiv:2308.01263), CoCoNot's contrast set (Brahman et al. 2024, arXiv:2407.12043), OR-Bench (Cui et al. 2024,
arXiv:2405.20947), JailbreakBench (Chao et al. 2024, arXiv:2404.01318), HarmBench (Mazeika et al. 2024,
arXiv:2402.04249), StrongREJECT (Souly et al. 2024, arXiv:2402.10260), SORRY-Bench (Xie et al. 2024, arXiv:2406.14598).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import InputError
from common.recipe import PanelFormat


@dataclass(frozen=True)
class Format:
    """The columns of a published set.

    Attributes:
        prompt: of the prompt; where it holds a list of turns, the first is taken.
        category: of what it asks about.
        harmless: whether its prompts are harmless; None where a set comes in files of both kinds.
        side: of a set that has both kinds in one file: the column that tells, and its word for harmless ones.
        context: of a text that belongs in front of the prompt, where a row has one.
    """

    prompt: str
    category: str
    harmless: bool | None = None
    side: tuple[str, str] | None = None
    context: str | None = None


FORMATS: Mapping[PanelFormat, Format] = {
    "xstest": Format("prompt", "type", side=("label", "safe")),
    "coconot_contrast": Format("prompt", "subcategory", harmless=True),
    "or_bench": Format("prompt", "category"),
    "jailbreakbench": Format("Goal", "Category"),
    "harmbench": Format("Behavior", "SemanticCategory", harmless=False, context="ContextString"),
    "strongreject": Format("forbidden_prompt", "category", harmless=False),
    "sorry_bench": Format("turns", "category", harmless=False),
}


def columns(form: Format) -> list[str]:
    """The columns that every row must have."""
    return [form.prompt, form.category, *([form.side[0]] if form.side else [])]


def belongs(row: Mapping[str, Any], form: Format, *, harmless: bool) -> bool:
    """Whether a row is of the kind that is asked for."""
    return form.side is None or (str(row[form.side[0]]) == form.side[1]) == harmless


def prompt_of(row: Mapping[str, Any], form: Format) -> str:
    """The words of a row.

    Raises:
        InputError: if the column holds no text.
    """
    found = row[form.prompt]
    if isinstance(found, list) and found:
        found = found[0]
    if not isinstance(found, str):
        raise InputError(f"column {form.prompt!r} holds {type(found).__name__}, not text")
    context = row.get(form.context) if form.context else None
    return f"{context}\n\n{found}" if isinstance(context, str) and context.strip() else found
