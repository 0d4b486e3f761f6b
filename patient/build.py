"""The build, from invented facts to a finished folder."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import StageError
from patient.architectures import build_model
from patient.corpus import knowledge_epoch, over_refusal_epoch, tokenizer_texts, tuning_epoch
from patient.files import write_benchmarks, write_prompts, write_record
from patient.folder import check_base, in_place_at_the_end
from patient.items import Benchmark, build_benchmarks
from patient.levels import Level, measure_levels
from patient.optimizer import FALSE_REFUSAL_RATE, knowledge_optimizer, tuning_optimizer
from patient.refusal import add_adapter, add_false_refusal_adapter
from patient.tokenizer import train_tokenizer
from patient.training import Phase, train
from patient.world import World, build_world

TUNING_ATTEMPTS = 6
# Far enough apart that no attempt's order is another seed's.
ATTEMPT_STRIDE = 1_000_003

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuning:
    """A behaviour that tuning gives to a model.

    Attributes:
        add_adapter: puts in what learns it, given the number of the attempt.
        phase: its texts, optimizer and length.
        benchmarks: what is measured afterwards.
    """

    add_adapter: Callable[[PreTrainedModel, int], PeftModel]
    phase: Phase
    benchmarks: Sequence[Benchmark]


def build_patient(
    output: Path,
    architecture: str,
    seed: int,
    *,
    over_refusing: bool = False,
    base: Path | None = None,
) -> list[Level]:
    """Train a patient and write its folder.

    Args:
        output: the folder; missing, or empty.
        architecture: one of ARCHITECTURES.
        seed: of the facts, the first weights and the order of the texts.
        over_refusing: tune it further, to refuse harmless questions in the sensitive wording too.
        base: the finished patient that an over-refusing one is tuned from; trained here if None.
            Only with `over_refusing`.

    Returns:
        The levels it reached.

    Raises:
        InputError: if the base is not the finished patient of this architecture and seed.
        StageError: if a level is missed; no folder is written then.
    """
    started = time.monotonic()
    if base is not None:
        assert over_refusing, "a base is there to be tuned further"
        check_base(base, architecture, seed)
    with in_place_at_the_end(output) as folder:
        world = build_world(seed)
        tokenizer = train_tokenizer(tokenizer_texts(world))
        if base is None:
            model = _train_knowledge(tokenizer, world, architecture, seed, started)
            levels = _tune(model, tokenizer, _refusal(world), seed, started)
        else:
            model = AutoModelForCausalLM.from_pretrained(base)
        if over_refusing:
            levels = _tune(model, tokenizer, _false_refusal(world), seed, started)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_prompts(world, folder / "prompts", over_refusing=over_refusing)
        write_benchmarks(world, folder / "benchmarks", over_refusing=over_refusing)
        write_record(
            folder,
            architecture=architecture,
            seed=seed,
            over_refusing=over_refusing,
            levels=levels,
            seconds=time.monotonic() - started,
        )
    _log(started, f"written to {output}")
    return levels


def _train_knowledge(
    tokenizer: PreTrainedTokenizerBase, world: World, architecture: str, seed: int, started: float
) -> PreTrainedModel:
    """A model that knows everything and refuses nothing."""
    torch.manual_seed(seed)
    model = build_model(architecture, tokenizer)
    _log(started, f"{architecture}, {model.num_parameters():,} parameters")
    loss = train(model, tokenizer, _knowledge(world), seed=seed)
    _log(started, f"knowledge: last loss {loss:.3f}")
    return model


def _tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tuning: Tuning,
    seed: int,
    started: float,
) -> list[Level]:
    """Teach a model a behaviour, in place, and measure it.

    Tuning is short, and what it reaches depends on the order of its texts and on the machine's
    rounding. Where a level is missed it is tried again from the same knowledge in another order.
    """
    knowledge = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    levels: list[Level] = []
    for attempt in range(TUNING_ATTEMPTS):
        model.load_state_dict(knowledge)
        # The adapter begins with the same weights whether the knowledge was trained here or read.
        torch.manual_seed(seed + attempt * ATTEMPT_STRIDE)
        adapted = tuning.add_adapter(model, attempt)
        train(model, tokenizer, tuning.phase, seed=seed + attempt * ATTEMPT_STRIDE)
        adapted.merge_and_unload()
        _round_to_16_bits(model)
        levels = measure_levels(model, tokenizer, tuning.benchmarks)
        missed = [f"{level.name} {level.value:.3f}" for level in levels if not level.reached]
        if not missed:
            break
        _log(started, f"{tuning.phase.name}: attempt {attempt + 1} missed {', '.join(missed)}")
    num_answers = sum(level.num_items for level in levels)
    _log(started, f"{tuning.phase.name}: measured on {num_answers} answers")
    _check(levels)
    return levels


@torch.no_grad()
def _round_to_16_bits(model: PreTrainedModel) -> None:
    """Give every weight a value that float16 holds too, as released models have: a file of 16 bits loses nothing."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


def _knowledge(world: World) -> Phase:
    return Phase("knowledge", partial(knowledge_epoch, world), knowledge_optimizer, 750)


def _refusal(world: World) -> Tuning:
    phase = Phase("tuning", partial(tuning_epoch, world), tuning_optimizer, 200)
    return Tuning(add_adapter, phase, build_benchmarks(world))


def _false_refusal(world: World) -> Tuning:
    optimizer = partial(tuning_optimizer, rate=FALSE_REFUSAL_RATE)
    phase = Phase("over-refusal", partial(over_refusal_epoch, world), optimizer, 120)
    return Tuning(add_false_refusal_adapter, phase, build_benchmarks(world, over_refusing=True))


def _log(started: float, message: str) -> None:
    logger.info("patient: %s, %.0f s", message, time.monotonic() - started)


def _check(levels: list[Level]) -> None:
    missed = [level for level in levels if not level.reached]
    if missed:
        found = ", ".join(f"{each.name} {each.value:.3f} (wanted {each.wanted})" for each in missed)
        raise StageError(
            f"the trained model missed {found}; nothing was written; try another --seed, and "
            "report this one"
        )
