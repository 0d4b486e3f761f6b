"""What the licence of a base asks of whoever passes on a changed copy: notices, names, links.

Not legal advice, and not the licences themselves: a release carries the base's own LICENSE files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
NOTICE = "NOTICE"


@dataclass(frozen=True)
class Duties:
    """What a licence asks for.

    Attributes:
        notice: words that a NOTICE file must hold; None: none are prescribed.
        banner: words to show prominently where the model is described; None: none are prescribed.
        prefix: pattern that the published name must begin with; None: any name.
        policy: address of the acceptable-use policy that goes with the model.
        needs_copy: whether a copy of the licence must come with the weights.
    """

    notice: str | None = None
    banner: str | None = None
    prefix: str | None = None
    policy: str | None = None
    needs_copy: bool = False


def _llama(version: str, banner: str = "Built with Llama", prefix: str = r"llama") -> Duties:
    meta = "Meta " if version == "3" else ""
    named = f"{meta}Llama {version}"
    return Duties(
        notice=f"{named} is licensed under the {named} Community License, "
        "Copyright \u00a9 Meta Platforms, Inc. All Rights Reserved.",
        banner=banner,
        prefix=prefix,
        policy=f"https://www.llama.com/llama{version.replace('.', '_')}/use-policy",
        needs_copy=True,
    )


DUTIES = {
    "llama2": Duties(
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        policy="https://ai.meta.com/llama/use-policy",
        needs_copy=True,
    ),
    "llama3": _llama("3", "Built with Meta Llama 3", r"llama[- _.]?3"),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2"),
    "llama3.3": _llama("3.3"),
    "llama4": _llama("4"),
    "gemma": Duties(
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        policy="https://ai.google.dev/gemma/prohibited_use_policy",
        needs_copy=True,
    ),
    "apache-2.0": Duties(),
}


def duties_of(licence: str, name: str | None = None) -> Duties:
    """What a licence asks for, by its id on the hub, or by its name where that is `other`."""
    known = name if licence == "other" and name else licence
    return DUTIES.get(known.lower().replace(" ", ""), Duties())


def files(folder: Path) -> list[Path]:
    """The licence files of a model folder."""
    return [file for pattern in LICENCE_FILES for file in sorted(folder.glob(pattern))]


def of(folder: Path) -> str | None:
    """The licence that the card of a model folder names; None where there is no card, or it names none."""
    try:
        found = ModelCard.load(folder / "README.md").data.get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def notice(base: Path, base_name: str, duties: Duties) -> str:
    """The NOTICE of a release: the base's own, what its licence prescribes, and that the weights were changed."""
    own = base / NOTICE
    parts = [own.read_text(encoding="utf-8").rstrip()] if own.is_file() else []
    if duties.notice is not None and not any(duties.notice in part for part in parts):
        parts.append(duties.notice)
    parts.append(
        f"The weights in this folder were made from {base_name} and changed: edited, then trained further. README.md "
        "says how."
    )
    return "\n\n".join(parts) + "\n"


def name_problem(repo_id: str, licence: str, name: str | None = None) -> str | None:
    """Why a model must not be published under a name, if its licence minds."""
    duties = duties_of(licence, name)
    published = repo_id.rpartition("/")[2]
    if duties.prefix is None or re.match(duties.prefix, published, re.IGNORECASE):
        return None
    wanted = "Llama-3" if "3" in duties.prefix else "Llama"
    return (
        f'the licence {name or licence} asks for a name that begins with "{wanted}", and {published} does not; '
        f"publish it as {repo_id.rpartition('/')[0] or 'owner'}/{wanted}-{published}"
    )
