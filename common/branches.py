"""One prompt, several continuations, one row: their exact logits in one forward pass, the prompt read once.

The openings of a refusal score, the answers of a preference pair and the options of a multiple-choice item are
branches of one prompt. A row holds `[prompt minus its last token | last token + continuation 1 | last token +
continuation 2 | ...]`: positions restart at every branch, and a 4-D mask lets a branch see the prompt and itself.
The last token of a continuation is left out, since nobody reads what follows it.

What many prompts begin with can be read once for all of them (`read_prefix`): rows then hold what comes behind it.

Where a model cannot take such masks every continuation is a row of its own, with the same results.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from common import distributed
from common.architecture import ARCHITECTURES

logger = logging.getLogger(__name__)

Plan = Literal["packed", "plain"]
Masks = Tensor | dict[str, Tensor]

PADDING, PROMPT = -1, 0  # in `Packed.branch_ids`; the branches themselves count from 1
UNREAD = -1  # in `Packed.targets`

# How far packed rows may be from plain ones at the check, as a fraction of how far a mask that shows a branch its
# siblings puts them. Rounding, in bfloat16 and 24 blocks, is about a hundredth.
TOLERANCE = 0.1
# The check reads a row that is longer than the sliding window; beyond this length it would cost too much.
LONGEST_CHECK = 8192


@dataclass(frozen=True)
class Branches:
    """A prompt and what may follow it, as token ids.

    Attributes:
        prompt: at least one token.
        continuations: at least one, each of at least one token.

    Raises:
        ValueError: if anything is empty: then there is nothing to predict, or nothing to predict it from.
    """

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        """Refuse what has no prediction."""
        if not self.prompt or not self.continuations or not all(map(len, self.continuations)):
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens with continuations of "
                f"{[len(continuation) for continuation in self.continuations]} tokens: all must hold at least one"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row: what `divergence.batches` can sort by."""
        return len(self.prompt) - 1 + sum(map(len, self.continuations))

    def apart(self) -> list["Branches"]:
        """Every continuation as a row of its own, which is an ordinary causal row."""
        return [Branches(self.prompt, [continuation]) for continuation in self.continuations]


@dataclass(frozen=True)
class Packed:
    """Rows of branches as tensors, all [rows, length], padded behind: no causal layer sees that far.

    Attributes:
        input_ids: token ids.
        position_ids: the place of each token in its prompt + continuation; 0 for padding.
        branch_ids: the branch of each token: 0 for the prompt, from 1 for branches, -1 for padding.
        targets: the token id that is predicted at each place, or -1 where no prediction is read.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch_ids: Tensor
    targets: Tensor

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every prediction: row by row, continuation by continuation."""
        rows, columns = (self.targets != UNREAD).nonzero(as_tuple=True)
        return rows, columns

    def mask(self, window: int | None = None) -> Tensor:
        """What each token sees: the prompt and its own branch, up to itself.

        Padding sees something too: a row of a mask without any True gives NaN, which would spread.

        Args:
            window: tokens that a sliding window holds, counted by position: by column a branch would lose sight
                of the prompt behind its siblings.

        Returns:
            Booleans [rows, 1, length, length]: query, key.
        """
        query, key = self.branch_ids.unsqueeze(2), self.branch_ids.unsqueeze(1)
        column = torch.arange(self.branch_ids.shape[1], device=self.branch_ids.device)
        seen = ((key == query) | (key == PROMPT)) & (column <= column.unsqueeze(1))
        if window is not None:
            seen &= self.position_ids.unsqueeze(2) - self.position_ids.unsqueeze(1) < window
        return seen.unsqueeze(1)


@dataclass(frozen=True)
class Prefix:
    """What many prompts begin with, read by one model.

    Attributes:
        ids: its tokens.
        states: keys and values of each layer, [1, heads, tokens, head size], of all tokens in every layer.
    """

    ids: tuple[int, ...]
    states: tuple[tuple[Tensor, Tensor], ...]

    def cache(self, num_rows: int) -> DynamicCache:
        """The states in front of every row of a batch; the copy is the batch's own."""
        return DynamicCache(
            [
                (keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1))
                for keys, values in self.states
            ]
        )


