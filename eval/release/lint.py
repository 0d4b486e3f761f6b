"""What is wrong with a release folder before anyone else sees it: card, licence, template, names, secrets."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import parse_eval_result_entries
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common import artifacts
from common.errors import InputError
from common.model import TOKENIZER_FILES, tokenizer_files
from common.schema import LABELS
from eval.release import folder as release_folder
from eval.release import leaderboards, licences
from eval.release.claims import claim_problems, index_problems
from eval.release.loading import EXAMPLE
from eval.release.reproduction import read_record
from eval.results import validate
from eval.table import card_tables

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_\-]{20,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
PATHS = re.compile(
    r"(?<![\w.:/<])/(?:home|Users|root|tmp|mnt|media|work|workspace|scratch|content|kaggle|opt|var|srv|private)"
    r"/[\w.\-]+|\b[A-Za-z]:\\+Users\\+\w+"
)
# Vocabularies hold pieces of everything.
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"})
_MARK = "zqxj"


def lint(folder: Path, base: Path | None = None) -> list[str]:
    """Everything that should keep a release from being published, each in a sentence that says what to do.

    Args:
        folder: of the release.
        base: folder of the base model, where it is at hand; its tokenizer is compared as a file, else by its hash.

    Raises:
        InputError: if the folder is no release.
    """
    if not (folder / release_folder.SUMS).is_file():
        raise InputError(
            f"{folder} holds no {release_folder.SUMS}, so it is no release of this program; name its folder"
        )
    return list(
        dict.fromkeys(
            [
                *_card_problems(folder),
                *_template_problems(folder),
                *_base_problems(folder, base),
                *_content_problems(folder),
                *_item_problems(folder),
                *_sum_problems(folder),
            ]
        )
    )


def _card_problems(folder: Path) -> Iterator[str]:
    front, body = read_card(folder)
    if not front:
        yield "README.md: there is no card with readable front matter; make the release again"
        return
    yield from _licence_problems(folder, front, body)
    if not front.get("base_model"):
        yield "README.md: base_model is missing, so nobody can tell what it was made from; add it"
    if front.get("base_model_relation") not in ("finetune", "adapter", "quantized", "merge"):
        yield "README.md: base_model_relation is missing or unknown; write finetune or adapter"
    yield from _safety_problems(folder, body)
    results = _read_json(folder / "results.json")
    if not _is_whole(results):
        yield "results.json is missing or damaged, so no claim can be held against it; make the release again"
        return
    # The tables of the evaluation are its own words.
    yield from claim_problems(body.replace(card_tables(results), ""))
    try:
        yield from index_problems(front.get("model-index"), results)
    except (AttributeError, TypeError, ValueError, KeyError):
        yield "README.md: model-index is not in the hub's form; write the card again"
    if any(row.get("by_category") for row in results["refusal"]) and "by category" not in body:
        yield "README.md: refusals were measured by category, and the card does not show them; write the card again"
    for file in sorted((folder / leaderboards.FOLDER).glob("*.yaml")):
        yield from _leaderboard_problems(file)


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and body of a release's card; an empty front matter where there is none that can be read."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, flags=re.DOTALL)
    if match is None:
        return {}, text
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}, match[2]
    return (front, match[2]) if isinstance(front, dict) else ({}, match[2])


def _licence_problems(folder: Path, front: Mapping[str, Any], body: str) -> Iterator[str]:
    licence, name = front.get("license"), front.get("license_name")
    if not licence:
        yield "README.md: license is missing; set release.license to that of the base, and make the release again"
        return
    if licence == "other" and not (name and front.get("license_link")):
        yield (
            "README.md: license is other without license_name and license_link, so nobody can tell what is allowed; "
            "set them in the recipe's release"
        )
    duties = licences.duties_of(str(licence), name)
    notice = folder / licences.NOTICE
    if not notice.is_file():
        yield "NOTICE is missing: it says that the weights were changed, and what the base asks to be said"
    elif duties.notice and duties.notice not in notice.read_text(encoding="utf-8"):
        yield f'NOTICE lacks the words that the licence {licence} prescribes: "{duties.notice}"'
    if duties.banner and duties.banner not in body:
        yield f'README.md: the licence {licence} asks for "{duties.banner}" to be shown; add it below the title'
    if duties.needs_copy and not any(folder.glob("LICENSE*")):
        yield (
            f"LICENSE is missing: {licence} may be passed on with a copy of it only; put the base's LICENSE into its "
            "folder, and make the release again"
        )
    if "## Licence" not in body:
        yield "README.md: the section on the licence is missing; write the card again"


def _safety_problems(folder: Path, body: str) -> Iterator[str]:
    section = re.search(r"^## Safety\n(.*?)(?=^## |\Z)", body, flags=re.DOTALL | re.MULTILINE)
    if section is None or "guard" not in section[1]:
        yield "README.md: the section on safety is missing, with what a guard has to do; write the card again"
    if "## What it still refuses" not in body:
        yield "README.md: it does not say what the model still refuses; write the card again"
    example = folder / EXAMPLE.name
    try:
        ast.parse(example.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        yield f"{EXAMPLE.name}, the example of a guard, is missing or no Python; make the release again"


def _leaderboard_problems(file: Path) -> Iterator[str]:
    try:
        entries = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        yield f"{leaderboards.FOLDER}/{file.name} is not in the hub's form; make the release again"
        return
    for entry in entries:
        if not re.search(r"n = \d+.*\[.+\]", entry.notes or ""):
            yield f"{leaderboards.FOLDER}/{file.name}: a claim without n and interval in its notes; add them"


def _template_problems(folder: Path) -> Iterator[str]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"the tokenizer cannot be loaded ({str(error)[:120]}); make the release again"
        return
    if not tokenizer.chat_template:
        yield "the chat template is lost: chat_template.jinja and tokenizer_config.json hold none; copy the base's"
        return
    end = _end_of_turn(tokenizer)
    stops = _stops(folder)
    if end is not None and stops is not None and end not in stops:
        yield (
            f"generation_config.json stops at {sorted(stops)}, but the template ends an answer with "
            f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}), so answers would run on; add it to eos_token_id"
        )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the template ends an answer with; None where it ends in plain text."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (jinja2.TemplateError, ValueError):
        return None
    tail = text.rpartition(_MARK)[2]
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in tail
    }
    first = min(special, key=tail.index, default=None)
    return None if first is None else special[first]


def _stops(folder: Path) -> set[int] | None:
    """The tokens that generation stops at; None where nothing in the folder says."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        if eos is not None:
            return set(eos) if isinstance(eos, list) else {eos}
    return None


