"""What is left of the removed direction, in the weights and in how the model tells harmful prompts from harmless ones.

Weights: what every edited writer writes along the vectors that were removed from it, as the model is saved, rounded
to bfloat16, and quantized to NF4: rounding brings a little back. Activations: the direction is estimated again, since
healing could lead refusal along another one.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat, distributed, residual
from common.architecture import Layout
from common.edits import Edit, component_along, edited_writers
from common.prompts import load_prompts
from common.recipe import Recipe
from eval.items import MODELS, ModelName

Form = Literal["saved", "bfloat16", "nf4"]
FORMS: tuple[Form, ...] = get_args(Form)
Writes = dict[str, Tensor]
# What bitsandbytes quantizes: linear layers and GPT-2's; embeddings and fused experts stay as they are.
QUANTIZED: tuple[Layout, ...] = ("linear", "conv1d")


@dataclass(frozen=True)
class Trace:
    """What one model shows of the direction.

    Attributes:
        writes: by form, what each writer writes along the vectors that the edit names for it: U W in float64; None
            for a form that cannot be made here.
        difference: the difference in means [d_model] at the edit's place; None where there is none to estimate.
    """

    writes: Mapping[Form, Writes | None]
    difference: Tensor | None


@dataclass(frozen=True)
class Contrast:
    """The prompts that a direction is estimated from again, and the place.

    Attributes:
        target: prompts whose refusal was to go.
        harmless: prompts that are answered.
        kept: prompts whose refusal was to stay: the direction is made orthogonal to theirs.
        layer: the block whose input is read; a fraction lies between two.
        position: counted from the end of the prompt, below 0.
    """

    target: Sequence[str]
    harmless: Sequence[str]
    kept: Sequence[str]
    layer: float
    position: int


def contrast(recipe: Recipe, edit: Edit) -> Contrast | str:
    """What to estimate the removed direction from again, or why that would mean nothing.

    Prompts that stage one held out to choose by are among them, and those it left out as unclear cases.
    """
    if not edit.removals:
        return "the edit adds a direction and removes none"
    if all(removal.is_void for removal in edit.removals.values()):
        return "the edit removes nothing"
    if not {"layer", "position"} <= set(edit.about):
        return "the edit does not say at which layer and position its direction was found"
    prompts = recipe.abliteration.prompts
    harmful, harmless = load_prompts(prompts.harmful), load_prompts(prompts.harmless)
    target, kept = harmful, []
    if prompts.falsely_refused is not None:
        target, kept = load_prompts(prompts.falsely_refused), harmful
    return Contrast(target, harmless, kept, edit.about["layer"], edit.about["position"])


def trace(
    model: PreTrainedModel,
    edit: Edit,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Contrast | str,
    batch_size: int,
) -> Trace:
    """Measure one model; every process of the launch takes part."""
    writes = {form: writes_along(model, edit, form) for form in FORMS}
    if isinstance(prompts, str):
        return Trace(writes, None)
    return Trace(writes, difference_in_means(model, tokenizer, prompts, batch_size))


def writes_along(model: PreTrainedModel, edit: Edit, form: Form = "saved") -> Writes | None:
    """What each writer of a model, in a form, writes along the vectors that an edit names for it: U W in float64.

    Returns:
        By the writer's name [..., d_in, k]; None for NF4 where bitsandbytes is not installed.
    """
    if form == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return None
    found = {}
    for name, writer in edited_writers(model, edit).items():
        weight = writer.weight.detach()
        if form == "bfloat16":
            weight = weight.to(torch.bfloat16)
        elif form == "nf4" and writer.layout in QUANTIZED:
            weight = through_nf4(weight)
        found[name] = component_along(weight, edit.basis(name), writer.layout).cpu()
    return found


def through_nf4(weight: Tensor) -> Tensor:
    """A weight [rows, columns] quantized to NF4 as transformers loads it (doubly quantized), and back in float32."""
    from bitsandbytes import functional  # noqa: PLC0415  # optional

    packed, state = functional.quantize_4bit(
        weight.float().contiguous(), quant_type="nf4", compress_statistics=True
    )
    back: Tensor = functional.dequantize_4bit(packed, state)
    return back


def residuals(
    edit: Edit, original: Trace, abliterated: Trace, healed: Trace
) -> dict[Form, dict[str, float] | None]:
    """`share_written` of the two models in every form; rounding counts as something that was moved."""
    whole, due = original.writes["saved"], abliterated.writes["saved"]
    assert whole is not None
    assert due is not None
    found: dict[Form, dict[str, float] | None] = {}
    for form in FORMS:
        left, written = abliterated.writes[form], healed.writes[form]
        if left is None or written is None:
            found[form] = None
        else:
            found[form] = share_written(edit, whole, due, left, written)
    return found


def share_written(
    edit: Edit, original: Writes, abliterated: Writes, left: Writes, healed: Writes
) -> dict[str, float] | None:
    """How much of the removed vectors is written again, as the largest share of what the original wrote.

    Args:
        edit: what was removed from which writer.
        original: what the original writes along it, by writer.
        abliterated: the same of the abliterated model as it is saved.
        left: the same of the abliterated model in the form that is measured.
        healed: the same of the healed model in that form.

    Returns:
        For `abliterated` |U W| / |U W_original|, what the edit left where it removed something; for `healed`
        |U (W - W_abliterated)| / |U W_original|, what training moved, also where a strength of 0 left the weight
        as it was. None where nothing was removed: an edit that only adds leaves all there was.
    """
    edited = [name for name, removal in edit.removals.items() if not removal.is_void]
    if not edited:
        return None

    def share(part: Tensor, whole: Tensor) -> float:
        return float(part.norm() / whole.norm()) if whole.norm() > 0 else 0.0

    return {
        "abliterated": max(share(left[name], original[name]) for name in edited),
        "healed": max(share(healed[name] - abliterated[name], original[name]) for name in original),
    }


def difference_in_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Contrast,
    batch_size: int,
) -> Tensor:
    """The difference in means of resid_pre between two kinds of prompts: [d_model] in float64.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    target, harmless = (
        _mean(model, tokenizer, part, prompts, batch_size)
        for part in (prompts.target, prompts.harmless)
    )
    found = target - harmless
    if prompts.kept:
        other = _mean(model, tokenizer, prompts.kept, prompts, batch_size) - harmless
        found = found - (found @ other) / (other @ other) * other
    return found


