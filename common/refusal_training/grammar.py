"""Answers drawn from a grammar: the text that the learned part of the refusal judge is trained on.

A grammar is a text of sections. `# name` opens one, and each line below it is an alternative. In a line `(a|b)` is a
choice, `{name}` another section, `{Name}` or `{name_cap}` the same with a capital, and a backslash and n a line break.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from common.refusal_model import CLASSES, MASK, words_of

_REFERENCE = re.compile(r"\{(\w+)\}")
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Reference:
    """Where another section's text goes."""

    section: str
    capital: bool


@dataclass(frozen=True)
class Choice:
    """Several texts, of which one is taken; a text is its parts in their order."""

    texts: "tuple[tuple[Part, ...], ...]"


Part: TypeAlias = str | Reference | Choice


@dataclass(frozen=True)
class Grammar:
    """What answers are made of.

    Attributes:
        sections: alternatives by name.
        words: those that a classifier may read. Others only fill in a topic, so that it learns how one answers and
            not what is talked about.
        fingerprint: of the files it was read from.
    """

    sections: Mapping[str, Choice]
    words: frozenset[str]
    fingerprint: str

    def draw(self, section: str, rng: random.Random) -> str:
        """A text of a section."""
        text = _expand(self.sections[section], self.sections, rng)
        text = re.sub(r"[ \t]+", " ", text)
        text = re.sub(r" (?=[.,?!;:])", "", text)
        return re.sub(r"([.?!])\s*\.", r"\1", text).strip()


@cache
def load_grammar() -> Grammar:
    """The grammar beside this file: english.txt says how one answers, fillers.txt what about."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in ("english.txt", "fillers.txt")]
    styles, fillers = map(_sections, texts)
    literal = " ".join(
        _REFERENCE.sub(" . ", line) for lines in styles.values() for line in lines
    ).replace("\\n", " ")
    words = frozenset(words_of(re.sub(r"[()|]", " ", literal))) - {MASK}
    sections = {
        name: Choice(tuple(_parse(line) for line in lines))
        for name, lines in {**styles, **fillers}.items()
    }
    return Grammar(sections, words, sha256("\n".join(texts).encode()).hexdigest())


def draw_answers(num_answers: int, seed: int) -> list[tuple[str, int]]:
    """Answers and the numbers of their classes in `CLASSES`, as many of each, in turns."""
    grammar, rng = load_grammar(), random.Random(seed)
    labels = [index % len(CLASSES) for index in range(num_answers)]
    return [(grammar.draw(CLASSES[label], rng), label) for label in labels]


def _sections(text: str) -> dict[str, list[str]]:
    """The lines of each section."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("# "):
            lines = sections.setdefault(line[2:].strip(), [])
        elif line.strip():
            lines.append(line.strip())
    return sections


def _parse(line: str) -> tuple[Part, ...]:
    """A line in parts; the parser walks over its marks with a stack of open choices."""
    stack: list[list[list[Part]]] = [[[]]]
    for token in re.findall(r"[(|)]|\{\w+\}|[^(|){}]+", line):
        if token == "(":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == ")" and len(stack) > 1:
            texts = stack.pop()
            stack[-1][-1].append(Choice(tuple(map(tuple, texts))))
        else:
            stack[-1][-1].append(
                _reference(token) if token[0] == "{" else token.replace("\\n", "\n")
            )
    if len(stack) > 1:
        raise ValueError(f"a bracket is left open in {line!r}")
    return tuple(stack[0][0])


def _reference(token: str) -> Reference:
    name = token[1:-1]
    return Reference(name[0].lower() + name[1:], name[0].isupper())


def _expand(choice: Choice, sections: Mapping[str, Choice], rng: random.Random) -> str:
    parts: Sequence[Part] = rng.choice(choice.texts)
    return "".join(_text(part, sections, rng) for part in parts)


def _text(part: Part, sections: Mapping[str, Choice], rng: random.Random) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Choice):
        return _expand(part, sections, rng)
    name, capital = part.section, part.capital
    if name not in sections:
        name, capital = name.removesuffix("_cap"), True
    text = _expand(sections[name], sections, rng)
    return text[:1].upper() + text[1:] if capital else text
