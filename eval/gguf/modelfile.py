"""Ollama's description of a model: which file it is, how a conversation is written, and where an answer ends.

Ollama writes conversations with Go's templates, not with the Jinja of the file, so the pieces between the turns are
read off the tokenizer's own template. What they make is held against that template; where it differs, none is given.
"""

from dataclasses import dataclass, replace

import jinja2
from transformers import PreTrainedTokenizerBase

_MARKS = {"s": "zqxa", "u": "zqxb", "a": "zqxc"}
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_TEMPLATE = (
    "{{{{ if .System }}}}{begin}{{{{ else }}}}{opening}{{{{ end }}}}"
    '{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}{after_system}'
    '{{{{ else if eq .Role "user" }}}}{user}{{{{ .Content }}}}{after_user}'
    '{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{after_answer}{{{{ end }}}}{{{{ end }}}}{answer}'
)


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the turns.

    Attributes:
        begin: in front of everything, where a system turn follows.
        opening: in front of everything, where none does.
        system: in front of a system turn; likewise `user` and `answer`.
        after_system: behind a system turn; likewise `after_user` and `after_answer`.
    """

    begin: str
    opening: str
    system: str
    after_system: str
    user: str
    after_user: str
    answer: str
    after_answer: str


def modelfile(tokenizer: PreTrainedTokenizerBase, file: str) -> str:
    """The text of a Modelfile.

    Args:
        tokenizer: with the chat template that the model is asked with.
        file: the GGUF file, relative to the Modelfile.
    """
    lines = [f"FROM {file}"]
    pieces = _pieces(tokenizer)
    if pieces is None:
        lines.append("# No TEMPLATE: the chat template in the file says more than a few pieces do.")
    else:
        lines.append(f'TEMPLATE """{_TEMPLATE.format(**vars(pieces))}"""')
        if pieces.after_answer.strip():
            lines.append(f'PARAMETER stop "{pieces.after_answer.strip()}"')
    return "\n".join(lines) + "\n"


def _pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """Read the pieces off renderings with marks for words; None where they do not make what the template makes."""
    try:
        pieces = _cut(tokenizer)
        is_same = all(
            _join(pieces, roles) == _render(tokenizer, roles, is_open=True)
            for roles in ("u", "su", "uau", "suau")
        )
    except (jinja2.TemplateError, ValueError, IndexError):
        return None
    written = "".join(vars(pieces).values())
    if not is_same or any(mark in written for mark in ("{{", "}}", '"""')):
        return None
    bos = tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return pieces
    # The tokenizer puts it in front of every text by itself.
    return replace(
        pieces, begin=pieces.begin.removeprefix(bos), opening=pieces.opening.removeprefix(bos)
    )


def _cut(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Cut renderings at the marks.

    Raises:
        ValueError, IndexError: if a rendering does not hold them.
    """
    system, user, answer = (_MARKS[role] for role in "sua")
    asked = _render(tokenizer, "u")
    opening, after_user = asked.split(user)
    opens = _render(tokenizer, "u", is_open=True).split(user)[1].removeprefix(after_user)
    after_answer = _render(tokenizer, "ua").split(answer)[1]
    again = _render(tokenizer, "uau").split(answer)[1]
    before_user = again.split(user)[0].removeprefix(after_answer)
    before_system, rest = _render(tokenizer, "su").split(system)
    bos = tokenizer.bos_token or ""
    begin = bos if before_system.startswith(bos) else ""
    return Pieces(
        begin=begin,
        opening=opening.removesuffix(before_user),
        system=before_system.removeprefix(begin),
        after_system=rest.split(user)[0].removesuffix(before_user),
        user=before_user,
        after_user=after_user,
        answer=opens,
        after_answer=after_answer,
    )


def _join(pieces: Pieces, roles: str) -> str:
    """What Ollama makes of the marks of a conversation, with an answer begun."""
    parts = {
        "s": (pieces.system, pieces.after_system),
        "u": (pieces.user, pieces.after_user),
        "a": (pieces.answer, pieces.after_answer),
    }
    turns = [parts[role][0] + _MARKS[role] + parts[role][1] for role in roles]
    return (pieces.begin if "s" in roles else pieces.opening) + "".join(turns) + pieces.answer


def _render(tokenizer: PreTrainedTokenizerBase, roles: str, *, is_open: bool = False) -> str:
    turns = [{"role": _ROLES[role], "content": _MARKS[role]} for role in roles]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_open))
