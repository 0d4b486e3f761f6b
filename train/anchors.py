"""Anchors: hold the healed model to a teacher's next-token distributions on the teacher's own answers, and its stream.

Two anchors make a composite teacher: the original on harmless prompts, where it knows what the edit broke, and
the abliterated model on formerly refused prompts, where it knows what the edit unlocked. Preference pairs alone
push near-miss answers down on both sides; anchors are what heals.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, chat, distributed, residual
from common.divergence import answer_logits, batches, trainable_answer_logits
from common.edits import Edit
from common.generation import ended
from train.shelf import Answers, Piece
from train.streams import Sketch, distance, removed_from_stream


@dataclass(frozen=True)
class TeacherRow:
    """One prompt, the teacher's answer, and its distributions.

    Attributes:
        prompt: token ids.
        answer: token ids, with the end token where the teacher ended.
        top_ids: ids of the teacher's likeliest tokens at each answer position [answer, k].
        top_logps: their log-probabilities [answer, k].
        streams: what is kept of its residual stream [prompt and answer, blocks, size], where the anchor holds that.
    """

    prompt: list[int]
    answer: list[int]
    top_ids: Tensor
    top_logps: Tensor
    streams: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


class Lessons:
    """A teacher's rows for prompts: made from its greedy answers, and shared as those are."""

    def __init__(
        self, answers: Answers, top_k: int, size: int | None = None, edit: Edit | None = None
    ) -> None:
        """Name the file.

        Args:
            answers: of the teacher.
            top_k: probabilities that are kept for each token.
            size: numbers that are kept of the residual stream for each token and block; none if None.
            edit: what is left out of the stream; there where `size` is.
        """
        self.answers, self.top_k, self.size, self.edit = answers, top_k, size, edit
        depends = {**answers.depends, "top_k": top_k}
        if edit is not None:
            depends |= {"size": size, "removed": edit.content()}
        self.path = answers.shelf.path("anchors", answers.teacher, depends, ".safetensors")
        self.pieces = [answers.piece, Piece(self.path, answers.teacher, self._make)]

    def rows(self) -> list[TeacherRow]:
        """One row per prompt."""
        return load_rows(self.path)

    def sketch(self) -> Sketch | None:
        """How the streams were kept that the file holds, if it holds any.

        What was left out is read from there: the model that is trained may be in 4 bits, or not there on this process.
        """
        return None if self.size is None else Sketch(self.size, load_removed(self.path))

    def _make(self, model: PreTrainedModel) -> None:
        answers, sketch = self.answers, None
        if self.size is not None and self.edit is not None:
            sketch = Sketch(self.size, removed_from_stream(model, self.edit))
        rows = teach(
            model,
            answers.shelf.tokenizer,
            answers.prompts,
            answers.ids(),
            max_new_tokens=answers.max_new_tokens,
            top_k=self.top_k,
            batch_size=answers.batch_size,
            sketch=sketch,
        )
        if distributed.is_main():
            save_rows(rows, self.path, sketch)


@torch.inference_mode()
def teach(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[list[int]],
    *,
    max_new_tokens: int,
    top_k: int,
    batch_size: int,
    sketch: Sketch | None = None,
) -> list[TeacherRow]:
    """Keep a teacher's top-k log-probabilities over its own answers, and its streams if a sketch says how.

    Args:
        teacher: the model that the anchor names.
        tokenizer: its tokenizer.
        prompts: the anchor's prompts; the processes of the launch share them.
        answers: the teacher's, without end tokens.
        max_new_tokens: where answers were cut that the teacher did not end.
        top_k: tokens that are kept at each position.
        batch_size: prompts per forward pass.
        sketch: what is kept of the residual stream; None for nothing.

    Returns:
        One row per prompt, on every process.
    """
    texts = [
        (prompt, ended(teacher, tokenizer, answer, max_new_tokens))
        for prompt, answer in zip(chat.encode(tokenizer, prompts), answers, strict=True)
    ]
    pad_id = int(tokenizer.pad_token_id)

    def work(part: Sequence[tuple[list[int], list[int]]]) -> list[TeacherRow]:
        return _teach_part(teacher, part, top_k, batch_size, pad_id, sketch)

    return distributed.share(texts, work)


