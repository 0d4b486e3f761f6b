"""A fast tokenizer as GGUF stores one: byte-level BPE with a known pre-tokenizer, or SentencePiece's BPE."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama.cpp's name of a pre-tokenizer by the expression it splits at.
EXPRESSIONS = {
    rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{_REST}": "qwen2",
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
# gguf.TokenType, whose package is an extra.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a tokenizer.

    Attributes:
        model: gpt2 for byte-level BPE, llama for SentencePiece's.
        pre: llama.cpp's name for how text is split before merging.
        tokens: by id, as many as the model has embeddings.
        types: of each token.
        merges: of a byte-level BPE, best first.
        scores: of a SentencePiece BPE's tokens; the higher, the sooner merged.
        adds_space: a space is put in front of a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool | None = None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Take a fast tokenizer apart.

    Args:
        tokenizer: of the model.
        size: rows of its embedding.

    Raises:
        InputError: if GGUF has no name for it; a near one would cut every text otherwise than in training.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("release.gguf: the tokenizer has no tokenizer.json; save a fast one")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"release.gguf: a tokenizer of kind {model['type']} cannot be written, BPE alone; point "
            "release.gguf_converter at llama.cpp's convert_hf_to_gguf.py, or delete release.gguf"
        )
    tokens, types = _tokens(parts, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", _pre_tokenizer(parts), tokens, types, merges=merges)
    types = _byte_types(tokens, types, model.get("unk_token"))
    scores = _scores(tokens, model["merges"])
    return Vocabulary(
        "llama", "default", tokens, types, scores=scores, adds_space=_adds_space(parts)
    )


def _tokens(parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by id with their types; ids that no token has are filled up."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    # What a class of tokenizers adds by itself beyond the embedding is nothing that the model could read.
    added = {token["id"]: token for token in parts["added_tokens"] if token["id"] < size}
    named = {index: token for token, index in parts["model"]["vocab"].items()}
    named |= {index: token["content"] for index, token in added.items()}
    if max(named) >= size:
        raise InputError(
            f"release.gguf: the tokenizer has {max(named) + 1} tokens, the model embeds {size}; make them fit"
        )
    for index, token in named.items():
        tokens[index] = token
        is_special = index in added and added[index]["special"]
        types[index] = CONTROL if is_special else USER_DEFINED if index in added else NORMAL
    return tokens, types


def _pre_tokenizer(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer.

    Raises:
        InputError: if it has none that is known here.
    """
    steps = parts["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            found = EXPRESSIONS.get(steps[0]["pattern"].get("Regex", ""))
            if found is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
                return found
    raise InputError(
        "release.gguf: llama.cpp's name of the tokenizer's pre-tokenizer is not known here, and a wrong one would cut "
        "texts otherwise than in training; point release.gguf_converter at llama.cpp's convert_hf_to_gguf.py, or "
        "delete release.gguf"
    )


def _byte_types(tokens: Sequence[str], types: Sequence[int], unknown: str | None) -> list[int]:
    found = list(types)
    for index, token in enumerate(tokens):
        if token == unknown:
            found[index] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[index] = BYTE
    return found


def _scores(tokens: Sequence[str], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """What a token is worth by its place among the merges: SentencePiece joins the best pair first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    lowest = len(merges)
    return [-float(ranks.get(token, lowest)) for token in tokens]


def _adds_space(parts: Mapping[str, Any]) -> bool:
    normalizer = json.dumps(parts["normalizer"] or {})
    pre_tokenizer = parts["pre_tokenizer"] or {}
    prepends = '"Prepend"' in normalizer
    return prepends or pre_tokenizer.get("prepend_scheme") in ("first", "always")


def add_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ANN401  # gguf.GGUFWriter, an extra
    """Write a tokenizer into the header of a file, with its special tokens and its chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