def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Prefix | None:
    """Read what many prompts begin with.

    Args:
        model: a causal language model.
        ids: at least one token.

    Returns:
        What `continuation_logits` takes; None if the model's rows must hold the whole prompt.
    """
    known = _prefixes.setdefault(model, {})
    implementation = str(_text_config(model)._attn_implementation)
    if implementation not in known:
        known[implementation] = plan(model) == "packed" and _continues_prefixes(model)
    return _read(model, ids) if known[implementation] else None


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    # Without a configuration every layer keeps every token: a window is the mask's business, here as elsewhere.
    cache = DynamicCache()
    # The row of a prompt and one continuation is the prompt itself.
    packed = pack([Branches(ids, [[0]])], 0, model.device)
    with _unembedding_only(model, packed.places):
        model(
            input_ids=packed.input_ids,
            attention_mask=attention_masks(model, packed),
            position_ids=packed.position_ids,
            past_key_values=cache,
            use_cache=True,
        )
    layers: Any = cache.layers  # a class of its own for every kind
    return Prefix(tuple(ids), tuple((layer.keys, layer.values) for layer in layers))


def _continues_prefixes(model: PreTrainedModel) -> bool:
    """Whether rows behind a prefix have the log-probabilities that they have when they hold it."""
    beginning, *rows = _rows_to_check(_text_config(model), 3)
    whole = [Branches([*beginning.prompt, *row.prompt], row.continuations) for row in rows]
    with torch.no_grad(), _in_evaluation(model):
        prefix = _read(model, beginning.prompt)
        expected = _logps(model, *_inputs(model, whole, 0, "packed"))
        found = _logps(model, *_inputs(model, rows, 0, "packed", prefix), prefix)
        wrong = _logps(model, *_inputs(model, rows, 0, "packed"))
    difference, yardstick = (float((logps - expected).abs().mean()) for logps in (found, wrong))
    return difference <= TOLERANCE * yardstick  # not so for NaN


def pack(rows: Sequence[Branches], pad_id: int, device: torch.device) -> Packed:
    """Lay rows of branches out as tensors."""
    laid_out = [_lay_out(row) for row in rows]

    def stack(part: int, fill: int) -> Tensor:
        lists = [torch.tensor(row[part]) for row in laid_out]
        return pad_sequence(lists, batch_first=True, padding_value=fill).to(device)

    return Packed(stack(0, pad_id), stack(1, 0), stack(2, PADDING), stack(3, UNREAD))


