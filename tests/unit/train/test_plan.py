"""The plan knows a model's depth and memory from its configuration alone, whatever its family.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_plan.py
"""

import pytest
from transformers import AutoConfig

from common.recipe import Recipe
from train import plan


@pytest.fixture
def recipe_for(tokenizer, build_model, tmp_path):
    """Make a model folder without weights, and a recipe that heals it; gives the model too."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def make(family, adapter):
        model = build_model(family)
        model.config.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        source = {"path": str(prompts)}
        panel = {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
        recipe = Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": str(tmp_path / family), "dtype": "float32"},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {
                    "preferences": [{"name": "on_policy", "prompts": source}],
                    "global_batch_size": 1,
                    "adapter": adapter,
                    "trainer": {"max_length": 1},
                },
                "eval": {"benchmarks": [panel]},
            }
        )
        return recipe, model

    return make


FAMILIES = ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma3", "llava", "qwen2_5_vl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_made_without_weights(family, recipe_for):
    recipe, _ = recipe_for(family, {"r": 2})
    lines = plan.plan_lines(recipe, [("train", False, "0" * 64)])
    assert any("candidates    3 layers x 4 positions" in line for line in lines)
    assert any(line.startswith("  memory        about 0.0") for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_that_of_the_models_own_parameters(family, recipe_for):
    recipe, model = recipe_for(family, None)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    activations = plan.ACTIVATION_NUMBERS * 2 * 32 * 3  # a pair of one token, 3 layers 32 wide
    expected = (4 + plan.TRAINED_BYTES_PER_PARAMETER) * numbers + 4 * activations
    assert plan.memory_bytes(recipe) == expected
    adapted, _ = recipe_for(family, {"r": 2})
    assert 4 * numbers < plan.memory_bytes(adapted) < expected


def test_the_width_of_a_number_is_the_checkpoints_own_where_the_recipe_says_auto(recipe_for):
    recipe, _ = recipe_for("llava", None)
    wide = plan.memory_bytes(recipe)
    folder = recipe.model.name_or_path
    config = AutoConfig.from_pretrained(folder)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    auto = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "auto"})})
    assert plan.memory_bytes(auto) < wide
