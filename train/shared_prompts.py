"""The prompt of a pair read once: chosen and rejected as branches of one row, under TRL's own loss.

TRL reads a pair as two rows, prompt and all, and its loss takes numbers per token [2 * pairs, length - 1] from a
fused unembedding. Here the collator lays the same pair out a second time, as branches, and `SharedPrompts` stands in
the model's place: it reads the branches, lets the unembedding see the positions of the answers alone, and returns
TRL's numbers where TRL expects them. Losses, metrics and callbacks stay TRL's, whatever they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from common.branches import Branches, Packed, attention_masks, pack, plan

# Of the keys that are added to a batch.
PACKED = "packed_"
IGNORED = -100  # the label that TRL's unembedding skips


@dataclass
class PairCollator(DataCollatorForPreference):  # type: ignore[misc]  # trl ships no types
    """TRL's collator, with each pair laid out as branches beside its two rows: `Packed` under prefixed keys."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs: what is truncated is truncated as TRL does, before the rows are laid out as branches."""
        batch: dict[str, Any] = super().torch_call(examples)
        packed = pack(list(_branches(batch)), self.pad_token_id, torch.device("cpu"))
        return batch | {
            PACKED + field.name: getattr(packed, field.name) for field in fields(Packed)
        }


def _branches(batch: dict[str, Tensor]) -> Iterator[Branches]:
    """Each pair as one row; as two where truncation at the front has left its answers different prompts."""
    rows = [
        (ids[~answers & there].tolist(), ids[answers].tolist())
        for ids, there, answers in zip(
            batch["input_ids"],
            batch["attention_mask"].bool(),
            batch["completion_mask"].bool(),
            strict=True,
        )
    ]
    half = len(rows) // 2
    for (prompt, chosen), (other, rejected) in zip(rows[:half], rows[half:], strict=True):
        if prompt == other:
            yield Branches(prompt, [chosen, rejected])
        else:
            yield Branches(prompt, [chosen])
            yield Branches(other, [rejected])


def take_packed(batch: dict[str, Any]) -> tuple[dict[str, Any], Packed]:
    """A batch as TRL's collator makes it, and what `PairCollator` added."""
    names = {PACKED + field.name: field.name for field in fields(Packed)}
    rows = {key: value for key, value in batch.items() if key not in names}
    return rows, Packed(**{name: batch[key] for key, name in names.items()})


class SharedPrompts:
    """Stands in a model's place for TRL's loss on one batch, and computes the same numbers from branches."""

    def __init__(self, model: nn.Module, inner: PreTrainedModel, packed: Packed) -> None:
        """Take a model and the batch.

        Args:
            model: what is called, with the wrappers of the launch and of PEFT around it.
            inner: the causal language model inside, which TRL gave its fused unembedding.
            packed: the batch as branches.
        """
        self.model, self.inner, self.packed = model, inner, packed

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        **options: Any,  # noqa: ANN401  # TRL's, for the model
    ) -> FusedCausalLMOutput:
        """What the model returns for TRL's rows.

        Args:
            input_ids: TRL's rows [2 * pairs, length], first the chosen, then the rejected.
            attention_mask: their mask.
            labels: their answers' token ids, -100 elsewhere.
            options: handed on.

        Returns:
            The numbers per token [2 * pairs, length - 1], zero where the label is -100.
        """
        if plan(self.inner) == "plain":
            rows = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            output: FusedCausalLMOutput = self.model(**rows, **options)
            return output
        packed = self.packed
        with _stream_at(self.inner.base_model, packed.places):
            read = self.model(
                input_ids=packed.input_ids,
                attention_mask=attention_masks(self.inner, packed),
                position_ids=packed.position_ids,
                shift_labels=packed.targets[packed.places].unsqueeze(0),
                **options,
            )
        scored = labels[:, 1:] != IGNORED
        names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        numbers = {name: getattr(read, name) for name in names}
        return FusedCausalLMOutput(
            label_mask=scored,
            **{name: _in_rows(each, scored) for name, each in numbers.items() if each is not None},
        )


def _in_rows(numbers: Tensor, scored: Tensor) -> Tensor:
    """Put numbers [1, answer tokens] that come pair by pair into TRL's rows [2 * pairs, length - 1]."""
    by_pair = scored.unflatten(0, (2, -1)).transpose(0, 1)
    filled = numbers.new_zeros(by_pair.shape).masked_scatter(by_pair, numbers)
    return filled.transpose(0, 1).flatten(0, 1)


@contextmanager
def _stream_at(backbone: nn.Module, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let a backbone return its stream at some places only, as one row [1, places, d_model].

    On a CPU TRL's unembedding reads every position that it is given, prompt and padding included.
    """

    def gather(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401  # torch's hook type
        rows, columns = (place.to(output.last_hidden_state.device) for place in places)
        output.last_hidden_state = output.last_hidden_state[rows, columns].unsqueeze(0)
        return output

    handle = backbone.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
