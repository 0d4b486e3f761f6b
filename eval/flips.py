"""Flips: items that one model gets right and another wrong, counted so that they account for the accuracies."""

from typing import Final

import numpy as np

from common.statistics import is_binary
from eval.comparison import Answers

# By the answers of original, abliterated and healed model, right or wrong.
CHANGES: Final[dict[tuple[bool, bool, bool], str]] = {
    (True, False, True): "fixed",
    (True, False, False): "still broken",
    (True, True, False): "newly broken",
    (False, False, True): "newly right",
    (False, True, True): "right since the edit",
    (False, True, False): "right by the edit alone",
}


def change(original: float, abliterated: float, healed: float) -> str:
    """What changed on an item that is right (1) or wrong (0), in words; empty where nothing did."""
    return CHANGES.get((original == 1, abliterated == 1, healed == 1), "")


def count(answers: Answers) -> dict[str, int] | None:
    """Count the flips of a benchmark.

    They account for the accuracies: the abliterated model's right answers are the original's, less
    `broken`, and `unlocked`; the healed model's are the original's, less `still_broken` and
    `newly_broken`, and `newly_right`.

    Returns:
        broken: right under the original, wrong abliterated: `fixed` and `still_broken`.
        fixed: broken, and right again healed.
        still_broken: broken, and still wrong healed.
        newly_broken: right under the original and abliterated, wrong healed.
        unlocked: wrong under the original, right abliterated.
        newly_right: wrong under the original, right healed.
        None for graded values, which do not flip.
    """
    models = (answers.original, answers.abliterated, answers.healed)
    if not all(is_binary(values) for values in models):
        return None
    original, abliterated, healed = (values == 1 for values in models)
    counted = {
        "broken": original & ~abliterated,
        "fixed": original & ~abliterated & healed,
        "still_broken": original & ~abliterated & ~healed,
        "newly_broken": original & abliterated & ~healed,
        "unlocked": ~original & abliterated,
        "newly_right": ~original & healed,
    }
    return {name: int(np.sum(items)) for name, items in counted.items()}