def _base_problems(folder: Path, base: Path | None) -> Iterator[str]:
    """Whether tokenizer, template and licence are the base's own, byte for byte."""
    try:
        record = read_record(folder)["base"]
    except (OSError, ValueError, KeyError, TypeError):
        yield "reproduce/ is missing or damaged, so nobody can rebuild the release; make it again"
        return
    recorded: dict[str, str] = record["files"]
    licence = record.get("license") if base is None else licences.of(base)
    own_licence = read_card(folder)[0].get("license")
    if None not in (licence, own_licence) and licence != own_licence:
        yield (
            f"README.md: license is {own_licence}, the base's is {licence}, which goes on with it; set release.license "
            "to that, and make the release again"
        )
    if base is not None:
        own = [*tokenizer_files(base), *licences.files(base)]
        recorded = {str(file.relative_to(base)): artifacts.hash_file(file) for file in own}
    for name, digest in recorded.items():
        is_licence = name.startswith("LICENSE")
        if not is_licence and not any(Path(name).match(pattern) for pattern in TOKENIZER_FILES):
            continue
        if not (folder / name).is_file():
            yield f"{name} of the base is missing; copy it from there"
        elif artifacts.hash_file(folder / name) != digest:
            what = "licence" if is_licence else "tokenizer"
            yield f"{name} is not the {what} of the base; copy it from there"


def _content_problems(folder: Path) -> Iterator[str]:
    for name in release_folder.released_files(folder):
        text = _text(folder / name)
        for what, pattern in SECRETS.items():
            if re.search(pattern, text):
                yield f"{name} holds {what}; take it out, revoke it, and make the release again"
        is_vocabulary = Path(name).name in VOCABULARIES or name.endswith(".gguf")
        found = None if is_vocabulary else PATHS.search(text)
        if found:
            yield (
                f"{name} holds a path of a machine ({found[0]}); name inputs by relative paths or hub ids in the recipe"
            )


def _text(path: Path) -> str:
    """What can be read in a file: of weights the beginning alone, where names and metadata are."""
    is_text = path.suffix in release_folder.TEXT_SUFFIXES or not path.suffix
    with path.open("rb") as file:
        return file.read(-1 if is_text else artifacts.BLOCK_BYTES).decode("utf-8", errors="replace")


def _item_problems(folder: Path) -> Iterator[str]:
    path = folder / release_folder.ITEMS
    try:
        rows = artifacts.read_jsonl(path) if path.is_file() else []
    except ValueError:
        yield f"{path.name} is damaged; make the release again"
        return
    if any(_texts(row.get("details")) for row in rows):
        yield f"{path.name} holds answers as text; only their hashes may be published: make the release again"


def _texts(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    is_text = isinstance(value, str) and value not in LABELS
    return [str(value)] if is_text and not str(value).startswith(release_folder.HASHED) else []


def _sum_problems(folder: Path) -> Iterator[str]:
    said = (folder / release_folder.SUMS).read_text(encoding="utf-8", errors="replace")
    if said != release_folder.checksums(folder):
        yield (
            f"{release_folder.SUMS} does not fit the files: something was changed since the release was made "
            "(`python -m eval verify` says what); make it again"
        )


def _is_whole(results: Mapping[str, Any]) -> bool:
    try:
        validate(results)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
