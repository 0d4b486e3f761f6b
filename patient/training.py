"""Training: documents packed into rows, one phase after the other."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patient.corpus import Document
from patient.optimizer import Optimizer

ROW_LENGTH = 64
ROWS_PER_STEP = 24
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: label of the progress bar.
        epoch: gives the documents of one pass; called again whenever they are used up.
        make_optimizer: says what is trained and how fast.
        num_steps: optimizer steps.
    """

    name: str
    epoch: Callable[[random.Random], list[Document]]
    make_optimizer: Callable[[PreTrainedModel], Optimizer]
    num_steps: int


@dataclass(frozen=True)
class Tokenized:
    """A document as token ids; the first `num_prompt_tokens` are not learnt."""

    ids: list[int]
    num_prompt_tokens: int


@dataclass(frozen=True)
class Batch:
    """Packed rows, each field [rows, ROW_LENGTH].

    Attributes:
        ids: token ids, padding behind the last document of a row.
        positions: the position within each document. Where it starts again at 0, transformers
            masks across documents by itself.
        labels: at each position the next token, or IGNORED_LABEL.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, phase: Phase, *, seed: int
) -> float:
    """Train in place for one phase.

    Returns:
        The mean loss over its last fiftieth, in nats per learnt token.
    """
    batches = _batches(phase, tokenizer, random.Random(f"{phase.name} {seed}"))
    optimizer = phase.make_optimizer(model)
    losses: list[float] = []
    model.train()
    bar = tqdm(range(phase.num_steps), desc=phase.name, leave=False)
    for step in bar:
        loss = _loss(model, next(batches))
        loss.backward()
        optimizer.step(_scale(step, phase.num_steps))
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.train(mode=False)
    last = losses[-max(1, len(losses) // 50) :]
    return sum(last) / len(last)


def _scale(step: int, num_steps: int) -> float:
    """The share of the peak learning rate: up over 5% of the steps, down over the last half."""
    return min(1.0, (step + 1) / (0.05 * num_steps), (num_steps - step) / (0.5 * num_steps))


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy over the learnt tokens; the head runs at their positions only."""
    learnt = batch.labels != IGNORED_LABEL
    output = model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    logits = model.lm_head(output.last_hidden_state[learnt])
    return torch.nn.functional.cross_entropy(logits, batch.labels[learnt])


def _batches(
    phase: Phase, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[Batch]:
    rows: list[list[Tokenized]] = []
    while True:
        documents = phase.epoch(rng)
        rng.shuffle(documents)
        for row in _pack(_tokenize(documents, tokenizer)):
            rows.append(row)
            if len(rows) == ROWS_PER_STEP:
                yield _collate(rows, int(tokenizer.pad_token_id))
                rows = []


def _tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Tokenized]:
    prompts = tokenizer([document.prompt for document in documents])["input_ids"]
    completions = tokenizer([document.completion for document in documents])["input_ids"]
    for prompt, completion in zip(prompts, completions, strict=True):
        yield Tokenized(prompt + completion, len(prompt))


def _pack(documents: Iterator[Tokenized]) -> Iterator[list[Tokenized]]:
    """Group documents, in order, into rows of at most ROW_LENGTH tokens."""
    row: list[Tokenized] = []
    used = 0
    for document in documents:
        if used + len(document.ids) > ROW_LENGTH:
            yield row
            row, used = [], 0
        row.append(document)
        used += len(document.ids)
    yield row


def _collate(rows: Sequence[Sequence[Tokenized]], pad_id: int) -> Batch:
    ids = torch.full((len(rows), ROW_LENGTH), pad_id)
    positions = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, row in enumerate(rows):
        start = 0
        for document in row:
            length, skipped = len(document.ids), document.num_prompt_tokens
            stop = start + length
            ids[index, start:stop] = torch.tensor(document.ids)
            positions[index, start:stop] = torch.arange(length)
            # The position before a token is where it is predicted.
            learnt = torch.tensor(document.ids[skipped:])
            labels[index, start + skipped - 1 : stop - 1] = learnt
            start = stop
    return Batch(ids, positions, labels)
