"""The edited model on disk, and the proof that it is the model that was scored."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration import verification
from abliteration.noise import self_divergence
from abliteration.prompt_sets import PromptSet
from abliteration.selection import next_token_logits
from common import distributed
from common.architecture import find_writers
from common.checkpoint import Written, apply_to_checkpoint
from common.divergence import kl_divergence
from common.edits import Edit
from common.errors import StageError
from common.hooks import applied_by_hooks
from common.model import load_model
from common.recipe import Recipe
from common.shards import DTYPES
from common.stored_writers import open_checkpoint

# Prompts of each kind that the export is scored on.
SAMPLE = 32
# How far the export may diverge from what was scored, in nats per prompt: rounding of edited weights to the type
# they are stored in; in 4 bits the edit is not rounded as the weights were.
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ALLOWED_IN_4BIT = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What the model answered while the edit was on it by hooks.

    Attributes:
        prompts: that were read.
        logits: behind them [prompts, vocab].
        moved: mean KL(original || edited) of them, nats.
        reach: how far the unedited stream reaches along the direction [layers].
        noise: KL of the unedited model with itself in other batches, nats.
    """

    prompts: Sequence[str]
    logits: Tensor
    moved: float
    reach: Tensor
    noise: float


@dataclass(frozen=True)
class Report:
    """What the export is.

    Attributes:
        residuals: per writer the share of what it wrote along the direction that is left.
        mismatch: mean KL(scored || exported) of the next token, nats; None if the model was never whole in memory.
        moved: mean KL(original || scored) beside it.
        noise: KL of the unedited model with itself in other batches.
    """

    residuals: dict[str, float]
    mismatch: float | None
    moved: float | None
    noise: float | None

    def as_data(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "largest_residual": max(self.residuals.values(), default=None),
            "export_mismatch_kl": self.mismatch,
            "edit_kl": self.moved,
            "noise_floor_kl": self.noise,
        }


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: PromptSet,
    edit: Edit,
    batch_size: int,
) -> Scores:
    """What a model answers with the edit on it, to hold the export against."""
    prompts = [*validation.target[:SAMPLE], *validation.harmless[:SAMPLE]]
    original = next_token_logits(model, tokenizer, prompts, batch_size)
    with applied_by_hooks(model, edit):
        edited = next_token_logits(model, tokenizer, prompts, batch_size)
    return Scores(
        prompts,
        edited,
        float(kl_divergence(original, edited).mean()),
        verification.stream_along(model, tokenizer, prompts[:SAMPLE], edit.direction),
        self_divergence(model, tokenizer, prompts, batch_size),
    )


def write(
    base: Path,
    edit: Edit,
    output: Path,
    scores: Scores | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Report:
    """Edit the checkpoint on disk, load the result and score it again.

    Args:
        base: folder of the model.
        edit: what to apply.
        output: folder of the edited model.
        scores: what the scored model answered; None if it was never whole in memory: then only the weights are
            checked.
        recipe: its `model` and `abliteration` sections.
        tokenizer: of the model.
        batch_size: prompts per forward pass, as for the scores.

    Raises:
        StageError: if a writer was missed, or the export answers otherwise than what was scored.
    """
    written: dict[str, Written] = {}
    if distributed.is_main():
        if output.exists():  # finished before the stage was
            shutil.rmtree(output)
        written = apply_to_checkpoint(base, edit, output)
    written = distributed.broadcast(written)
    dtype = _stored_dtype(output, edit)
    residuals = verification.check_coverage(written, edit, dtype)
    if scores is None:
        return Report(residuals, None, None, None)
    in_4bit = recipe.abliteration.load_in_4bit
    exported = load_model(output, dtype=recipe.model.dtype, in_4bit=in_4bit)
    logits = next_token_logits(exported, tokenizer, scores.prompts, batch_size)
    mismatch = float(kl_divergence(scores.logits, logits).mean())
    # Rounded to the type it is stored in, and to the one it is run in.
    coarsest = max(dtype, exported.dtype, key=lambda each: torch.finfo(each).eps)
    allowed = (ALLOWED_IN_4BIT if in_4bit else ALLOWED[coarsest]) + 2 * scores.noise
    if not mismatch <= allowed:
        raise StageError(
            f"abliteration: the exported model is not the one that was scored: KL {mismatch:.4f} nats per prompt, "
            f"where {allowed:.4f} is due to rounding (the edit itself moved {scores.moved:.4f}); "
            + ("find the direction without load_in_4bit" if in_4bit else "report it as a bug")
        )
    reach = verification.stream_along(exported, tokenizer, scores.prompts[:SAMPLE], edit.direction)
    rounding = verification.ROUNDING_TO_4BIT if in_4bit else verification.ROUNDING[exported.dtype]
    verification.check_stream(scores.reach, reach, edit, find_writers(exported), rounding)
    logger.info(
        "abliteration: exported and scored again: KL %.1e from what was scored (the edit moved %.4f, noise floor %.1e)",
        mismatch,
        scores.moved,
        scores.noise,
    )
    return Report(residuals, mismatch, scores.moved, scores.noise)


def _stored_dtype(folder: Path, edit: Edit) -> torch.dtype:
    """The coarsest type that edited weights are stored in."""
    checkpoint = open_checkpoint(folder)
    stored = {
        DTYPES[placed.stored.dtype] for name in edit.removals for placed in checkpoint.weights(name)
    }
    return max(stored, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
