"""Proof that an edit reached everything that writes: weight by weight, and in the residual stream itself."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat, residual
from common.edits import Edit, component_along, edited_writers
from common.errors import StageError

# What rounding to the dtype of the weights may leave of a removed component, as a share of the original.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def written_along(model: nn.Module, edit: Edit) -> dict[str, float]:
    """How much each edited writer writes along its vector: |u^T W| by writer."""
    return {
        name: float(component_along(writer.weight, edit.vector_of(name), writer.layout).norm())
        for name, writer in edited_writers(model, edit).items()
    }


def check_coverage(
    before: dict[str, float], after: dict[str, float], edit: Edit, dtype: torch.dtype
) -> dict[str, float]:
    """Compare what the writers write along the direction before and after the edit.

    Args:
        before: `written_along` of the unedited model.
        after: the same of the edited model.
        edit: what was applied.
        dtype: of the weights.

    Returns:
        |u^T W_edited| / |u^T W_original| by writer; |1 - strength| up to rounding.

    Raises:
        StageError: if a writer kept more than that: it was missed.
    """
    ratios = {name: after[name] / before[name] if before[name] > 0 else 0.0 for name in before}
    for name, ratio in ratios.items():
        expected = abs(1 - edit.removals[name].strength)
        if abs(ratio - expected) > ROUNDING[dtype]:
            raise StageError(
                f"abliteration: after the edit {name} writes {ratio:.4f} of what it wrote along the direction, where "
                f"{expected:.4f} was due; its entry in common/architecture.py is wrong"
            )
    return ratios


@torch.inference_mode()
def stream_along(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    direction: Tensor,
) -> Tensor:
    """How far the residual stream reaches along a unit direction: rms of v.h [layers] over prompts, last position."""
    encoded = chat.encode(tokenizer, prompts)
    pad_id = int(tokenizer.pad_token_id)
    ids, mask = chat.pad_left(encoded, pad_id, model.device)
    with residual.reading(model, 1) as streams:
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=chat.positions(mask),
            use_cache=False,
            logits_to_keep=1,
        )
    return torch.stack(
        [
            (stream[:, -1].double() @ direction.to(stream.device)).square().mean().sqrt().cpu()
            for stream in streams
        ]
    )


def check_stream(before: Tensor, after: Tensor, edit: Edit, dtype: torch.dtype) -> None:
    """Fail if something that no map names still writes along a direction that was removed entirely.

    Args:
        before: `stream_along` of the unedited model [layers].
        after: the same of the edited model.
        edit: what was applied; partial edits and edits that leave a writer alone prove nothing here.
        dtype: of the weights.

    Raises:
        StageError: naming the first layer that still sees the direction.
    """
    if edit.left_alone or any(removal.strength != 1 for removal in edit.removals.values()):
        return
    scale = float(before.max())
    for layer, reach in enumerate(after.tolist()):
        if reach > ROUNDING[dtype] * 10 * scale:
            raise StageError(
                f"abliteration: the residual stream at the input of block {layer} still reaches {reach / scale:.4f} of "
                "the original along the removed direction, so something unmapped writes there; add it to "
                "common/architecture.py"
            )
