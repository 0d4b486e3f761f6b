"""The settings of the small trainings that the tests of stage two run, and what their teachers say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from common.generation import generate
from train.anchors import TeacherRow, teach
from train.shelf import Shelf
from train.streams import Sketch


def settings_of(folder: Path, **changes: Any) -> DPOConfig:
    """Trl's settings for a few steps on the CPU, in float32, with everything logged and nothing saved."""
    return DPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "precompute_ref_log_probs": True,
            "disable_tqdm": True,
            "seed": 0,
            **changes,
        }
    )


def shelf_in(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Shelf:
    """The shelf of two models that are called by names instead of contents."""
    return Shelf(folder, {"original": "one", "abliterated": "other"}, tokenizer)


def taught(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    top_k: int,
    max_new_tokens: int,
    batch_size: int,
    sketch: Sketch | None = None,
) -> list[TeacherRow]:
    """A teacher's rows over the answers that it gives now."""
    answers = generate(
        teacher, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return teach(
        teacher,
        tokenizer,
        prompts,
        answers,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        batch_size=batch_size,
        sketch=sketch,
    )
