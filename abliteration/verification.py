"""Proof that an edit reached everything that writes: weight by weight, and in the residual stream itself."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration.placement import behind_norm, unit
from common import chat, residual
from common.architecture import PlacedWriter
from common.checkpoint import Written
from common.edits import Edit
from common.errors import StageError

# What rounding to the dtype of the weights may leave of a removed component, as a share of the original.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Quantized anew, an edited weight writes up to a tenth of what it wrote along the direction again.
ROUNDING_TO_4BIT = 2e-2


def check_coverage(
    written: Mapping[str, Written], edit: Edit, dtype: torch.dtype
) -> dict[str, float]:
    """Compare what the writers write along the direction before and after the edit.

    Args:
        written: what each edited writer wrote, |U W|, in the source and writes in the export.
        edit: what was applied.
        dtype: of the weights.

    Returns:
        |U W_edited| / |U W_original| by writer. Where no norms are restored it is |1 - strength| up to rounding,
        where column norms are, as much or more.

    Raises:
        StageError: if a writer kept something else: it was missed.
    """
    for name, removal in edit.removals.items():
        if name not in written and not removal.is_void:
            raise StageError(
                f"abliteration: {name} was not written, although the edit removes something from it; its entry in "
                "common/architecture.py is wrong"
            )
    ratios = {
        name: there.after / there.before if there.before > 0 else 0.0
        for name, there in written.items()
    }
    for name, ratio in ratios.items():
        removal = edit.removals[name]
        due = abs(1 - removal.strengths[0])
        if removal.keep_norm == "none" and not abs(ratio - due) <= ROUNDING[dtype]:
            raise StageError(
                f"abliteration: after the edit {name} writes {ratio:.4f} of what it wrote along the direction, where "
                f"{due:.4f} was due; its entry in common/architecture.py is wrong"
            )
        if removal.keep_norm == "column" and due == 0 and not ratio <= ROUNDING[dtype]:
            raise StageError(
                f"abliteration: after the edit {name} still writes {ratio:.4f} of what it wrote along the direction, "
                "where nothing was due; its entry in common/architecture.py is wrong"
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


def check_stream(
    before: Tensor,
    after: Tensor,
    edit: Edit,
    writers: Sequence[PlacedWriter],
    rounding: float,
) -> None:
    """Fail if something that no map names still writes along a direction that was removed entirely.

    Args:
        before: `stream_along` of the unedited model [layers].
        after: the same of the edited model.
        edit: what was applied; edits that leave something of the direction prove nothing here.
        writers: of the edited model.
        rounding: what rounding a weight may leave of what is removed from it, as a share.

    Raises:
        StageError: naming the first layer that still sees the direction.
    """
    removed = (_removes_all(edit, writer) for writer in writers)
    if edit.left_alone or not edit.removals or not all(removed):
        return
    scale = float(before.max())
    for layer, reach in enumerate(after.tolist()):
        if reach > rounding * 10 * scale:
            raise StageError(
                f"abliteration: the residual stream at the input of block {layer} still reaches {reach / scale:.4f} of "
                "the original along the removed direction, so something unmapped writes there; add it to "
                "common/architecture.py"
            )


def _removes_all(edit: Edit, writer: PlacedWriter) -> bool:
    """Whether nothing of the direction itself is left in what a writer contributes."""
    removal = edit.removals[writer.name]
    # A biprojected direction differs from block to block, and rows that are rescaled turn what is written.
    due = unit(behind_norm(edit.direction, writer))
    is_direction = torch.allclose(edit.basis(writer.name)[0], due, rtol=0, atol=1e-6)
    return is_direction and removal.strengths[0] == 1 and removal.keep_norm != "row"
