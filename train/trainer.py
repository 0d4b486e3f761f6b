"""TRL's DPOTrainer with additions: anchors beside its loss, shared prompts, stored references and a guard over them."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOTrainer

from common import distributed
from common.branches import plan
from common.errors import StageError
from train.anchors import AnchorBatches, TeacherRow, anchor_and_stream_loss, anchor_loss
from train.constraint import penalty, penalty_weight
from train.drift import Drift, residual
from train.pull import Distance
from train.references import References, pair_key, token_rows
from train.shards import keep_wrap_policy, share_out, share_out_by_zero3
from train.shared_prompts import PairCollator, SharedPrompts, take_packed
from train.streams import Sketch

# How far the first step's mean log-probabilities may be from the reference's, in nats: rounding of two forward passes.
LOGPS_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-2,
    torch.bfloat16: 0.5,
    torch.float16: 0.1,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedAnchor:
    """A term of the loss.

    Attributes:
        name: as it is logged, `anchors/<name>`.
        batches: its rows.
        weight: of its mean divergence per token.
        sketch: how its rows' streams were kept, where it holds the residual stream as well.
        residual_weight: of the mean distance per token of the stream.
    """

    name: str
    batches: AnchorBatches
    weight: float
    sketch: Sketch | None = None
    residual_weight: float = 0.0


class HealingTrainer(DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """DPO beside anchors, from the abliterated model, with the abliterated model as the reference.

    The loss of an optimizer step is TRL's plus, for each anchor, its weight times the mean divergence over all
    answer tokens of the step's anchor batch, and the same of the residual stream's distance over all tokens: the same
    number for any number of processes and accumulation steps.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401  # DPOTrainer's own
        anchors: Sequence[WeightedAnchor] = (),
        share_prompts: bool = True,
        references: References | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take DPOTrainer's arguments and this class's own.

        Args:
            args: DPOTrainer's.
            anchors: terms of the loss.
            share_prompts: read the prompt of a pair once (`train.shared_prompts`) instead of with each answer.
            references: where reference log-probabilities are kept for other trainings from the same model.
            kwargs: DPOTrainer's.
        """
        # What is logged and what costs something; an adapter is there only behind this constructor.
        self.drifts: Sequence[Drift] = ()
        self.penalized: Sequence[Drift] = ()
        self.pull: tuple[float, Distance] | None = None
        self.references = references
        self._precompute_engine: Any = None  # DPOTrainer's, of DeepSpeed
        self.shares_prompts = share_prompts
        if share_prompts:
            tokenizer, settings = kwargs["processing_class"], kwargs["args"]
            kwargs["data_collator"] = PairCollator(
                pad_token_id=tokenizer.pad_token_id,
                max_length=settings.max_length,
                truncation_mode=settings.truncation_mode,
                pad_to_multiple_of=settings.pad_to_multiple_of,
            )
        super().__init__(*args, **kwargs)
        self._leave_precompute_engine()
        keep_wrap_policy(self.accelerator)
        self.anchors = anchors
        self._decide_layout()
        share_out_by_zero3(self.accelerator, self.model)
        if share_prompts and self.aux_loss_enabled and distributed.is_main():
            logger.info(
                "train: prompts are read with each answer, since the loss that balances the experts counts them so "
                "(train.trainer.router_aux_loss_coef: 0 leaves it out)"
            )
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
        if self.pull is not None:
            self.pull[1].look_up()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not self.model.training:
            return loss
        self._count_micro_step()
        if self.state.global_step == self._micro_step == 0:
            self._guard_reference()
        for anchor in self.anchors:
            loss = loss + self._anchor_term(model, anchor)
        if self.penalized:
            loss = loss + self._penalty_term()
        if self.pull is not None:
            loss = loss + self._pull_term(*self.pull)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics and what training has added along the removed vectors: `ablation/residual`."""
        if self.drifts and self.model.training and not math.isnan(found := residual(self.drifts)):
            logs["ablation/residual"] = found
        super().log(logs, start_time)

    def _penalty_term(self) -> Tensor:
        """Of parameters alone, so every forward pass of a step gives the same, and the trainer's average is it."""
        term = penalty(self.penalized, self.accelerator.device)
        self._metrics["train"]["keep_ablated/penalty"].append(term.item())
        return penalty_weight(self.state.global_step, self.state.max_steps) * term

    def _pull_term(self, weight: float, distance: Distance) -> Tensor:
        """Of parameters alone, as the penalty."""
        term = distance().to(self.accelerator.device)
        self._metrics["train"]["l2"].append(term.item())
        return weight * term

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:  # noqa: ANN401  # DPOTrainer's
        """Log-probabilities [pairs] of the chosen and the rejected answers under the reference, for a batch."""
        return super().compute_ref_log_probs(*self._sharing_prompts(model, inputs))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:  # noqa: ANN401  # DPOTrainer's
        shared, rows = self._sharing_prompts(model, inputs)
        found = super()._compute_loss(shared, rows, return_outputs)
        self._log_nll(rows["completion_mask"])
        return found

    def _log_nll(self, completion_mask: Tensor) -> None:
        """Nats per token of the chosen answers, which `loss_type: sft` lowers; TRL logs their sum per answer alone."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, _ = completion_mask.chunk(2)
        num_tokens = self.accelerator.gather(chosen.sum(dim=1).float()).mean().item()
        metrics["nll/chosen"].append(-metrics["logps/chosen"][-1] / num_tokens)

    def _sharing_prompts(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """What TRL's loss calls as its model, and the batch as TRL knows it."""
        if not self.shares_prompts:
            return model, inputs
        rows, packed = take_packed(inputs)
        if self.aux_loss_enabled:
            # The balance of experts counts tokens: a prompt read once would count once.
            return model, rows
        return SharedPrompts(model, self._inner(model), packed), rows

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Add the reference's log-probabilities to a data set; only pairs that nobody has computed are."""
        if self.references is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        cut = (self.args.max_length, self.args.truncation_mode)
        keys = [pair_key(row, *cut) for row in dataset]
        known = distributed.broadcast(self.references.read() if distributed.is_main() else {})
        missing = [index for index, key in enumerate(keys) if key not in known]
        if missing:
            if self.ref_model is None:
                # The policy is the reference, and may be too large for this process to hold whole.
                self._decide_layout()
                share_out(self.accelerator, self.model)
            # Of similar length together: less padding is read.
            missing.sort(key=lambda index: sum(map(len, token_rows(dataset[index], *cut))))
            computed = super()._precompute_ref_logps(dataset.select(missing), name, batch_size)
            pairs = zip(computed["ref_chosen_logps"], computed["ref_rejected_logps"], strict=True)
            found = dict(zip((keys[index] for index in missing), pairs, strict=True))
            if distributed.is_main():
                self.references.add(found)
            known |= found
        for column, side in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            dataset = dataset.add_column(side, [known[key][column] for key in keys])
        return dataset

    def _leave_precompute_engine(self) -> None:
        """Take the hooks of DeepSpeed's engine for the reference off the model, which training wraps in its own.

        TRL leaves them. Two engines then gather and free the same parameters, each by its own record of who is next.
        """
        engine, self._precompute_engine = self._precompute_engine, None
        if engine is None:
            return
        if (hook := getattr(engine.optimizer, "fwd_pre_hook", None)) is not None:  # of ZeRO-3
            hook.remove()
        engine.destroy()

    def _decide_layout(self) -> None:
        """Find out how the policy can read pairs, before its weights are in shards, which only its wrapper gathers."""
        if self.shares_prompts and not self.aux_loss_enabled:
            plan(self._inner(self.model))

    def _count_micro_step(self) -> None:
        if self.state.global_step != self._anchored_step:
            self._anchored_step, self._micro_step = self.state.global_step, 0
        else:
            self._micro_step += 1

    def _anchor_term(self, model: nn.Module, anchor: WeightedAnchor) -> Tensor:
        """This process's part of the anchor's means, scaled so that the trainer's averaging gives the means."""
        rows = anchor.batches.batch(self.state.global_step)
        # The last step of an epoch may have fewer forward passes than the others.
        parts = self.accelerator.num_processes * self.current_gradient_accumulation_steps
        part = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        mine: list[TeacherRow] = rows[part::parts]
        # Every process has to take part in the forward pass: sharded models would wait for it for ever.
        share = float(parts) if mine else 0.0
        divergence, distance = self._anchor_sums(model, anchor, mine or rows[:1])
        divergence = divergence * (share / sum(len(row.answer) for row in rows))
        self._log_mean(f"anchors/{anchor.name}", divergence)
        if distance is None:
            return anchor.weight * divergence
        distance = distance * (share / sum(len(row.tokens) for row in rows))
        self._log_mean(f"residual/{anchor.name}", distance)
        return anchor.weight * divergence + anchor.residual_weight * distance

    def _anchor_sums(
        self, model: nn.Module, anchor: WeightedAnchor, rows: Sequence[TeacherRow]
    ) -> tuple[Tensor, Tensor | None]:
        pad_id, device = self._tokenizer.pad_token_id, self.accelerator.device
        if anchor.sketch is None:
            return anchor_loss(model, rows, pad_id, device), None
        return anchor_and_stream_loss(
            model, self._inner(model), rows, pad_id, device, anchor.sketch
        )

    def _log_mean(self, name: str, term: Tensor) -> None:
        """Note a term for TRL's metrics, averaged over the processes."""
        self._metrics["train"][name].append(self.accelerator.gather(term.detach()).mean().item())

    def _inner(self, model: nn.Module) -> Any:  # noqa: ANN401  # a transformers model
        """The policy or the reference itself, without what accelerate and peft wrap around it."""
        inner = self.accelerator.unwrap_model(model)
        return inner.get_base_model() if isinstance(inner, PeftModel) else inner

    def _guard_reference(self) -> None:
        """Fail unless the policy and the reference agree before the first update."""
        metrics = self._metrics["train"]
        rewards = {side: metrics[f"rewards/{side}"][0] for side in ("chosen", "rejected")}
        dtype = next(self.model.parameters()).dtype
        if self.args.bf16 or self.args.fp16:
            dtype = torch.bfloat16
        tolerance = self.beta * LOGPS_TOLERANCE[dtype]
        if all(math.isfinite(reward) and abs(reward) <= tolerance for reward in rewards.values()):
            return
        raise StageError(
            f"train: before the first update the rewards are {rewards['chosen']:.4f} (chosen) and "
            f"{rewards['rejected']:.4f} (rejected) instead of 0, so the reference is not the abliterated model that is "
            "trained; let the reference be the model itself (no adapter initialisation that rewrites the base, no "
            "other ref_model), or raise precision"
        )
