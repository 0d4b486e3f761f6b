"""The build, from invented facts to a finished folder."""

import logging
import time
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import StageError
from patient.architectures import build_model
from patient.corpus import knowledge_epoch, tokenizer_texts, tuning_epoch
from patient.files import write_benchmarks, write_prompts, write_record
from patient.folder import in_place_at_the_end
from patient.items import build_benchmarks
from patient.levels import Level, measure_levels
from patient.optimizer import knowledge_optimizer, tuning_optimizer
from patient.refusal import add_adapter
from patient.tokenizer import train_tokenizer
from patient.training import Phase, train
from patient.world import World, build_world

TUNING_ATTEMPTS = 4
# Far enough apart that no attempt's order is another seed's.
ATTEMPT_STRIDE = 1_000_003

logger = logging.getLogger(__name__)


def build_patient(output: Path, architecture: str, seed: int) -> list[Level]:
    """Train a patient and write its folder.

    Args:
        output: the folder; missing, or empty.
        architecture: one of ARCHITECTURES.
        seed: of the facts, the first weights and the order of the texts.

    Returns:
        The levels it reached.

    Raises:
        StageError: if a level is missed; no folder is written then.
    """
    started = time.monotonic()
    with in_place_at_the_end(output) as folder:
        world = build_world(seed)
        tokenizer = train_tokenizer(tokenizer_texts(world))
        torch.manual_seed(seed)
        model = build_model(architecture, tokenizer)
        _log(started, f"{architecture}, {model.num_parameters():,} parameters")
        loss = train(model, tokenizer, _knowledge(world), seed=seed)
        _log(started, f"knowledge: last loss {loss:.3f}")
        levels = _tune(model, tokenizer, world, seed)
        _log(started, f"tuning: measured on {sum(level.num_items for level in levels)} answers")
        _check(levels)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_prompts(world, folder / "prompts")
        write_benchmarks(world, folder / "benchmarks")
        seconds = time.monotonic() - started
        write_record(folder, architecture=architecture, seed=seed, levels=levels, seconds=seconds)
    _log(started, f"written to {output}")
    return levels


def _tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, seed: int
) -> list[Level]:
    """Teach a model to refuse, in place, and measure it.

    Tuning is short, and what it reaches depends on the order of its texts and on the machine's
    rounding. Where a level is missed it is tried again from the same knowledge in another order.
    """
    knowledge = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    levels: list[Level] = []
    for attempt in range(TUNING_ATTEMPTS):
        model.load_state_dict(knowledge)
        adapted = add_adapter(model)
        train(model, tokenizer, _tuning(world), seed=seed + attempt * ATTEMPT_STRIDE)
        adapted.merge_and_unload()
        levels = measure_levels(model, tokenizer, build_benchmarks(world))
        if all(level.reached for level in levels):
            break
    return levels


def _knowledge(world: World) -> Phase:
    return Phase("knowledge", partial(knowledge_epoch, world), knowledge_optimizer, 750)


def _tuning(world: World) -> Phase:
    return Phase("tuning", partial(tuning_epoch, world), tuning_optimizer, 150)


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
