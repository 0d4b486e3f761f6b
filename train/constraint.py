"""Ablation-preserving training: what healing adds is kept off the removed direction, or made to cost something.

`hard`: after every optimizer step (Adam leaves any subspace, so projecting gradients is not enough) what was added to
a writer is projected (`train.drift`): of a LoRA update B A the factor B, of full training the change of the weight
itself. `soft`: a term of the loss on the same quantity, strongest at the start. What an edit left along the direction
(at strengths below 1, where norms are kept) stays as it is; what an edit adds to the stream is no part of this:
healing may add along it or against it.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from common.edits import Edit, edited_writers
from common.errors import StageError
from train.drift import Drift, lora_drifts, weight_drifts

if TYPE_CHECKING:
    from train.trainer import HealingTrainer

# Of the penalty in the loss at the first step: with it the residual of the patient, trained towards refusals
# (benchmarks/poisoned.py), ends at 0.0005 instead of 1.1; weights that hardly drift are not felt.
PENALTY_WEIGHT = 100.0

logger = logging.getLogger(__name__)


class KeepAblated(TrainerCallback):
    """Projects the model after every optimizer step."""

    def __init__(self, drifts: Sequence[Drift]) -> None:
        """Take what training may not add."""
        self.drifts = drifts

    def on_optimizer_step(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take back what the step wrote along the direction."""
        with torch.no_grad():
            for drift in self.drifts:
                drift.take_back()


def keep_ablated(
    trainer: "HealingTrainer", edit: Edit, mode: Literal["none", "soft", "hard"]
) -> None:
    """Let a trainer log what it adds along the removed vectors, and hold that or make it cost something.

    Args:
        trainer: before its first step.
        edit: of the abliterated model that it trains; one that only adds has nothing to hold.
        mode: the recipe's `train.keep_ablated`.

    Raises:
        StageError: if the adapter changes a writer in a way that is not seen here, and may not.
    """
    if not edit.removals:
        if mode != "none":
            logger.info(
                "train: the edit removes nothing, so there is nothing for keep_ablated to hold"
            )
        return
    drifts, problems = find_drifts(trainer.model, edit)
    if problems and mode != "none":
        raise StageError(f"train: {problems[0]}, or set train.keep_ablated to none")
    if problems:
        logger.info(
            "train: ablation/residual is not logged, since %s", problems[0].partition(";")[0]
        )
        return
    trainer.drifts = drifts
    if mode == "none":
        return
    if not isinstance(trainer.model, PeftModel):
        hold_norms(trainer.model, edit)
    if mode == "hard":
        trainer.add_callback(KeepAblated(drifts))
    else:
        trainer.penalized = drifts


def find_drifts(model: nn.Module, edit: Edit) -> tuple[list[Drift], list[str]]:
    """What training adds to the edited writers of a model, and what of it is not seen: see `lora_drifts`."""
    return (
        lora_drifts(model, edit)
        if isinstance(model, PeftModel)
        else (weight_drifts(model, edit), [])
    )


def hold_norms(model: nn.Module, edit: Edit) -> None:
    """Hold the gains of the norms behind edited writers still, before an optimizer takes the parameters.

    A trained gain would turn u = gain * v away from the vector that was removed.
    """
    for writer in edited_writers(model, edit).values():
        if writer.post_norm is not None:
            writer.post_norm.requires_grad_(False)


def penalty(drifts: Sequence[Drift]) -> Tensor:
    """The mean over writers of |U^T dW|_F^2 / (|W|_F^2 k / d_model), of parameters alone: the same on every process."""
    # Autocast would round what is squared here.
    with torch.autocast(drifts[0].basis.device.type, enabled=False):
        return torch.stack([drift.square() for drift in drifts]).mean()


def penalty_weight(step: int, num_steps: int) -> float:
    """The penalty's weight in the loss: falls in a straight line from `PENALTY_WEIGHT` to 0 over training.

    The direction drifts fastest early (ProCon, arXiv:2509.06795), and late steps are small by the learning rate.
    """
    return PENALTY_WEIGHT * (1 - step / num_steps)
