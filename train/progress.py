"""The training bar: steps and time left, without trl's dictionary of metrics at every logging step."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class StepBar(ProgressCallback):
    """transformers' bar; the metrics go to the log file and to wandb."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,  # noqa: ANN401  # the callback's signature
    ) -> None:
        """Print nothing."""
