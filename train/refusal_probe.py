"""Refusals found by the model's own direction: where the answer's first tokens stand along what stage one removed.

The original model reads a prompt and an answer. At the answer's tokens a refusal stands out along the direction
that makes it refuse, in whatever language and words it learnt to refuse in. The limit is calibrated on the answers that
the model itself gave in stage one. (At the prompt's tokens harmful prompts stand out too, however they are answered.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, chat, distributed, residual
from common.divergence import batches
from common.edits import Edit, load_edit
from common.errors import StageError
from train.preferences.filters import Judge, Turns, messages

# How many of an answer's tokens are read: a refusal says so at once.
FIRST_TOKENS = 8
# Answers of each kind below which no limit is found, and the balanced accuracy on them below which it means nothing.
MIN_ANSWERS = 8
MIN_ACCURACY = 0.9

Answered = tuple[Turns, str]


@dataclass(frozen=True)
class Limit:
    """Above which projection an answer counts as a refusal, and how well that tells stage one's answers apart.

    Attributes:
        threshold: in units of the residual stream.
        balanced_accuracy: mean of the share of refusals found and the share of other answers left alone.
        num_refused: refusals it was found on.
        num_answered: other answers it was found on.
    """

    threshold: float
    balanced_accuracy: float
    num_refused: int
    num_answered: int

    def as_data(self) -> dict[str, float]:
        """For summaries."""
        return asdict(self)


def calibrate(scores: Tensor, refused: Tensor) -> tuple[float, float]:
    """The limit that best separates refusals (above) from other answers (below).

    Args:
        scores: [answers].
        refused: booleans [answers], both kinds among them.

    Returns:
        The middle of the gap between two neighbouring scores with the highest balanced accuracy (of several, the
        widest), and that accuracy. Where all scores are equal: that score, and 0.5.
    """
    values, order = scores.double().sort()
    above = refused[order].double()
    # Cut behind each score but the last: refusals above it, other answers up to it.
    found = 1 - above.cumsum(0) / above.sum()
    left_alone = (1 - above).cumsum(0) / (1 - above).sum()
    gaps = values[1:] - values[:-1]
    accuracy = ((found + left_alone) / 2)[:-1].masked_fill(gaps == 0, 0.0)
    if not len(gaps) or not gaps.any():
        return float(values[0]), 0.5
    best = gaps.masked_fill(accuracy < accuracy.max(), -1.0).argmax()
    return float((values[best] + values[best + 1]) / 2), float(accuracy[best])


def find_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, batch_size: int
) -> Limit:
    """Calibrate on the original's own answers of stage one.

    Args:
        model: the original.
        tokenizer: its tokenizer.
        folder: of stage one, with `edit.safetensors` and `baseline.jsonl`.
        batch_size: answers per forward pass.

    Raises:
        StageError: if there are too few of either kind, or they cannot be told apart.
    """
    rows = [row for row in artifacts.read_jsonl(folder / "baseline.jsonl") if row["answer"].strip()]
    refused = torch.tensor([bool(row["refused"]) for row in rows], dtype=torch.bool)
    num_refused, num_answered = int(refused.sum()), int((~refused).sum())
    if min(num_refused, num_answered) < MIN_ANSWERS:
        raise StageError(
            f"train.filters.direction: stage 1 holds {num_refused} refusals and {num_answered} other answers of the "
            f"original model, but a limit needs {MIN_ANSWERS} of each; give stage 1 more prompts, or set it to false"
        )
    answered = [((("user", row["prompt"]),), row["answer"]) for row in rows]
    scores = project(model, tokenizer, load_edit(folder / "edit.safetensors"), answered, batch_size)
    threshold, accuracy = calibrate(torch.tensor(scores), refused)
    if accuracy < MIN_ACCURACY:
        raise StageError(
            f"train.filters.direction: along the removed direction the original's {num_refused} refusals and "
            f"{num_answered} other answers of stage 1 overlap (balanced accuracy {accuracy:.2f} at the best limit, "
            f"{MIN_ACCURACY:g} is needed), so it cannot tell them apart; set it to false"
        )
    return Limit(threshold, accuracy, num_refused, num_answered)


def project(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    answered: Sequence[Answered],
    batch_size: int,
) -> list[float]:
    """How far answers stand along the direction, at the layer where it was found: the mean over their first tokens.

    Args:
        model: the original.
        tokenizer: its tokenizer.
        edit: the direction, and in `about` the layer whose input it was found at.
        answered: prompts with answers, none of them empty; the processes of the launch share them.
        batch_size: answers per forward pass.

    Returns:
        One number per answer, in units of the residual stream, on every process.
    """
    prompts = [
        tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True)
        for turns, _ in answered
    ]
    rows = [
        (_ids(tokenizer, str(prompt)), _ids(tokenizer, answer)[:FIRST_TOKENS])
        for prompt, (_, answer) in zip(prompts, answered, strict=True)
    ]

    def work(part: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        scores: dict[int, float] = {}
        for batch in _equal_answers(part, batch_size):
            for index, score in zip(
                batch, _project(model, tokenizer, edit, [part[i] for i in batch]), strict=True
            ):
                scores[index] = score
        return [scores[index] for index in range(len(part))]

    return distributed.share(rows, work)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _equal_answers(
    rows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> Iterator[list[int]]:
    """Batches of answers with equally many tokens, so that all of them end a row and nothing else is read."""
    for length in sorted({len(answer) for _, answer in rows}):
        places = [place for place, (_, answer) in enumerate(rows) if len(answer) == length]
        for batch in batches([len(rows[place][0]) for place in places], batch_size):
            yield [places[index] for index in batch]


@torch.inference_mode()
def _project(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    rows: Sequence[tuple[list[int], list[int]]],
) -> list[float]:
    ids, mask = chat.pad_left(
        [prompt + answer for prompt, answer in rows], int(tokenizer.pad_token_id), model.device
    )
    streams = residual.read(model, ids, mask, len(rows[0][1]))  # [rows, layers, tokens, d_model]
    layer = float(edit.about["layer"])
    below, share = math.floor(layer), layer - math.floor(layer)
    stream = streams[:, below].double()
    if share:  # a direction mixed from two layers stands in the stream mixed from them
        stream = (1 - share) * stream + share * streams[:, below + 1].double()
    along: Tensor = (stream @ edit.direction.to(stream.device)).mean(dim=-1)
    return [float(value) for value in along.cpu()]


def judge(scores: Mapping[Answered, float], limit: Limit) -> Judge:
    """Who calls an answer a refusal by its projection."""
    return Judge(
        "chosen refuses by the direction",
        lambda prompt, answer: scores[prompt, answer] > limit.threshold,
    )
