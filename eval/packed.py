"""The packed scorer: all options behind a context in one row, and what many contexts begin with read once.

Requests are gathered into rows (`common/branches`), rows into batches. A batch is planned from the requests alone,
never from what is known already, so that a model is asked in the same batches whenever it is asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.branches import Branches, Plan, Prefix, continuation_logits, plan, read_prefix

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]  # a context and an option
Scored = tuple[float, bool]

# Tokens of options that a row may always hold. Beyond, it holds up to some multiple of its context: attention within a
# row is quadratic, and sharing a short context saves little.
ROOM, ROOM_PER_CONTEXT = 256, 4
# Predictions that a batch may hold, by its size in rows: they are what takes memory over a large vocabulary.
PREDICTIONS_PER_ROW = 64
# A shorter beginning costs more to be put in front of every row than to be read again; so do few rows.
MIN_PREFIX, MIN_SAVING = 16, 1024


@dataclass
class Row:
    """A context and options behind it.

    Attributes:
        context: at least one token.
        stems: the options that the model reads; others differ from one of them by their last token alone, which
            nobody reads.
        asked: every option, its stem's index and the numbers of the requests that ask for it.
    """

    context: Ids
    stems: list[Ids] = field(default_factory=list)
    asked: list[tuple[Ids, int, list[int]]] = field(default_factory=list)

    @property
    def num_predictions(self) -> int:
        """Tokens of the stems."""
        return sum(map(len, self.stems))

    @property
    def num_tokens(self) -> int:
        """Tokens that are read without a prefix."""
        return len(self.context) - 1 + self.num_predictions


@dataclass(frozen=True)
class Batch:
    """Rows that are read in one pass.

    Attributes:
        prefix: what all their contexts begin with, if it is read apart.
        rows: at least one.
    """

    prefix: Ids
    rows: list[Row]

    @property
    def numbers(self) -> list[int]:
        """The requests that it answers, in the order of its results."""
        return [n for row in self.rows for _, _, numbers in row.asked for n in numbers]


class PackedScorer:
    """Scores batches with one model; keeps the prefix that it read last."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        """Decide how this model takes rows.

        Args:
            model: a causal language model.
            pad_id: id to pad with.
        """
        self.model, self.pad_id = model, pad_id
        self.plan: Plan = plan(model)
        self._prefix: Prefix | None = None

    def batches(self, pairs: Sequence[Pair], batch_size: int) -> list[Batch]:
        """Gather requests into batches.

        Args:
            pairs: context and option of each request, none of them empty.
            batch_size: rows of a batch.
        """
        return batches(pairs, batch_size, self.plan)

    @torch.inference_mode()
    def score(self, batch: Batch) -> list[Scored]:
        """The log-probability in nats of each option that is asked for, and whether greedy decoding would give it."""
        prefix = self._read(batch.prefix)
        before = 0 if prefix is None else len(prefix.ids)
        rows = [Branches(row.context[before:], row.stems) for row in batch.rows]
        by_row = continuation_logits(self.model, rows, self.pad_id, prefix)
        sums, greedy, repeats = [], [], []
        for row, parts in zip(batch.rows, by_row, strict=True):
            stems = [_Stem(logits) for logits in parts]
            for option, stem, numbers in row.asked:
                tokens = torch.tensor(option, device=stems[stem].best.device)
                sums.append(stems[stem].logp(tokens))
                greedy.append((stems[stem].best == tokens).all())
                repeats.append(len(numbers))
        # One transfer for the whole batch: each would wait for the device.
        found = zip(torch.stack(sums).tolist(), torch.stack(greedy).tolist(), repeats, strict=True)
        return [(logp, is_greedy) for logp, is_greedy, count in found for _ in range(count)]

    def _read(self, ids: Ids) -> Prefix | None:
        if not ids:
            return None
        if self._prefix is None or self._prefix.ids != ids:
            self._prefix = read_prefix(self.model, ids)
        return self._prefix


class _Stem:
    """The logits [length, vocab] behind which options are read off."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.normalizer = self.logits.logsumexp(dim=-1)
        self.best = logits.argmax(dim=-1)

    def logp(self, tokens: Tensor) -> Tensor:
        chosen = self.logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return (chosen - self.normalizer).to(torch.float64).sum()


