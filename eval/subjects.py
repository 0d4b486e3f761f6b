"""The three models of an evaluation, from the folders that the earlier stages left."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from common.edits import Edit, component_along, edited_writers
from common.errors import StageError
from common.model import load_model
from common.recipe import Recipe
from eval.items import ModelName

Writes = dict[str, torch.Tensor]


def load_subject(name: ModelName, recipe: Recipe, upstream: Mapping[str, Path]) -> PreTrainedModel:
    """Load one of the three models."""
    if name == "original":
        return load_model(
            recipe.model.name_or_path, revision=recipe.model.revision, dtype=recipe.model.dtype
        )
    if name == "abliterated":
        return load_model(upstream["abliteration"] / "model", dtype=recipe.model.dtype)
    return load_healed(recipe, upstream)


def load_healed(recipe: Recipe, upstream: Mapping[str, Path]) -> PreTrainedModel:
    """The healed model with full weights: the abliterated one with the adapter merged in, or what training saved.

    Raises:
        StageError: if merging gives weights that are not finite.
    """
    adapter = upstream["train"] / "adapter"
    if not adapter.is_dir():
        return load_model(upstream["train"] / "model", dtype=recipe.model.dtype)
    base = load_model(upstream["abliteration"] / "model", dtype=recipe.model.dtype)
    try:
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise StageError(
            f"eval: the adapter in {adapter} cannot be merged ({error}); train again"
        ) from error
    assert isinstance(merged, PreTrainedModel)
    return merged


def writes_along(model: PreTrainedModel, edit: Edit) -> Writes:
    """What each writer of a model writes along the vectors that an edit names for it: U W in float64."""
    return {
        name: component_along(writer.weight, edit.basis(name), writer.layout).cpu()
        for name, writer in edited_writers(model, edit).items()
    }


def residual(
    edit: Edit, original: Writes, abliterated: Writes, healed: Writes
) -> dict[str, float] | None:
    """How much of the removed vectors is written again, as the largest share of what the original wrote.

    Args:
        edit: what was removed from which writer.
        original: what the original writes along it, by writer.
        abliterated: the same of the abliterated model.
        healed: the same of the healed model.

    Returns:
        For `abliterated` |U W| / |U W_original|, what the edit left where it removed something; for `healed`
        |U (W - W_abliterated)| / |U W_original|, what training moved, also where a strength of 0 left the weight
        as it was. None where nothing was removed: an edit that only adds leaves all there was.
    """
    edited = [name for name, removal in edit.removals.items() if not removal.is_void]
    if not edited:
        return None

    def share(part: torch.Tensor, whole: torch.Tensor) -> float:
        return float(part.norm() / whole.norm()) if whole.norm() > 0 else 0.0

    return {
        "abliterated": max(share(abliterated[name], original[name]) for name in edited),
        "healed": max(share(healed[name] - abliterated[name], original[name]) for name in original),
    }
