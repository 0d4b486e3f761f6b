"""The front, the best, and what confirmation takes back, on planted trials.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_study_choice.py
"""

import itertools

import pytest

from common.recipe import Limit
from train.study_choice import (
    Record,
    closest,
    curse,
    front,
    mean_of,
    missed,
    ranking,
    savings,
    violation,
)

UP, DOWN = {"a": "maximize"}, {"a": "minimize"}
BOTH = {"a": "maximize", "b": "minimize"}


def trial(number, feasible=True, state="complete", **values):
    return Record(number, state, values=values, feasible=feasible)


def test_the_front_is_what_nothing_within_the_limits_beats():
    trials = [
        trial(0, a=0.9, b=0.5),
        trial(1, a=0.8, b=0.2),
        trial(2, a=0.7, b=0.3),  # worse than 1 in both
        trial(3, feasible=False, a=1.0, b=0.0),
        trial(4, state="failed"),
        trial(5, a=0.9, b=0.5),  # as good as 0
    ]
    assert [record.number for record in front(trials, BOTH)] == [0, 1, 5]


def test_the_front_is_the_same_in_whatever_order_the_trials_stand():
    trials = [trial(n, a=a, b=b) for n, (a, b) in enumerate([(1, 1), (2, 2), (0, 3), (2, 1.5)])]
    expected = {record.number for record in front(trials, BOTH)}
    for order in itertools.permutations(trials):
        assert {record.number for record in front(order, BOTH)} == expected


def test_the_best_has_the_best_value_and_ties_go_to_the_earlier():
    trials = [trial(0, a=0.3), trial(1, a=0.9), trial(2, a=0.9), trial(3, feasible=False, a=2.0)]
    assert [record.number for record in ranking(trials, UP)] == [1, 2, 0]
    assert ranking(trials, DOWN)[0].number == 0


def test_the_best_of_two_objectives_is_on_the_front_and_near_the_best_of_both():
    trials = [trial(0, a=1.0, b=1.0), trial(1, a=0.0, b=0.0), trial(2, a=0.8, b=0.2)]
    assert ranking(trials, BOTH)[0].number == 2


def test_without_a_trial_within_the_limits_the_nearest_is_told():
    trials = [
        Record(0, "complete", values={"a": 0.9}, missed=("x", "y")),
        Record(1, "complete", values={"a": 0.2}, missed=("x",)),
        Record(2, "complete", values={"a": 0.3}, missed=("y",)),
    ]
    nearest = closest(trials, UP)
    assert nearest is not None
    assert nearest.number == 2
    assert ranking(trials, UP) == []
    assert closest([], UP) is None


@pytest.mark.parametrize(
    ("value", "limit", "sign"),
    [(0.02, Limit(max=0.02), 0), (0.03, Limit(max=0.02), 1), (0.01, Limit(max=0.02), -1),
     (0.7, Limit(min=0.8), 1), (0.8, Limit(min=0.8, max=0.9), 0), (None, Limit(min=0.8), 1)],
)  # fmt: skip
def test_a_limit_is_held_up_to_its_end_and_not_by_what_was_not_measured(value, limit, sign):
    found = violation(value, limit)
    assert (found > 0) - (found < 0) == sign
    assert bool(missed({"x": value}, {"x": limit})) == (sign > 0)


def test_the_winners_curse_is_positive_where_confirmation_is_worse():
    assert curse({"a": 0.9}, {"a": 0.7}, UP) == {"a": pytest.approx(0.2)}
    assert curse({"a": 0.1}, {"a": 0.3}, DOWN) == {"a": pytest.approx(0.2)}
    assert curse({"a": 0.1}, {}, DOWN) == {"a": None}


def test_savings_count_a_shared_stage_once():
    trials = [
        Record(n, "complete", stages={"abliteration": [("one", 10.0)], "train": [(f"t{n}", 5.0)]})
        for n in range(3)
    ]
    found = savings(trials)
    assert found["abliteration"] == {"asked": 3, "run": 1, "seconds": 10.0, "seconds_saved": 20.0}
    assert found["train"]["seconds_saved"] == 0


def test_a_mean_over_seeds_wants_every_seed():
    assert mean_of([0.2, 0.4]) == pytest.approx(0.3)
    assert mean_of([0.2, None]) is None
