"""Pairs that the models make: chosen is the original's greedy answer, rejected the abliterated model's sample.

The teacher is the undamaged original, so the pairs say what the edit broke and nothing else; no outside data, no
licence, any language. Only for prompts that the original does not refuse: its refusals are dropped.
"""

from collections.abc import Sequence

from common import artifacts
from common.prompts import check_prompts, load_prompts
from common.recipe import OnPolicy
from train.preferences.filters import Pair

NAME = "on_policy"


def check(source: OnPolicy, key: str) -> list[str]:
    """Problems of the prompts, in words that begin with their dotted key."""
    return check_prompts(source.prompts, f"{key}.prompts")


def inputs(
    source: OnPolicy, excluded: frozenset[str]
) -> dict[str, object]:  # overlap is an error here
    """What the pairs depend on besides the two models."""
    return {
        **source.model_dump(mode="json", exclude={"prompts", "batch_size"}),
        "prompts": artifacts.hash_data(load_prompts(source.prompts)),
    }


def prompts_used(source: OnPolicy) -> list[str]:
    """The prompts, for the overlap check against the benchmarks."""
    return load_prompts(source.prompts)


def pair(prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> list[Pair]:
    """Join the two models' answers.

    Args:
        prompts: the user's turns.
        chosen: the original's answers.
        rejected: the abliterated model's answers.
    """
    return [
        Pair((("user", prompt),), better, worse, NAME)
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]
