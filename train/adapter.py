"""The LoRA adapter: peft's LoraConfig by its own names, with this project's defaults."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, TaskType

# Every linear layer, as the Daredevil recipe trained them; peft leaves the unembedding out by itself.
DEFAULT_TARGETS = "all-linear"


def build_adapter(block: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig of a recipe's `train.adapter` block, which `train.settings.check_adapter` has checked."""
    settings = {"target_modules": DEFAULT_TARGETS, **block}
    if "target_parameters" in block and "target_modules" not in block:
        settings.pop("target_modules")
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **settings)
