"""A talk with the three models of a run in the terminal, their answers side by side."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError

if TYPE_CHECKING:
    from eval.conversation import Conversation

# Narrower columns would break most lines in two.
NARROWEST = 24
GAP = "  "
COMMANDS = {"/reset": "begins a new conversation", "/quit": "ends (so does the end of the input)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("run", type=Path, help="folder of a run, as runs/NAME")
    parser.add_argument("--system", help="words in front of every conversation")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="where an answer is cut (default: 256)"
    )
    parser.add_argument("--prompt", help="ask this once and end, instead of reading from the input")


def run(options: argparse.Namespace) -> None:
    """Answer what is asked until the input ends.

    Raises:
        InputError: if the folder is no run, or a setting makes no sense.
    """
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: {options.max_new_tokens} is no length; give 1 or more")
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("--prompt is empty; write a question, or leave it out")
    from common import distributed  # noqa: PLC0415  # torch comes late: a wrong command is told in a blink
    from eval.conversation import load_conversations  # noqa: PLC0415

    distributed.start()
    conversations = load_conversations(options.run, options.system)
    if options.prompt is not None:
        _say(options.prompt, conversations, options.max_new_tokens)
        return
    names = ", ".join(each.name for each in conversations)
    commands = "; ".join(f"{name} {what}" for name, what in COMMANDS.items())
    print(f"{names}, greedy. {commands}.", file=sys.stderr)
    for words in _inputs():
        if words == "/reset":
            for each in conversations:
                each.turns.clear()
            print("(a new conversation)")
        elif words.startswith("/"):
            print(f"({words.split()[0]} is no command; {commands})")
        else:
            _try_to_say(words, conversations, options.max_new_tokens)


def _inputs() -> Iterator[str]:
    """What is typed or piped in, line by line, as far as /quit."""
    while True:
        try:
            words = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if words == "/quit":
            return
        if words:
            yield words


def _try_to_say(words: str, conversations: "list[Conversation]", max_new_tokens: int) -> None:
    """A conversation that has grown too long ends neither the others nor the program."""
    try:
        _say(words, conversations, max_new_tokens)
    except InputError as error:
        print(f"({error})")


def _say(words: str, conversations: "list[Conversation]", max_new_tokens: int) -> None:
    answers: dict[str, str] = {
        each.name: each.answer(words, max_new_tokens) for each in conversations
    }
    print(side_by_side(answers, shutil.get_terminal_size().columns), flush=True)


def side_by_side(answers: Mapping[str, str], width: int) -> str:
    """Texts in columns below their names, or one below another where columns would be too narrow.

    Args:
        answers: by name.
        width: of the terminal, in characters.
    """
    column = (width - len(GAP) * (len(answers) - 1)) // len(answers)
    if column < NARROWEST:
        return "\n".join(
            line
            for name, text in answers.items()
            for line in [f"-- {name} --", *_wrapped(text, width), ""]
        )
    columns = [[name, "-" * column, *_wrapped(text, column)] for name, text in answers.items()]
    return "\n".join(
        GAP.join(cell.ljust(column) for cell in line).rstrip()
        for line in [*zip_longest(*columns, fillvalue=""), ()]
    )


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none wider; what would steer the terminal is left out."""
    shown = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
    lines = shown.expandtabs(4).split("\n")
    return [part for line in lines for part in (textwrap.wrap(line, width) or [""])]