def _lay_out(row: Branches) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids, positions, branches and targets of one row."""
    *prefix, last = row.prompt
    shared = len(prefix)
    ids, positions = prefix, list(range(shared))
    branches, targets = [PROMPT] * shared, [UNREAD] * shared
    for branch, continuation in enumerate(row.continuations, start=1):
        length = len(continuation)
        ids += [last, *continuation[:-1]]
        positions += range(shared, shared + length)
        branches += [branch] * length
        targets += continuation
    return ids, positions, branches, targets


def continuation_logits(
    model: PreTrainedModel, rows: Sequence[Branches], pad_id: int, prefix: Prefix | None = None
) -> list[list[Tensor]]:
    """The logits that predict each token of each continuation, in one forward pass.

    Gradients flow. The rows enter the batch in their order, so hooks that give equal parts of a batch to several
    trials (`hooks.applied_in_trials`) may be on the model if the parts hold equally many continuations.

    Args:
        model: a causal language model.
        rows: at least one.
        pad_id: id to pad with.
        prefix: what stands in front of every prompt, from `read_prefix` of the same model; no gradient flows into it.

    Returns:
        For each row one tensor [continuation length, vocab] per continuation, in the model's dtype.
    """
    inputs = _inputs(model, rows, pad_id, plan(model, len(rows)), prefix)
    return _by_continuation(_logits(model, *inputs, prefix), rows)


def continuation_logps(
    model: PreTrainedModel, rows: Sequence[Branches], pad_id: int
) -> list[list[Tensor]]:
    """The log-probability of each token of each continuation, in one forward pass.

    As `continuation_logits`, but for each row one tensor [continuation length] per continuation, in nats and in
    float32 or wider.
    """
    inputs = _inputs(model, rows, pad_id, plan(model, len(rows)))
    return _by_continuation(_logps(model, *inputs), rows)


def _by_continuation(flat: Tensor, rows: Sequence[Branches]) -> list[list[Tensor]]:
    """Split what stands in one tensor [predictions, ...]."""
    lengths = [len(continuation) for row in rows for continuation in row.continuations]
    parts = iter(flat.split(lengths))
    return [[next(parts) for _ in row.continuations] for row in rows]


def _inputs(
    model: PreTrainedModel,
    rows: Sequence[Branches],
    pad_id: int,
    how: Plan,
    prefix: Prefix | None = None,
) -> tuple[Packed, Masks]:
    """What the model reads: rows of branches, or every continuation in a row of its own."""
    if how == "packed":
        packed = pack(rows, pad_id, model.device)
        if prefix is None:
            return packed, attention_masks(model, packed)
        packed = replace(packed, position_ids=packed.position_ids + len(prefix.ids))
        return packed, attention_masks(model, packed, len(prefix.ids))
    packed = pack([single for row in rows for single in row.apart()], pad_id, model.device)
    # No word on padding: it stands behind the rows, and causal layers of any kind never look ahead.
    return packed, torch.ones_like(packed.input_ids)


def _logits(
    model: PreTrainedModel, packed: Packed, masks: Masks, prefix: Prefix | None = None
) -> Tensor:
    """Logits [predictions, vocab]."""
    before = {} if prefix is None else {"past_key_values": prefix.cache(len(packed.input_ids))}
    with _unembedding_only(model, packed.places):
        logits: Tensor = model(
            input_ids=packed.input_ids,
            attention_mask=masks,
            position_ids=packed.position_ids,
            use_cache=False,
            **before,
        ).logits
    return logits


def _logps(
    model: PreTrainedModel, packed: Packed, masks: Masks, prefix: Prefix | None = None
) -> Tensor:
    """Log-probabilities [predictions] of the targets."""
    logits = _logits(model, packed, masks, prefix)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = packed.targets[packed.places].to(wide.device).unsqueeze(-1)
    return wide.gather(-1, targets).squeeze(-1) - wide.logsumexp(dim=-1)


def attention_masks(model: PreTrainedModel, packed: Packed, num_before: int = 0) -> Masks:
    """The masks of packed rows in the form that a model takes: one, or one per type of layer.

    Args:
        model: that will read the rows.
        packed: the rows, their positions counted from the beginning of the prefix.
        num_before: tokens of the prefix, whose states stand in front of every row's.
    """
    config = _text_config(model)

    def taken(window: int | None) -> Tensor:
        seen = packed.mask(window)
        if num_before:
            seen = torch.cat([_sees_prefix(packed, num_before, window), seen], dim=-1)
        if config._attn_implementation == "sdpa":
            return seen
        # Eager attention adds the mask to the scores: a boolean one would add 0 and 1, and hide nothing.
        hidden = torch.finfo(model.dtype).min
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, hidden)

    if "sliding_attention" in _layer_types(config):
        return {"full_attention": taken(None), "sliding_attention": taken(config.sliding_window)}
    return taken(_window(config))


def _sees_prefix(packed: Packed, num_before: int, window: int | None) -> Tensor:
    """Which tokens of the prefix each token sees: booleans [rows, 1, length, prefix]."""
    position = packed.position_ids.unsqueeze(-1)
    distance = position - torch.arange(num_before, device=position.device)
    return (distance < (window or torch.inf)).unsqueeze(1)


@contextmanager
def _unembedding_only(model: PreTrainedModel, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let the unembedding read the stream at some places only, as [places, d_model].

    What a family does to its logits afterwards (capping, scaling) stays the model's own. `logits_to_keep` would do
    for a model on one device; spread over several, accelerate puts it on the first and the stream ends on the last.
    """

    def gather(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        rows, columns = (place.to(args[0].device) for place in places)
        return (args[0][rows, columns],)

    unembedding: nn.Module = model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


# By model and attention implementation: how rows are laid out, and whether they can continue a prefix.
_decided: WeakKeyDictionary[nn.Module, dict[str, Plan]] = WeakKeyDictionary()
_prefixes: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def plan(model: PreTrainedModel, num_rows: int = 2) -> Plan:
    """Whether a model computes packed rows exactly; decided once per model and attention implementation.

    Packed rows are compared with plain ones, one of them longer than the sliding window. Call it at the start:
    `continuation_logits` would otherwise do so at its first batch, as large as that batch.

    Args:
        model: a causal language model.
        num_rows: rows of the check's batch: what hooks can split that are on the model by now.

    Returns:
        "packed", or "plain" with one log line that says why.
    """
    known = _decided.setdefault(model, {})
    implementation = str(_text_config(model)._attn_implementation)
    if implementation not in known:
        reason = _known_obstacle(model) or _measured_obstacle(model, num_rows)
        known[implementation] = "packed" if reason is None else "plain"
        if reason is not None and distributed.is_main():
            logger.info("branches: every continuation is a row of its own, since %s", reason)
    return known[implementation]


def decide(model: PreTrainedModel, found: Plan) -> None:
    """Take what `plan` has found for the same model elsewhere, where this one can compute nothing quickly or whole."""
    _decided.setdefault(model, {})[str(_text_config(model)._attn_implementation)] = found


def _known_obstacle(model: PreTrainedModel) -> str | None:
    """Why packed rows are not even tried."""
    config = _text_config(model)
    others = _layer_types(config) - {"full_attention", "sliding_attention"}
    window = _window(config)
    if model.config.model_type not in ARCHITECTURES:
        return (
            f"the architecture {model.config.model_type!r} is not known to take masks of any shape"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"the attention {config._attn_implementation!r} takes no masks; sdpa and eager do"
    if others:
        return f"the model has layers of type {', '.join(sorted(others))}"
    if window is not None and window > LONGEST_CHECK:
        return f"a sliding window of {window} tokens is too long to check"
    return None


def _measured_obstacle(model: PreTrainedModel, num_rows: int) -> str | None:
    """How far packed rows are from plain ones, where that is too far."""
    rows = _rows_to_check(_text_config(model), num_rows)
    with torch.no_grad(), _in_evaluation(model):
        plain = _logps(model, *_inputs(model, rows, 0, "plain"))
        packed, masks = _inputs(model, rows, 0, "packed")
        merged = replace(packed, branch_ids=packed.branch_ids.clamp_max(PROMPT + 1))
        found, wrong = (_logps(model, packed, m) for m in (masks, attention_masks(model, merged)))
    difference, yardstick = (float((logps - plain).abs().mean()) for logps in (found, wrong))
    if difference <= TOLERANCE * yardstick:  # not so for NaN
        return None
    return (
        f"packed rows differ from plain ones by {difference:.2g} nats per token, which is no rounding: branches "
        f"that see each other differ by {yardstick:.2g}"
    )


def _rows_to_check(config: Any, num_rows: int) -> list[Branches]:  # noqa: ANN401  # each family has a class of its own
    """Rows of unequal lengths, the first longer than the sliding window; all have two continuations."""
    stream = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        # Ids far up are often no text but marks, of images for one.
        high = min(config.vocab_size, 1000)
        ids: list[int] = torch.randint(high, (length,), generator=stream).tolist()
        return ids

    beyond = (_window(config) or 0) + 24
    return [
        Branches(draw(beyond if row == 0 else 5), [draw(9), draw(1 + 3 * (row == 0))])
        for row in range(num_rows)
    ]


def _text_config(model: PreTrainedModel) -> Any:  # noqa: ANN401  # each family has a class of its own
    return model.config.get_text_config()


def _layer_types(config: Any) -> set[str]:  # noqa: ANN401  # each family has a class of its own
    return set(getattr(config, "layer_types", None) or ())


def _window(config: Any) -> int | None:  # noqa: ANN401  # each family has a class of its own
    """The sliding window of some or all layers, where there is one that a row can outgrow."""
    window: int | None = getattr(config, "sliding_window", None)
    types = _layer_types(config)
    if not window or (types and "sliding_attention" not in types):
        return None
    return window if window < config.max_position_embeddings else None


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout while the context lasts, which would tell any two passes apart."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
