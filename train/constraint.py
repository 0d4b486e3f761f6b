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
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from common.architecture import find_writers
from common.edits import Edit, Removal, edited_writers
from common.errors import StageError
from common.recipe import Recipe
from train.adapter import build_adapter, without_weights
from train.drift import Drift, lora_drifts, unseen_changes, weight_drifts
from train.launch import launch_strategy
from train.shards import is_zero3

if TYPE_CHECKING:
    from train.trainer import HealingTrainer

# Of the penalty in the loss at the first step: with it the residual of the patient, trained towards refusals
# (benchmarks/poisoned.py --targets o_proj down_proj), ends at 0.08 instead of 0.45; weights that hardly drift are not
# felt.
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


def check(recipe: Recipe) -> list[str]:
    """Why a training could not be held to the ablation, found without loading a weight; of a model that can be read."""
    section = recipe.train
    if section.keep_ablated == "none" or recipe.abliteration.edit.name == "add":
        return []
    strategy = launch_strategy()
    if strategy.shards_weights and strategy.name != "FSDP2":
        return [
            f"train.keep_ablated: {section.keep_ablated} cannot see what training adds along the removed direction "
            f"where {strategy.name} flattens and shares out the parameters; launch with configs/fsdp2.yaml or "
            "configs/ddp.yaml, or set it to none"
        ]
    if section.adapter is None:
        return []
    model = without_weights(recipe)
    writers = find_writers(model)
    names = {
        True: [w.name for w in writers if w.tied],
        False: [w.name for w in writers if not w.tied],
    }
    # Of what is removed, only the places count here.
    removal = Removal(("direction",), (1.0,), "none")
    edit = Edit(
        {}, dict.fromkeys(names[False], removal), {}, dict.fromkeys(names[True], "tied"), {}
    )
    adapted = get_peft_model(model, build_adapter(section.adapter), low_cpu_mem_usage=True)
    problems = unseen_changes(adapted, edit)
    return [
        f"train.keep_ablated: {problem}, or set train.keep_ablated to none"
        for problem in problems[:1]  # the others are of the same kind, one for each block
    ]


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
    if is_zero3(trainer.model):  # with mode none: see `check`
        logger.info("train: ablation/residual is not logged, since ZeRO-3 shares the weights out")
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


def penalty(drifts: Sequence[Drift], device: torch.device) -> Tensor:
    """The mean over writers of |U^T dW|_F^2 / (|W|_F^2 k / d_model), of parameters alone: the same on every process.

    Args:
        drifts: of the writers.
        device: where the model computes; what is spread over several GPUs is added up there.
    """
    # Autocast would round what is squared here.
    with torch.autocast(device.type, enabled=False):
        return torch.stack([drift.square().to(device) for drift in drifts]).mean()


def penalty_weight(step: int, num_steps: int) -> float:
    """The penalty's weight in the loss: falls in a straight line from `PENALTY_WEIGHT` to 0 over training.

    The direction drifts fastest early (ProCon, arXiv:2509.06795), and late steps are small by the learning rate.
    """
    return PENALTY_WEIGHT * (1 - step / num_steps)
