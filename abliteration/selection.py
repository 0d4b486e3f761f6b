"""Which candidate direction is removed: refusal_direction's scores, its filters and thresholds.

Three scores per candidate, none of which needs generation: **bypass**, the mean refusal score on harmful
prompts while the candidate is removed; **induce**, the same on harmless prompts while it is added; **kl**, how
far removing it moves the next token on harmless prompts. Source: Arditi et al. 2024, arXiv:2406.11717,
appendix C.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration.baseline import refusal_scores
from abliteration.findings import Findings
from abliteration.placement import Direction
from abliteration.prompt_sets import PromptSet
from common import chat, distributed, residual
from common.divergence import batches, kl_divergence
from common.edits import Edit
from common.errors import StageError
from common.hooks import applied_by_hooks
from common.recipe import ScoresSelection, SearchSelection

# A direction of false refusal may cost at most a tenth of the true refusals.
MIN_RETAINED = 0.9

MakeEdit = Callable[[Direction], Edit]
Thresholds = ScoresSelection | SearchSelection


@dataclass(frozen=True)
class Candidate:
    """A direction with its scores.

    Attributes:
        layer: the block whose input it was measured at.
        position: counted from the end of the prompt, -1 the last token.
        norm: length of the difference in means.
        bypass: mean refusal score on harmful prompts while it is removed; None if not scored.
        induce: mean refusal score on harmless prompts while it is added.
        kl: mean next-token KL(original || edited) on harmless prompts, nats.
        retain: share of the prompts whose refusal is to stay that are still refused (their refusal score is above
            0) while it is removed; None if there are none.
        dropped: why it cannot be chosen, or None.
    """

    layer: float
    position: int
    norm: float
    bypass: float | None = None
    induce: float | None = None
    kl: float | None = None
    retain: float | None = None
    dropped: str | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def next_token_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
) -> Tensor:
    """The logits [prompts, vocab] behind each prompt in float32, shared by the processes."""
    return _behind_prompts(model, tokenizer, prompts, batch_size, lambda logits: logits)


def next_token_refusal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    tokens: Sequence[int],
) -> Tensor:
    """The refusal score [prompts] behind each prompt; no vocabulary is kept, however many prompts there are."""

    def score(logits: Tensor) -> Tensor:
        return refusal_scores(logits, tokens)

    return _behind_prompts(model, tokenizer, prompts, batch_size, score)


@torch.inference_mode()
def _behind_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """What becomes [batch, ...] of the logits [batch, vocab] behind prompts, for all of them [prompts, ...]."""
    encoded = chat.encode(tokenizer, prompts)

    def work(part: Sequence[list[int]]) -> list[Tensor]:
        rows: list[Tensor] = [torch.empty(0)] * len(part)
        for batch in batches([len(ids) for ids in part], batch_size):
            pad_id = int(tokenizer.pad_token_id)
            ids, mask = chat.pad_left([part[index] for index in batch], pad_id, model.device)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=chat.positions(mask),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            for index, row in zip(batch, reduce(logits.float().cpu()), strict=True):
                rows[index] = row
        return rows

    return torch.stack(distributed.share(encoded, work))


def score_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    findings: Findings,
    validation: PromptSet,
    tokens: Sequence[int],
    make_edit: MakeEdit,
    settings: Thresholds,
    batch_size: int,
) -> list[Candidate]:
    """Score every candidate that could be chosen.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer.
        findings: the candidate directions.
        validation: held-out prompts.
        tokens: the refusal tokens.
        make_edit: the recipe's edit for a direction.
        settings: filters and thresholds.
        batch_size: prompts per forward pass.

    Returns:
        One candidate per layer and position, with the reason where it was dropped.
    """
    num_layers, num_positions = findings.directions.shape[:2]
    base = next_token_logits(model, tokenizer, validation.harmless, batch_size)
    parts = [validation.target, validation.harmless, validation.kept]
    candidates = []
    places = [(layer, index) for layer in range(num_layers) for index in range(num_positions)]
    for layer, index in tqdm(
        places, desc="candidates", disable=not distributed.is_main(), leave=False
    ):
        vector = findings.directions[layer, index, 0]
        candidate = Candidate(layer, index - num_positions, float(vector.norm()))
        reason = _unusable(candidate, num_layers, settings)
        if reason is not None:
            candidates.append(replace(candidate, dropped=reason))
            continue
        edit = make_edit(findings.at(layer, candidate.position))
        with applied_by_hooks(model, edit):
            prompts = [prompt for part in parts for prompt in part]
            logits = next_token_logits(model, tokenizer, prompts, batch_size)
        with residual.adding(model, layer, vector):
            added = next_token_logits(model, tokenizer, validation.harmless, batch_size)
        target, harmless, kept = logits.split([len(part) for part in parts])
        scored = replace(
            candidate,
            bypass=float(refusal_scores(target, tokens).mean()),
            induce=float(refusal_scores(added, tokens).mean()),
            kl=float(kl_divergence(base, harmless).mean()),
            retain=float((refusal_scores(kept, tokens) > 0).double().mean()) if len(kept) else None,
        )
        candidates.append(replace(scored, dropped=_missed(scored, settings)))
    return candidates


def choose(candidates: Sequence[Candidate], settings: Thresholds) -> Candidate:
    """The candidate with the smallest bypass score among those that passed the filters.

    A search only begins there: where none passed it begins with the smallest bypass of all.

    Raises:
        StageError: if none passed, with how near the best ones came.
    """
    left = [candidate for candidate in candidates if candidate.dropped is None]
    if left:
        return min(
            left, key=lambda candidate: (candidate.bypass, candidate.layer, candidate.position)
        )
    scored = sorted(filter(is_scored, candidates), key=lambda c: c.bypass or 0.0)
    if scored and settings.name == "search":
        return scored[0]
    nearest = (
        "; ".join(
            f"layer {c.layer:g} position {c.position}: bypass {c.bypass:.2f}, induce {c.induce:.2f}, "
            f"KL {c.kl:.3f} ({c.dropped})"
            for c in scored[:3]
        )
        or "none was scored (" + ", ".join(sorted({str(c.dropped) for c in candidates})) + ")"
    )
    raise StageError(
        f"abliteration: none of {len(candidates)} candidate directions passed the filters (max_kl {settings.max_kl}, "
        f"min_induce {settings.min_induce}, skip_last_layers {settings.skip_last_layers}); nearest: {nearest}; loosen "
        "abliteration.selection, or give more prompts"
    )


def is_scored(candidate: Candidate) -> bool:
    """Whether a candidate has a score that can be compared."""
    return candidate.bypass is not None and math.isfinite(candidate.bypass)


def _unusable(candidate: Candidate, num_layers: int, settings: Thresholds) -> str | None:
    if not math.isfinite(candidate.norm) or candidate.norm == 0:
        # The input of the first block at a fixed token of the template is the same for every prompt.
        return "no difference between the prompt sets"
    if candidate.layer >= int(num_layers * (1 - settings.skip_last_layers)):
        return "among the last layers"
    return None


def _missed(scored: Candidate, settings: Thresholds) -> str | None:
    scores = [scored.bypass, scored.induce, scored.kl, scored.retain]
    if not all(math.isfinite(score) for score in scores if score is not None):
        return "a score is not finite"
    assert scored.kl is not None
    assert scored.induce is not None
    if scored.kl > settings.max_kl:
        return "kl above max_kl"
    if scored.retain is not None:
        # What it shares with true refusal was taken out of it, so adding it need not induce any.
        return "true refusal lost" if scored.retain < MIN_RETAINED else None
    return "induce below min_induce" if scored.induce < settings.min_induce else None
