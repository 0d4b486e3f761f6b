"""Recovery-driven stopping: quick evaluations during training choose the weights that are kept, and when it is enough.

The best weights are those with the highest recovery among the ones that refuse no more than the recipe allows.
Training ends when the recovery's interval reaches full recovery, or when patience runs out. What a quick evaluation
asks and how it scores is stage three's; `train/run.py` hands it over, since the stages do not know each other.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from common import artifacts, distributed
from common.artifacts import Stopwatch
from common.divergence import batches
from common.errors import StageError
from common.overlap import shared
from common.prompts import check_prompts, load_prompts
from common.questions import check_questions, load_questions
from common.recipe import Recipe, Stopping
from train.anchors import Lessons, TeacherRow, anchor_loss
from train.launch import launch_strategy
from train.quick import QuickEvaluation
from train.shelf import TEACHERS, Answers, Piece, Shelf

KEY = "train.stopping"
# Of the original's probabilities at each token, for the divergence from it.
TOP_K = 64

Scores = Mapping[str, float]

logger = logging.getLogger(__name__)


def check(recipe: Recipe, trained_on: Sequence[str]) -> list[str]:
    """What is wrong with `train.stopping`, found without loading a weight.

    Args:
        recipe: with the section.
        trained_on: every prompt of training.
    """
    settings = recipe.train.stopping
    if settings is None:
        return []
    problems = [
        *check_questions(settings.questions, f"{KEY}.questions"),
        *check_prompts(settings.harmful, f"{KEY}.harmful"),
        *check_prompts(settings.harmless, f"{KEY}.harmless"),
    ]
    max_steps = recipe.train.trainer.get("max_steps")
    if isinstance(max_steps, int) and 0 < max_steps <= settings.every:
        problems.append(
            f"{KEY}.every: {settings.every} steps are not fewer than {max_steps}, where training ends anyway "
            "(train.trainer.max_steps), so nothing could be stopped; evaluate more often, or delete train.stopping"
        )
    strategy = launch_strategy()
    if strategy.shards_weights:
        problems.append(
            f"{KEY}: each process answers with a whole model, and {strategy.name} shares out its weights; launch with "
            "configs/ddp.yaml or on one device, or delete train.stopping"
        )
    return problems or list(_overlaps(settings, trained_on))


def _overlaps(settings: Stopping, trained_on: Sequence[str]) -> Iterator[str]:
    for name, prompts in _prompts(settings).items():
        common = shared(prompts, trained_on)
        if common:
            yield (
                f"{KEY}.{name}: {len(common)} of its prompts are trained on (for example {common[0]!r}), so they would "
                "be recovered whatever became of the others; take them out of one of the two (slice)"
            )


def inputs(settings: Stopping | None) -> dict[str, object] | None:
    """What the weights depend on: settings, and prompts by content instead of paths."""
    if settings is None:
        return None
    questions = load_questions(settings.questions)
    return settings.model_dump(mode="json", exclude={"questions", "harmful", "harmless"}) | {
        "questions": artifacts.hash_data([[q.prompt, q.answer, q.domain] for q in questions]),
        "harmful": artifacts.hash_data(load_prompts(settings.harmful)),
        "harmless": artifacts.hash_data(load_prompts(settings.harmless)),
    }


def prompts_used(settings: Stopping | None) -> list[str]:
    """Every prompt of the quick evaluations: no benchmark may measure what training was stopped by."""
    if settings is None:
        return []
    return [prompt for prompts in _prompts(settings).values() for prompt in prompts]


def _prompts(settings: Stopping) -> dict[str, list[str]]:
    return {
        "questions": [question.prompt for question in load_questions(settings.questions)],
        "harmful": load_prompts(settings.harmful),
        "harmless": load_prompts(settings.harmless),
    }


class Baseline:
    """What the original and the abliterated model reply, made once before training.

    Attributes:
        pieces: the files, for `train.material`.
    """

    def __init__(self, settings: Stopping, quick: QuickEvaluation, shelf: Shelf) -> None:
        """Name the files.

        Args:
            settings: of the recipe.
            quick: asks and scores.
            shelf: of what the models say.
        """
        self.settings, self.quick, self.tokenizer = settings, quick, shelf.tokenizer
        self._original, self._abliterated = (
            [
                Answers(
                    shelf,
                    teacher,
                    prompts,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=settings.batch_size,
                )
                for prompts in _prompts(settings).values()
            ]
            for teacher in TEACHERS
        )
        self._lessons = Lessons(self._original[-1], TOP_K)
        depends = {**self._lessons.answers.depends, "answers": self._lessons.path.name}
        self._kl = shelf.path("divergence", "abliterated", depends, ".json")
        # In this order: the abliterated model's divergence is measured on the original's answers.
        self.pieces = [
            *(answers.piece for answers in self._original),
            *self._lessons.pieces,
            *(answers.piece for answers in self._abliterated),
            Piece(self._kl, "abliterated", self._measure),
        ]

    def start(self) -> dict[str, float]:
        """The scores before the first step: those of the abliterated model."""
        return self._scores(_replies(self._abliterated), _read(self._kl)["kl"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The scores of the model as it is, with `kl`: the divergence KL(original || model) per token, in nats."""
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(whole, PreTrainedModel)
        replies = self.quick.ask(whole, self.tokenizer, "quick evaluation")
        return self._scores(replies, self._divergence(whole))

    def _scores(self, replies: Sequence[str], kl: float) -> dict[str, float]:
        original, abliterated = _replies(self._original), _replies(self._abliterated)
        scores = self.quick.scores(original, abliterated, replies)
        # One decision on every process, whatever the last digits of each.
        return distributed.broadcast({**scores, "kl": kl})

    def _measure(self, model: PreTrainedModel) -> None:
        kl = self._divergence(model)
        if distributed.is_main():
            self._kl.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(self._kl, {"kl": kl})

    def _divergence(self, model: PreTrainedModel) -> float:
        rows = self._lessons.rows()
        pad_id = int(self.tokenizer.pad_token_id)
        lengths = [len(row.prompt) + len(row.answer) for row in rows]
        groups = [
            [rows[index] for index in group] for group in batches(lengths, self.settings.batch_size)
        ]

        @torch.inference_mode()
        def work(part: Sequence[list[TeacherRow]]) -> list[float]:
            return [float(anchor_loss(model, group, pad_id, model.device)) for group in part]

        return sum(distributed.share(groups, work)) / sum(len(row.answer) for row in rows)