def block(edit: Edit, traces: Mapping[ModelName, Trace], prompts: Contrast | str) -> dict[str, Any]:
    """The block `direction` of results.json."""
    found = residuals(edit, *(traces[name] for name in MODELS))
    return {
        "residual": found["saved"],
        "residual_bfloat16": found["bfloat16"],
        "residual_nf4": found["nf4"],
        "reestimated": reestimated(edit, traces, prompts),
    }


def reestimated(
    edit: Edit, traces: Mapping[ModelName, Trace], prompts: Contrast | str
) -> dict[str, Any]:
    """How the direction that tells the prompts apart now relates to the removed one.

    Returns:
        For each model `cosine` with the direction that was removed (of several, the first, which is the direction
        itself) and `norm_ratio` to the original's difference, or null with a `reason`. The original's cosine says
        how far another estimator or a projection moved the direction before it was removed.
    """
    if isinstance(prompts, str):
        return {**dict.fromkeys(traces), "reason": prompts}
    found: dict[str, Any] = {"reason": None}
    whole = traces["original"].difference
    assert whole is not None
    for name, traced in traces.items():
        difference = traced.difference
        assert difference is not None
        length = float(difference.norm())
        along = float(difference @ edit.direction)
        found[name] = {
            "cosine": along / length if length > 0 else 0.0,
            "norm_ratio": length / float(whole.norm()) if whole.norm() > 0 else 0.0,
        }
    return found


def _mean(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    place: Contrast,
    batch_size: int,
) -> Tensor:
    """Mean resid_pre [d_model] at a place, over prompts that the processes of the launch share."""
    lower = int(place.layer)
    share = place.layer - lower
    upper = math.ceil(place.layer)
    encoded = sorted(chat.encode(tokenizer, prompts), key=lambda ids: (len(ids), ids))
    mine = encoded[distributed.rank() :: distributed.world_size()]
    total = torch.zeros(
        model.config.get_text_config().hidden_size, dtype=torch.float64, device=model.device
    )
    for start in tqdm(
        range(0, len(mine), batch_size),
        desc="residual stream",
        disable=not distributed.is_main(),
        leave=False,
    ):
        ids, mask = chat.pad_left(
            mine[start : start + batch_size], int(tokenizer.pad_token_id), model.device
        )
        streams = residual.read(model, ids, mask, -place.position)[:, :, 0].double()
        total += ((1 - share) * streams[:, lower] + share * streams[:, upper]).sum(dim=0)
    return distributed.sum_over_processes(total).cpu() / len(encoded)
