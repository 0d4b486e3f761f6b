"""Answers: greedy, or sampled with a random stream of its own for every prompt.

A prompt's sample depends on the seed and the prompt alone, never on the batch or the process it fell into.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from common import chat, distributed


class GumbelSampling(LogitsProcessor):
    """Turns greedy decoding into sampling: the largest of logits / temperature + Gumbel noise is a sample.

    Each row draws its noise from its own generator. Source: Maddison et al. 2014, arXiv:1411.0030
    (the Gumbel-max trick).
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        """Give every row of the batch its own stream.

        Args:
            temperature: above 0.
            top_p: what lies outside the nucleus of this probability has no chance; 1: everything has.
                Source: Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
            seeds: one per row.
        """
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the noise of the next position to the scores [batch, vocab]."""
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=stream) for stream in self.generators]
        )
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        scaled = scores.float() / self.temperature
        if self.nucleus is not None:
            scaled = self.nucleus(input_ids, scaled)
        return scaled + noise.to(scores.device)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    description: str = "answers",
) -> list[list[int]]:
    """Answer prompts; the processes of the launch share the work.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: the user's turns.
        max_new_tokens: where an answer is cut if the model does not end it.
        batch_size: prompts per forward pass and process.
        system: the system prompt in front of each; None: none.
        temperature: 0 for greedy decoding.
        top_p: of the samples, see `GumbelSampling`.
        seed: of the samples.
        description: label of the progress bar.

    Returns:
        The token ids of each answer without its end token, in the prompts' order, on every process.
    """

    def sampling(part: Sequence[str]) -> LogitsProcessorList:
        seeds = [_seed_of(seed, prompt) for prompt in part]
        greedy = temperature == 0
        return LogitsProcessorList([] if greedy else [GumbelSampling(temperature, top_p, seeds)])

    def work(part: Sequence[str]) -> list[list[int]]:
        return _generate_part(
            model, tokenizer, part, system, max_new_tokens, batch_size, sampling, description
        )

    return distributed.share(prompts, work)


@torch.inference_mode()
def _generate_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    system: str | None,
    max_new_tokens: int,
    batch_size: int,
    sampling: Callable[[Sequence[str]], LogitsProcessorList],
    description: str,
) -> list[list[int]]:
    encoded = chat.encode(tokenizer, prompts, system) if prompts else []
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    bar = tqdm(total=len(order), desc=description, disable=not distributed.is_main(), leave=False)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        rows = continue_rows(
            model,
            tokenizer,
            [encoded[index] for index in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling([prompts[index] for index in batch]),
        )
        for index, row in zip(batch, rows, strict=True):
            answers[index] = row
        bar.update(len(batch))
    bar.close()
    return answers


# Tokens between two looks at what has been generated.
LOOK_EVERY = 4


class Settled(StoppingCriteria):
    """Ends a row as soon as its text so far settles the question that it was generated for."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        is_settled: Callable[[str], bool],
    ) -> None:
        """Take the question.

        Args:
            tokenizer: to read the rows with.
            prompt_length: columns of the batch before the first generated one.
            is_settled: whether a text, however it goes on, can be judged.
        """
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length
        self.is_settled = is_settled
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ANN401  # the base's
        """Which rows [batch] are settled."""
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if (input_ids.shape[1] - self.prompt_length) % LOOK_EVERY == 0:
            for row in (~self.done).nonzero().flatten().tolist():
                new = input_ids[row, self.prompt_length :]
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                assert isinstance(text, str)
                self.done[row] = self.is_settled(text)
        return self.done


@torch.inference_mode()
def continue_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: LogitsProcessorList | None = None,
    is_settled: Callable[[str], bool] | None = None,
) -> list[list[int]]:
    """Continue token ids greedily, as one batch in the given order.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: token ids of each row.
        max_new_tokens: where a row is cut if the model does not end it.
        sampling: what turns greedy decoding into something else.
        is_settled: whether a text needs no further tokens; without it every row runs to its end.

    Returns:
        The new tokens of each row without the end token.
    """
    pad_id = int(tokenizer.pad_token_id)
    ends = end_tokens(model, tokenizer)
    ids, mask = chat.pad_left(rows, pad_id, model.device)
    stopping = StoppingCriteriaList()
    if is_settled is not None:
        stopping.append(Settled(tokenizer, ids.shape[1], is_settled))
    output = model.generate(  # type: ignore[operator]  # the mixin's method is untyped
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        # The checkpoint's own generation settings would bend both greedy answers and samples.
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        logits_processor=sampling or LogitsProcessorList(),
        stopping_criteria=stopping,
        eos_token_id=ends,
        pad_token_id=pad_id,
    )
    return [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the generation configuration's and the tokenizer's."""
    configured = (
        model.generation_config.eos_token_id if model.generation_config is not None else None
    )
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(end) for end in [*ends, tokenizer.eos_token_id] if end is not None})


def ended(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answer: Sequence[int],
    max_new_tokens: int,
) -> list[int]:
    """An answer from `generate` with the end token that the model gave it, unless it was cut."""
    if len(answer) == max_new_tokens:
        return list(answer)
    end = tokenizer.eos_token_id
    return [*answer, int(end) if end is not None else end_tokens(model, tokenizer)[0]]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[:index]
    return ids


def _seed_of(seed: int, prompt: str) -> int:
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