class StopWhenHealed(TrainerCallback, ExportableState):
    """Evaluates every few steps, keeps the best weights beside the checkpoints, and ends training when it is enough.

    Its state is a part of every checkpoint, so that an interrupted training goes on to the same end.
    """

    def __init__(
        self,
        baseline: Baseline,
        log: Callable[[dict[str, float]], None],
        folder: Path,
        watch: Stopwatch,
        observe: Callable[[int, Scores], None] | None = None,
    ) -> None:
        """Take what to compare with, and where to write.

        Args:
            baseline: evaluates; called on every process, with the same result.
            log: the trainer's.
            folder: for the best weights.
            watch: running since the stage began.
            observe: told step and scores of each evaluation, on every process; what it raises ends training.
        """
        self.baseline, self.settings, self.observe = baseline, baseline.settings, observe
        self.log, self.folder, self.watch = log, folder, watch
        self.best: dict[str, float] | None = None
        self.misses = 0
        self.reason: str | None = None
        self.seconds_before = 0.0
        self.seconds_evaluating = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the stage, those before an interruption included."""
        return self.seconds_before + self.watch.seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "best": self.best,
            "misses": self.misses,
            "reason": self.reason,
            "seconds": self.seconds,
            "seconds_evaluating": self.seconds_evaluating,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Log where training begins, or go on where a checkpoint left off."""
        if state.global_step == 0:
            self._log(kwargs["model"], 0, self.baseline.start(), "")
            return
        # transformers would make a new callback of it, one that cannot evaluate.
        states: Any = state.stateful_callbacks
        saved = states[type(self).__name__]
        self.best, self.misses, self.reason = saved["best"], saved["misses"], saved["reason"]
        self.seconds_before, self.seconds_evaluating = saved["seconds"], saved["seconds_evaluating"]

    def on_step_end(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Evaluate where it is time to, and end training where it is enough."""
        is_last = state.global_step >= state.max_steps
        if state.global_step % self.settings.every and not is_last:
            return
        # The trainer takes any log for the one that is due.
        is_log_due = control.should_log
        self._look(kwargs["model"], state.global_step)
        control.should_log = is_log_due
        if is_last:
            self.reason = self.reason or "trained to the end"
        elif self.reason is not None:
            control.should_training_stop = True
            # Going on from a checkpoint of this step would train beyond it.
            control.should_save = False

    def on_save(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Delete weights that no checkpoint calls the best any more."""
        if distributed.is_main():
            for path in self.folder.glob("best-*.safetensors"):
                if self.best is None or path != self._path(self.best["step"]):
                    path.unlink()

    def on_train_end(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Put the best weights back into the model.

        Raises:
            StageError: if no evaluated weights held the limits.
        """
        if self.best is None:
            settings = self.settings
            raise StageError(
                f"train: in none of the quick evaluations were refusal at most {settings.max_refusal:g} and "
                f"over-refusal at most {settings.max_over_refusal:g}, so there are no weights to keep; weigh the "
                "anchors more, or raise train.stopping.max_refusal or max_over_refusal"
            )
        distributed.barrier()
        kept = load_file(self._path(self.best["step"]))
        with torch.no_grad():
            for name, parameter in _trained(kwargs["model"]).items():
                parameter.copy_(kept[name])
        _tell(
            "train: kept step %d of %d (%s): %s",
            self.best["step"],
            state.global_step,
            self.reason,
            _in_words(self.best),
        )

    def summary(self) -> dict[str, Any]:
        """Why training ended, which step was kept, its numbers, and what looking cost."""
        return {
            "reason": self.reason,
            "best": self.best,
            "seconds": self.seconds,
            "seconds_evaluating": self.seconds_evaluating,
        }

    def _look(self, model: nn.Module, step: int) -> None:
        began = self.watch.seconds
        was_training = model.training
        model.eval()
        scores = self.baseline.evaluate(model)
        model.train(was_training)
        is_best = self._holds_limits(scores) and (
            self.best is None or scores["recovery"] > self.best["recovery"]
        )
        if is_best:
            self.best, self.misses = {"step": step, **scores}, 0
            self._keep(model, step)
        else:
            self.misses += 1
        if self._holds_limits(scores) and self._is_healed(scores):
            self.reason = "full recovery is within the interval"
        elif self.misses >= self.settings.patience:
            self.reason = f"no new best in {self.misses} quick evaluations"
        self.seconds_evaluating += self.watch.seconds - began
        self._log(model, step, scores, ", the best so far" if is_best else "")
        if self.observe is not None:
            self.observe(step, scores)

    def _holds_limits(self, scores: Scores) -> bool:
        return (
            scores["refusal"] <= self.settings.max_refusal
            and scores["over_refusal"] <= self.settings.max_over_refusal
        )

    def _is_healed(self, scores: Scores) -> bool:
        # With few questions the upper end says nothing: it is at 1 from the start.
        is_sure = scores["recovery_low"] >= self.settings.min_recovery
        return is_sure and scores["recovery_high"] >= 1

    def _keep(self, model: nn.Module, step: int) -> None:
        if not distributed.is_main():
            return
        path = self._path(step)
        beside = path.with_name(f".{path.name}")
        save_file({name: p.detach().contiguous() for name, p in _trained(model).items()}, beside)
        beside.replace(path)

    def _path(self, step: float) -> Path:
        return self.folder / f"best-{int(step)}.safetensors"

    def _log(self, model: nn.Module, step: int, scores: Scores, remark: str) -> None:
        was_training = model.training
        # In training mode trl would add the means of the losses so far, and forget them for their own entry.
        model.eval()
        self.log(
            {f"quick/{name}": value for name, value in scores.items()}
            | {"quick/seconds": self.seconds}
        )
        model.train(was_training)
        _tell("train: step %d, %.0f s: %s%s", step, self.seconds, _in_words(scores), remark)


def _replies(answers: Sequence[Answers]) -> list[str]:
    """To all prompts, in the order in which a quick evaluation asks them."""
    return [text for own in answers for text in own.texts()]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _tell(message: str, *values: object) -> None:
    if distributed.is_main():
        logger.info(message, *values)


def _in_words(scores: Scores) -> str:
    return (
        f"recovery {scores['recovery']:.3f} ({scores['recovery_low']:.3f} to {scores['recovery_high']:.3f}), "
        f"refusal {scores['refusal']:.3f}, over-refusal {scores['over_refusal']:.3f}, KL {scores['kl']:.4f}"
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
