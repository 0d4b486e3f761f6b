"""The settings of the small trainings that the tests of stage two run."""

from pathlib import Path
from typing import Any

from trl import DPOConfig


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