def batches(pairs: Sequence[Pair], batch_size: int, how: Plan) -> list[Batch]:
    """Gather requests into batches; see `PackedScorer.batches`."""
    gathered = list(_rows(pairs, how))
    if how == "plain":
        return list(_cut((), gathered, batch_size))
    return [
        batch
        for prefix, rows in _behind_prefixes(gathered)
        for batch in _cut(prefix, rows, batch_size)
    ]


def _rows(pairs: Sequence[Pair], how: Plan) -> Iterator[Row]:
    """A row or several for each context; where masks cannot hold options apart, a row for each stem."""
    by_context: dict[Ids, dict[Ids, list[int]]] = {}
    for number, (context, option) in enumerate(pairs):
        by_context.setdefault(context, {}).setdefault(option, []).append(number)
    for context, options in by_context.items():
        room = max(ROOM, ROOM_PER_CONTEXT * len(context)) if how == "packed" else 0
        rows: list[Row] = []
        read: dict[Ids, tuple[Row, int]] = {}
        for option, numbers in options.items():
            if option[:-1] not in read:
                if not rows or rows[-1].num_predictions + len(option) > room:
                    rows.append(Row(context))
                read[option[:-1]] = rows[-1], len(rows[-1].stems)
                rows[-1].stems.append(option)
            row, stem = read[option[:-1]]
            row.asked.append((option, stem, numbers))
        yield from rows


def _behind_prefixes(rows: Sequence[Row]) -> Iterator[tuple[Ids, list[Row]]]:
    """The rows by the prefix that they are read behind; those that go without one last, together."""
    ordered = sorted(rows, key=lambda row: row.context)
    shared = [_common(one.context, other.context) for one, other in pairwise(ordered)]
    alone: list[Row] = []
    for length, run in _runs(ordered, shared):
        if length:
            yield run[0].context[:length], run
        else:
            alone += run
    if alone:
        # What is left may still begin alike: sorted, its first and last differ earliest.
        length = _common(alone[0].context, alone[-1].context)
        yield alone[0].context[: length if _saving(length, len(alone)) else 0], alone


def _runs(rows: list[Row], shared: list[int]) -> list[tuple[int, list[Row]]]:
    """Rows in order of their contexts, in runs that save the most tokens, each with the length of its prefix.

    A run is read behind what all of it shares, or falls into parts that share more.

    Args:
        rows: in order.
        shared: tokens that each row shares with the next.
    """
    if not shared:
        return [(0, rows)]
    least = min(shared)
    cuts = [0, *(place + 1 for place, length in enumerate(shared) if length == least), len(rows)]
    parts = [
        run
        for first, end in pairwise(cuts)
        for run in _runs(rows[first:end], shared[first : end - 1])
    ]
    apart = sum(_saving(length, len(run)) for length, run in parts)
    together = _saving(least, len(rows))
    return [(least, rows)] if together and together >= apart else parts


def _saving(length: int, num_rows: int) -> int:
    """Tokens that need not be read where rows share a prefix; 0 where it is not worth while."""
    saved = length * (num_rows - 1)
    return saved if length >= MIN_PREFIX and saved >= MIN_SAVING else 0


def _common(one: Ids, other: Ids) -> int:
    """Tokens that two contexts begin with alike; at least one of each is left over, to predict from."""
    length = min(len(one), len(other)) - 1
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])


def _cut(prefix: Ids, rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    """Rows of similar length in batches, shortest first."""
    group: list[Row] = []
    predictions = 0
    for row in sorted(rows, key=lambda row: (row.num_tokens, row.context, row.stems)):
        predictions += row.num_predictions
        if group and (len(group) == batch_size or predictions > PREDICTIONS_PER_ROW * batch_size):
            yield Batch(prefix, group)
            group, predictions = [], row.num_predictions
        group.append(row)
    if group:
        yield Batch(prefix, group)