def _teach_part(
    teacher: PreTrainedModel,
    texts: Sequence[tuple[list[int], list[int]]],
    top_k: int,
    batch_size: int,
    pad_id: int,
    sketch: Sketch | None,
) -> list[TeacherRow]:
    rows: dict[int, TeacherRow] = {}
    parts = list(batches([len(prompt) + len(answer) for prompt, answer in texts], batch_size))
    for batch in tqdm(
        parts, desc="teacher distributions", disable=not distributed.is_main(), leave=False
    ):
        found, kept = _listen(teacher, [texts[index] for index in batch], pad_id, sketch)
        for index, logits, stream in zip(batch, found, kept, strict=True):
            logps = torch.log_softmax(logits.float(), dim=-1)
            top_logps, top_ids = logps.topk(min(top_k, logps.shape[-1]), dim=-1)
            stream = None if stream is None else stream.to(teacher.dtype).cpu()
            rows[index] = TeacherRow(*texts[index], top_ids.cpu(), top_logps.cpu(), stream)
    return [rows[index] for index in range(len(texts))]


def _listen(
    teacher: PreTrainedModel,
    texts: Sequence[tuple[list[int], list[int]]],
    pad_id: int,
    sketch: Sketch | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The logits of each answer, and what is kept of each stream."""
    prompts, answers = [prompt for prompt, _ in texts], [answer for _, answer in texts]
    if sketch is None:
        return answer_logits(teacher, prompts, answers, pad_id), [None] * len(texts)
    with residual.reading(teacher) as streams:
        logits = answer_logits(teacher, prompts, answers, pad_id)
    return logits, sketch.of(streams, [[*prompt, *answer] for prompt, answer in texts])


def save_rows(rows: Sequence[TeacherRow], path: Path, sketch: Sketch | None = None) -> None:
    """Write an anchor's rows, and what their streams leave out, whole or not at all."""
    lengths = [[len(row.prompt), len(row.answer)] for row in rows]
    tensors = {
        "prompts": torch.tensor([token for row in rows for token in row.prompt], dtype=torch.int32),
        "answers": torch.tensor([token for row in rows for token in row.answer], dtype=torch.int32),
        "top_ids": torch.cat([row.top_ids for row in rows]).to(torch.int32),
        "top_logps": torch.cat([row.top_logps for row in rows]),
    }
    streams = [row.streams for row in rows if row.streams is not None]
    if sketch is not None:
        tensors |= {"streams": torch.cat(streams), "removed": sketch.removed}
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.whole(path) as beside:
        save_file(tensors, beside, metadata={"healing": json.dumps({"lengths": lengths})})


def load_rows(path: Path) -> list[TeacherRow]:
    """Read what `save_rows` wrote."""
    with safe_open(path, framework="pt") as file:
        lengths = json.loads(file.metadata()["healing"])["lengths"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    num_prompt, num_answer = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    parts = [
        tensors["prompts"].split(num_prompt),
        tensors["answers"].split(num_answer),
        tensors["top_ids"].long().split(num_answer),
        tensors["top_logps"].split(num_answer),
    ]
    streams: Sequence[Tensor | None] = [None] * len(lengths)
    if "streams" in tensors:
        streams = tensors["streams"].split([sum(pair) for pair in lengths])
    return [
        TeacherRow(prompt.tolist(), answer.tolist(), top_ids, top_logps, stream)
        for prompt, answer, top_ids, top_logps, stream in zip(*parts, streams, strict=True)
    ]


def load_removed(path: Path) -> Tensor:
    """The vectors [k, d_model] that the streams of a file leave out."""
    with safe_open(path, framework="pt") as file:
        removed: Tensor = file.get_tensor("removed")
    return removed


class AnchorBatches:
    """An endless, seeded stream of batches; batch number n is the same however training got there."""

    def __init__(self, rows: Sequence[TeacherRow], batch_size: int, seed: int) -> None:
        """Shuffle anew for every pass over the rows."""
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._passes: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[TeacherRow]:
        """The rows of an optimizer step, over all processes and accumulation steps."""
        first = step * self.batch_size
        return [self.rows[self._index(place)] for place in range(first, first + self.batch_size)]

    def _index(self, place: int) -> int:
        number, offset = divmod(place, len(self.rows))
        if number not in self._passes:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed} {number}").shuffle(order)  # no secret
            self._passes = {
                number: order,
                **{k: v for k, v in self._passes.items() if k == number - 1},
            }
        return self._passes[number][offset]


def anchored_divergence(student_logits: Tensor, top_ids: Tensor, top_logps: Tensor) -> Tensor:
    """KL(teacher || student) per token, over the teacher's top k tokens and one bucket for all others.

    Merging outcomes can only lower a KL divergence, so this is a lower bound, and exact when k is the vocabulary.

    Args:
        student_logits: [tokens, vocab].
        top_ids: [tokens, k].
        top_logps: [tokens, k].

    Returns:
        [tokens] in float32, nats.
    """
    logps = torch.log_softmax(student_logits.float(), dim=-1).gather(-1, top_ids)
    teacher = top_logps.exp()
    inside = (teacher * (top_logps - logps)).sum(dim=-1)
    if top_ids.shape[-1] == student_logits.shape[-1]:
        return inside
    tiny = torch.finfo(torch.float32).tiny
    rest_teacher = (1 - teacher.sum(dim=-1)).clamp_min(0)
    rest_student = (1 - logps.exp().sum(dim=-1)).clamp_min(1e-7)
    rest = rest_teacher * (rest_teacher.clamp_min(tiny).log() - rest_student.log())
    return inside + rest


def anchor_loss(
    model: nn.Module, rows: Sequence[TeacherRow], pad_id: int, device: torch.device
) -> Tensor:
    """The summed divergence of a model from the teacher on some rows.

    Args:
        model: the student; wrapped models are called through their wrapper, which FSDP needs.
        rows: at least one.
        pad_id: id to pad with.
        device: where the student is.

    Returns:
        A scalar: the sum over all answer tokens, in nats.
    """
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    scored = trainable_answer_logits(model, prompts, answers, pad_id, device)
    top_ids = torch.cat([row.top_ids for row in rows]).to(device)
    top_logps = torch.cat([row.top_logps for row in rows]).to(device)
    return anchored_divergence(scored, top_ids, top_logps).sum()


def anchor_and_stream_loss(
    model: nn.Module,
    inner: nn.Module,
    rows: Sequence[TeacherRow],
    pad_id: int,
    device: torch.device,
    sketch: Sketch,
) -> tuple[Tensor, Tensor]:
    """As `anchor_loss`, and how far the residual stream is from the teacher's, in the same forward pass.

    Args:
        model: the student; wrapped models are called through their wrapper.
        inner: the student itself, whose blocks are read.
        rows: at least one, with streams.
        pad_id: id to pad with.
        device: where the student is.
        sketch: how the rows' streams were kept.

    Returns:
        Two scalars: the divergence's sum over all answer tokens, and the distance's over all tokens.
    """
    with residual.reading(inner, gradients=True) as streams:
        divergence = anchor_loss(model, rows, pad_id, device)
    kept = torch.cat(sketch.of(streams, [row.tokens for row in rows]))
    taught = torch.cat([row.streams for row in rows if row.streams is not None])
    return divergence, distance(kept, taught.to(kept.device)).sum()
