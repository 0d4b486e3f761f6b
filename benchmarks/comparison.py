"""Two ways of doing the same, timed in turns within one process, and texts of a known number of tokens for them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Result = TypeVar("Result")


def in_turns(
    ways: Mapping[str, Callable[[], Result]], repeats: int
) -> tuple[dict[str, list[Result]], dict[str, float]]:
    """Run each way as often as the others, every round in the other order.

    Time is the CPU time of the process, which neighbours on a shared machine do not lengthen as they do wall time;
    with one thread on a quiet machine the two are the same.

    Args:
        ways: what is timed, by name.
        repeats: rounds that are timed; one before them warms up.

    Returns:
        What each way gave in every round, the first included, and its median seconds.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[Result]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        for way in ways if number % 2 else reversed(ways):
            began = time.process_time()
            found[way].append(ways[way]())
            if number:
                seconds[way].append(time.process_time() - began)
    return found, {way: median(taken) for way, taken in seconds.items()}


def number_words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers from 3 up to a vocabulary's size, a token each."""
    names = ["<pad>", "<s>", "</s>", *map(str, range(3, vocabulary))]
    words = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
