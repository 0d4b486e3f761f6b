"""The prompts of stage one: those that directions are estimated from, and those that choose among them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import InputError
from common.prompts import check_prompts, describe, load_prompts
from common.recipe import PromptSource, Recipe


@dataclass(frozen=True)
class PromptSet:
    """Prompts of three kinds.

    Attributes:
        harmful: prompts that the model refuses.
        harmless: prompts that it answers.
        falsely_refused: harmless prompts that it refuses; given, only their refusal is to go.
    """

    harmful: list[str]
    harmless: list[str]
    falsely_refused: list[str] | None = None

    @property
    def target(self) -> list[str]:
        """The prompts whose refusal is to go."""
        return self.harmful if self.falsely_refused is None else self.falsely_refused

    @property
    def kept(self) -> list[str]:
        """The prompts whose refusal is to stay."""
        return [] if self.falsely_refused is None else self.harmful

    def all(self) -> list[str]:
        """Every prompt."""
        return [*self.harmful, *self.harmless, *(self.falsely_refused or [])]


def load_prompt_sets(recipe: Recipe) -> tuple[PromptSet, PromptSet]:
    """The prompts to estimate from, and those held out to choose by.

    Raises:
        InputError: if a source is unusable, or nothing is left to estimate from.
    """
    prompts = recipe.abliteration.prompts
    sources = {"harmful": prompts.harmful, "harmless": prompts.harmless}
    if prompts.falsely_refused is not None:
        sources["falsely_refused"] = prompts.falsely_refused
    loaded = {kind: load_prompts(source) for kind, source in sources.items()}
    if not isinstance(prompts.validation, int):
        held = {
            kind: load_prompts(source)
            for kind in sources
            if isinstance(source := getattr(prompts.validation, kind), PromptSource)
        }
        return PromptSet(**loaded), PromptSet(**held)
    split = {
        kind: _hold_out(loaded[kind], prompts.validation, recipe.seed, source)
        for kind, source in sources.items()
    }
    return (
        PromptSet(**{kind: rest for kind, (rest, _) in split.items()}),
        PromptSet(**{kind: held for kind, (_, held) in split.items()}),
    )


def sample(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """Some of the prompts, drawn from all of them: a file may hold one kind after another."""
    return random.Random(seed).sample(list(prompts), min(count, len(prompts)))  # no secret


def prompt_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the sources, found without a model: `dotted key: problem`."""
    prompts, key = recipe.abliteration.prompts, "abliteration.prompts"
    places = [(key, prompts)]
    if not isinstance(prompts.validation, int):
        places.append((f"{key}.validation", prompts.validation))  # type: ignore[arg-type]  # the same three keys
    problems = [
        problem
        for place, owner in places
        for kind in ("harmful", "harmless", "falsely_refused")
        if isinstance(source := getattr(owner, kind), PromptSource)
        for problem in check_prompts(source, f"{place}.{kind}")
    ]
    if problems:
        return problems
    try:
        load_prompt_sets(recipe)
    except InputError as error:
        return [f"{key}.validation: {error}"]
    return []


def _hold_out(
    prompts: list[str], count: int, seed: int, source: PromptSource
) -> tuple[list[str], list[str]]:
    # A prompt that is there twice must not come out on both sides.
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) <= count:
        raise InputError(
            f"{describe(source)} holds {len(prompts)} prompts, of which {count} "
            "would be held out; nothing is left to estimate from: give more prompts, or hold out fewer"
        )
    shuffled = random.Random(seed).sample(prompts, len(prompts))  # no secret
    return shuffled[count:], shuffled[:count]
