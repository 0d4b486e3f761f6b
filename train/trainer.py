"""TRL's DPOTrainer with two additions: anchors beside its loss, and a guard over its reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from common.errors import StageError
from train.anchors import AnchorBatches, TeacherRow, anchor_loss

# How far from 0 the first step's mean rewards may be: rounding of two forward passes, times beta.
REWARD_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@dataclass(frozen=True)
class WeightedAnchor:
    """A term of the loss.

    Attributes:
        name: as it is logged, `anchors/<name>`.
        batches: its rows.
        weight: of its mean divergence per token.
    """

    name: str
    batches: AnchorBatches
    weight: float


class HealingTrainer(DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """DPO beside anchors, from the abliterated model, with the abliterated model as the reference.

    The loss of an optimizer step is TRL's plus, for each anchor, its weight times the mean divergence over all
    answer tokens of the step's anchor batch: the same number for any number of processes and accumulation steps.
    """

    def __init__(self, *args: Any, anchors: Sequence[WeightedAnchor] = (), **kwargs: Any) -> None:  # noqa: ANN401  # DPOTrainer's own
        """Take DPOTrainer's arguments and the anchors."""
        super().__init__(*args, **kwargs)
        self.anchors = anchors
        self._anchored_step, self._micro_step = -1, 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # the trainer's signature
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # noqa: ANN401  # the trainer's signature
        """TRL's loss plus the anchors'.

        Raises:
            StageError: at the first step, if the reference is not the model that is trained.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not self.model.training:
            return loss
        self._count_micro_step()
        if self.state.global_step == 0:
            self._guard_reference()
        for anchor in self.anchors:
            loss = loss + anchor.weight * self._anchor_term(model, anchor)
        return loss

    def _count_micro_step(self) -> None:
        if self.state.global_step != self._anchored_step:
            self._anchored_step, self._micro_step = self.state.global_step, 0
        else:
            self._micro_step += 1

    def _anchor_term(self, model: nn.Module, anchor: WeightedAnchor) -> Tensor:
        """This process's part of the anchor's mean, scaled so that the trainer's averaging gives the mean."""
        rows = anchor.batches.batch(self.state.global_step)
        # The last step of an epoch may have fewer forward passes than the others.
        parts = self.accelerator.num_processes * self.current_gradient_accumulation_steps
        part = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        mine: list[TeacherRow] = rows[part::parts]
        num_tokens = sum(len(row.answer) for row in rows)
        if mine:
            term = anchor_loss(model, mine, self._tokenizer.pad_token_id, self.accelerator.device)
            term = term * (parts / num_tokens)
        else:
            # Every process has to take part in the forward pass: sharded models would wait for it for ever.
            term = 0.0 * anchor_loss(
                model, rows[:1], self._tokenizer.pad_token_id, self.accelerator.device
            )
        self._metrics["train"][f"anchors/{anchor.name}"].append(
            self.accelerator.gather(term.detach()).mean().item()
        )
        return term

    def _guard_reference(self) -> None:
        """Fail unless the policy and the reference agree before the first update."""
        metrics = self._metrics["train"]
        rewards = {side: metrics[f"rewards/{side}"][0] for side in ("chosen", "rejected")}
        dtype = next(self.model.parameters()).dtype
        tolerance = 5e-2 if self.args.bf16 or self.args.fp16 else REWARD_TOLERANCE[dtype]
        if all(math.isfinite(reward) and abs(reward) <= tolerance for reward in rewards.values()):
            return
        raise StageError(
            f"train: before the first update the rewards are {rewards['chosen']:.4f} (chosen) and "
            f"{rewards['rejected']:.4f} (rejected) instead of 0, so the reference is not the abliterated model that is "
            "trained; let the reference be the model itself (no adapter initialisation that rewrites the base, no "
            "other ref_model), or raise precision"
        )
