"""Flips: counted so that they account for the accuracies.

Run: python -m pytest tests/unit/eval/test_flips.py
"""

import itertools

import numpy as np

from eval import flips
from eval.comparison import Answers


def answers(rows: np.ndarray) -> Answers:
    return Answers(rows[:, 0], rows[:, 1], rows[:, 2], np.arange(len(rows)))


def test_every_kind_of_item_is_counted_where_it_belongs() -> None:
    # As many items of each kind as its place in the list, so that no two counts can be confused.
    kinds = list(itertools.product((0.0, 1.0), repeat=3))
    rows = np.array([kind for count, kind in enumerate(kinds, start=1) for _ in range(count)])
    number = {kind: count for count, kind in enumerate(kinds, start=1)}
    assert flips.count(answers(rows)) == {
        "broken": number[1, 0, 0] + number[1, 0, 1],
        "fixed": number[1, 0, 1],
        "still_broken": number[1, 0, 0],
        "newly_broken": number[1, 1, 0],
        "unlocked": number[0, 1, 0] + number[0, 1, 1],
        "newly_right": number[0, 0, 1] + number[0, 1, 1],
    }


def test_counts_account_for_the_accuracies_of_any_answers() -> None:
    rows = np.random.default_rng(0).integers(0, 2, size=(500, 3)).astype(float)
    found = flips.count(answers(rows))
    original, abliterated, healed = rows.sum(axis=0).astype(int)
    assert found["broken"] == found["fixed"] + found["still_broken"]
    assert abliterated == original - found["broken"] + found["unlocked"]
    lost = found["still_broken"] + found["newly_broken"]
    assert healed == original - lost + found["newly_right"]


def test_graded_values_do_not_flip() -> None:
    assert flips.count(answers(np.array([[1.0, 0.5, 1.0], [1.0, 0.0, 1.0]]))) is None


def test_an_item_that_changed_has_a_word_and_no_other_has() -> None:
    changes = {kind: flips.change(*kind) for kind in itertools.product((0.0, 1.0), repeat=3)}
    assert changes[1, 0, 1] == "fixed"
    assert changes[1, 0, 0] == "still broken"
    assert changes[1, 1, 0] == "newly broken"
    assert changes[0, 0, 0] == changes[1, 1, 1] == ""
    assert len(set(changes.values())) == 7
