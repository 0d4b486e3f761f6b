"""The three models of an evaluation, from the folders that the earlier stages left."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from common.lora import merge_adapter
from common.model import load_model
from common.recipe import Recipe
from eval.items import ModelName


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
    return load_merged(upstream["abliteration"] / "model", adapter, recipe.model.dtype)


def load_merged(folder: Path, adapter: Path, dtype: str) -> PreTrainedModel:
    """A model with an adapter merged into its weights.

    Raises:
        StageError: if merging gives weights that are not finite.
    """
    return merge_adapter(load_model(folder, dtype=dtype), adapter)
