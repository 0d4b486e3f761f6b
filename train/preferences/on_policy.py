"""Pairs that the models make: chosen is the original's greedy answer, rejected the abliterated model's sample.

The teacher is the undamaged original, so the pairs say what the edit broke and nothing else; no outside data, no
licence, any language. Only for prompts that the original does not refuse: its refusals are dropped.

Of several samples the one that the original finds least likely is rejected: a near miss of the chosen answer would
push both down. Where the right answers are known, chosen must be right and rejected wrong.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from common import artifacts, chat, distributed
from common.branches import Branches, continuation_logps
from common.divergence import batches
from common.errors import InputError
from common.generation import end_tokens, generate
from common.overlap import normalize
from common.prompts import check_prompts, describe, load_prompts, load_rows
from common.recipe import OnPolicy
from train.preferences.filters import Pair

NAME = "on_policy"
# Recipes' seeds are below 2**32: the seeds of later candidates are nobody's first.
NEXT_CANDIDATE = 2**32

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """A prompt and what is known about it.

    Attributes:
        prompt: the user's turn.
        answer: the right one, if it is known.
        domain: its tag, if it has one.
    """

    prompt: str
    answer: str | None = None
    domain: str | None = None


def check(source: OnPolicy, key: str) -> list[str]:
    """Problems of the prompts, in words that begin with their dotted key."""
    problems = check_prompts(source.prompts, f"{key}.prompts")
    if problems:
        return problems
    try:
        questions(source)
    except InputError as error:
        return [f"{key}.prompts: {error}"]
    return []


def inputs(
    source: OnPolicy, excluded: frozenset[str]
) -> dict[str, object]:  # overlap is an error here
    """What the pairs depend on besides the two models."""
    found = questions(source)
    return {
        **source.model_dump(mode="json", exclude={"prompts", "batch_size"}),
        "prompts": artifacts.hash_data([question.prompt for question in found]),
        "known": artifacts.hash_data([(question.answer, question.domain) for question in found]),
    }


def prompts_used(source: OnPolicy) -> list[str]:
    """The prompts, for the overlap check against the benchmarks."""
    return load_prompts(source.prompts)


def questions(source: OnPolicy) -> list[Question]:
    """Load the prompts with what stands in the columns beside them, in order.

    Raises:
        InputError: if the prompts are unusable, or a column beside them is.
    """
    prompts, columns = load_prompts(source.prompts), source.prompts
    if columns.answer is None and columns.domain is None:
        return [Question(prompt, domain=source.domain) for prompt in prompts]
    rows = load_rows(source.prompts)
    if len(rows) != len(prompts):
        raise InputError(
            f"{describe(source.prompts)} has {len(rows) - len(prompts)} rows without a prompt, so that answers and "
            "domains cannot be told apart from theirs; delete those rows"
        )
    return [
        Question(
            prompt,
            _beside(row, columns.answer, "answer", source),
            _beside(row, columns.domain, "domain", source) or source.domain,
        )
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _beside(row: dict[str, Any], column: str | None, key: str, source: OnPolicy) -> str | None:
    if column is None:
        return None
    value = row.get(column)
    if (
        isinstance(value, bool)
        or not isinstance(value, str | int | float)
        or not str(value).strip()
    ):
        found = repr(value)[:40] if column in row else f"only {', '.join(map(str, row))}"
        raise InputError(
            f"{describe(source.prompts)}: column {column!r} should hold text or a number in every row, found {found}; "
            f"correct the file, or `{key}`"
        )
    return str(value)


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: OnPolicy, seed: int
) -> list[list[list[int]]]:
    """The candidates of every prompt; the processes of the launch share the work.

    A candidate depends on the seed, its number, the prompt and the sampling settings alone.

    Args:
        model: the abliterated one.
        tokenizer: its tokenizer.
        source: prompts and sampling settings.
        seed: the recipe's.

    Returns:
        Token ids without an end token [prompts][candidates][answer], on every process.
    """
    prompts = load_prompts(source.prompts)
    nucleus = (
        _nucleus(model, source.temperature, source.top_p) if source.top_p < 1 else nullcontext()
    )
    with nucleus:
        drawn = [
            generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=source.max_new_tokens,
                batch_size=source.batch_size,
                temperature=source.temperature,
                seed=seed + number * NEXT_CANDIDATE,
                description="answers of the abliterated model",
            )
            for number in range(source.num_candidates)
        ]
    return [list(candidates) for candidates in zip(*drawn, strict=True)]


@contextmanager
def _nucleus(model: nn.Module, temperature: float, top_p: float) -> Iterator[None]:
    """Give what lies outside the nucleus no chance, while the context lasts.

    Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1, at the temperature of the sampling.
    """
    warp = TopPLogitsWarper(top_p)

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401  # torch's hook type
        last: Tensor = output.logits[:, -1]
        outside = warp(None, last.float() / temperature).isneginf()
        output.logits = last.masked_fill(outside, -torch.inf).unsqueeze(1)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: OnPolicy,
    candidates: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """How likely a model finds each candidate: the mean log-probability per token, in nats.

    The end of an answer counts as a token where the answer was not cut, so that an empty one has a score too.

    Args:
        model: the original.
        tokenizer: its tokenizer.
        source: the prompts, and where answers are cut.
        candidates: token ids [prompts][candidates][answer].

    Returns:
        [prompts][candidates], on every process.
    """
    end, pad_id = end_tokens(model, tokenizer)[0], int(tokenizer.pad_token_id)
    if tokenizer.eos_token_id is not None:
        end = int(tokenizer.eos_token_id)
    rows = [
        Branches(
            prompt,
            [[*ids, end] if len(ids) < source.max_new_tokens else list(ids) for ids in answers],
        )
        for prompt, answers in zip(
            chat.encode(tokenizer, load_prompts(source.prompts)), candidates, strict=True
        )
    ]
    size = max(1, source.batch_size // source.num_candidates)

    def work(part: Sequence[Branches]) -> list[list[float]]:
        scores: dict[int, list[float]] = {}
        for batch in batches([row.num_tokens for row in part], size):
            found = continuation_logps(model, [part[index] for index in batch], pad_id)
            for index, logps in zip(batch, found, strict=True):
                scores[index] = [float(answer.mean()) for answer in logps]
        return [scores[index] for index in range(len(part))]

    return distributed.share(rows, work)


def pair(
    asked: Sequence[Question],
    chosen: Sequence[str],
    candidates: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
) -> tuple[list[Pair], dict[str, int]]:
    """Join the two models' answers: over the original's, of the abliterated model's candidates the worst.

    Args:
        asked: the questions.
        chosen: the original's answers.
        candidates: the abliterated model's answers to each.
        scores: of the candidates, lowest for the worst; the first of equals is taken.

    Returns:
        The pairs, and how many questions gave none for which reason.
    """
    pairs: list[Pair] = []
    counts: Counter[str] = Counter()
    for question, better, answers, values in zip(asked, chosen, candidates, scores, strict=True):
        known = question.answer
        worse = [
            (value, number)
            for number, (answer, value) in enumerate(zip(answers, values, strict=True))
            if known is None or not is_right(answer, known)
        ]
        if known is not None and not is_right(better, known):
            counts["chosen is wrong"] += 1
        elif not worse:
            counts["no candidate is wrong"] += 1
        else:
            rejected = answers[min(worse)[1]]
            pairs.append(
                Pair((("user", question.prompt),), better, rejected, NAME, question.domain)
            )
    return pairs, dict(counts)


def is_right(text: str, known: str) -> bool:
    """Whether an answer says what is known.

    Both are compared without case, spacing and punctuation at the end. A number is right if the last number in
    the text has its value ("25 plus 16 is 41." for 41); anything else if it is the whole text or the whole last
    sentence, or if that sentence ends in it as a word ("The capital is Rome." for Rome).
    """
    answer = normalize(known)
    if _NUMBER.fullmatch(answer):
        numbers = _NUMBER.findall(text)
        return bool(numbers) and _value(numbers[-1]) == _value(answer)
    last = normalize(_SENTENCE_END.split(text.strip())[-1])
    return answer in (normalize(text), last) or last.endswith(f" {answer}")


def _value(number: str) -> float:
    return float(number.replace(",", ""))
