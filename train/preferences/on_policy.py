"""Pairs that the models make: chosen is the original's greedy answer, rejected the abliterated model's sample.

The teacher is the undamaged original, so the pairs say what the edit broke and nothing else; no outside data, no
licence, any language. Only for prompts that the original does not refuse: its refusals are dropped.

Of several samples the one that the original finds least likely is rejected: a near miss of the chosen answer would
push both down. Where the right answers are known, chosen must be right and rejected wrong.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, chat, distributed
from common.branches import Branches, continuation_logps
from common.divergence import batches
from common.generation import ended, generate
from common.prompts import load_prompts
from common.questions import Question, check_questions, is_right, load_questions
from common.recipe import OnPolicy
from train.preferences.filters import Pair

NAME = "on_policy"
# Recipes' seeds are below 2**32: the seeds of later candidates are nobody's first.
NEXT_CANDIDATE = 2**32


def check(source: OnPolicy, key: str) -> list[str]:
    """Problems of the prompts, in words that begin with their dotted key."""
    return check_questions(source.prompts, f"{key}.prompts")


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
    """The prompts with what is known about them; where no column names their domain it is the source's."""
    return [replace(q, domain=q.domain or source.domain) for q in load_questions(source.prompts)]


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
    drawn = [
        generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
            temperature=source.temperature,
            top_p=source.top_p,
            seed=seed + number * NEXT_CANDIDATE,
            description="answers of the abliterated model",
        )
        for number in range(source.num_candidates)
    ]
    return [list(candidates) for candidates in zip(*drawn, strict=True)]


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
    pad_id = int(tokenizer.pad_token_id)
    rows = [
        Branches(prompt, [ended(model, tokenizer, ids, source.max_new_tokens) for ids in answers])
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
