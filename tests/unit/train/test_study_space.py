"""What a study tries: values, their order, and that numbers are rounded so that trials can share stages.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_study_space.py
"""

import optuna
import pytest

from common.recipe import Parameter
from train.study_space import (
    Space,
    in_words,
    list_values,
    same_start,
    short_names,
    value_of,
)

STRENGTH, BETA = "abliteration.edit.strength", "train.trainer.beta"


def suggested(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    settings = []
    for _ in range(60):
        trial = study.ask()
        settings.append(space.suggest(trial))
        study.tell(trial, 0.0)
    return settings


def test_a_grid_is_every_combination_with_equal_ablations_side_by_side():
    # The key of stage one stands last, and still changes slowest.
    space = Space(
        {BETA: Parameter(choices=(0.1, 0.2, 0.3)), STRENGTH: Parameter(choices=(1.0, 2.0))}
    )
    grid = space.grid()
    assert len(grid) == 6
    assert len({str(setting) for setting in grid}) == 6
    starts = [same_start(setting) for setting in grid]
    assert starts == sorted(starts)
    assert len(set(starts)) == 2


def test_a_key_under_a_condition_is_there_only_under_it():
    edit = "abliteration.edit.name"
    space = Space(
        {
            edit: Parameter(choices=("orthogonalize", "add")),
            STRENGTH: Parameter(choices=(1.0, 2.0), when={edit: ("orthogonalize",)}),
            BETA: Parameter(low=1e-2, high=1.0, log=True, when={STRENGTH: (2.0,)}),
        }
    )
    for setting in suggested(space):
        assert (STRENGTH in setting) == (setting[edit] == "orthogonalize")
        assert (BETA in setting) == (setting.get(STRENGTH) == 2.0)


def test_a_grid_has_no_combination_twice_that_differs_in_what_does_not_apply():
    edit = "abliteration.edit.name"
    space = Space(
        {
            edit: Parameter(choices=("orthogonalize", "add")),
            STRENGTH: Parameter(choices=(1.0, 2.0), when={edit: ("orthogonalize",)}),
        }
    )
    assert len(space.grid()) == 3


def test_numbers_are_rounded_so_that_few_are_tried_and_none_is_beyond_its_range():
    for parameter, most in (
        (Parameter(low=0.5, high=2.0), 16),
        (Parameter(low=0.95, high=1.05), 11),
        (Parameter(low=1e-5, high=1e-3, log=True), 181),
        (Parameter(low=0.1, high=0.4, step=0.1), 4),
    ):
        tried = {setting["x"] for setting in suggested(Space({"x": parameter}))}
        assert len(tried) <= most
        assert len(tried) > 3
        assert all(parameter.low <= value <= parameter.high for value in tried)


def test_the_ends_of_a_range_are_kept_though_rounding_would_leave_it():
    parameter = Parameter(low=0.123, high=0.987)
    assert value_of(parameter, 0.123) == 0.123
    assert value_of(parameter, 0.987) == 0.987


def test_choices_of_any_form_come_back_as_they_were_written():
    choices = ({"name": "add"}, [1, "sft"], None, 2, "two", True)
    space = Space({"x": Parameter(choices=choices)})
    tried = [setting["x"] for setting in suggested(space)]
    assert all(any(value is c or value == c for value in tried) for c in choices)
    assert {type(value) for value in tried} == {dict, list, type(None), int, str, bool}


def test_a_setting_that_is_enqueued_is_suggested_unchanged():
    space = Space({STRENGTH: Parameter(low=0.5, high=2.0), "x": Parameter(choices=([1], [2]))})
    setting = {STRENGTH: 1.3, "x": [2]}
    study = optuna.create_study()
    study.enqueue_trial(space.stored(setting))
    assert space.suggest(study.ask()) == setting


def test_steps_reach_the_upper_end():
    assert list_values(Parameter(low=0.0, high=0.9, step=0.3)) == [0.0, 0.3, 0.6, 0.9]
    assert list_values(Parameter(low=4, high=16, step=4)) == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["train.trainer.beta"], ["beta"]),
        (
            ["train.anchors[0].weight", "train.anchors[1].weight"],
            ["anchors[0].weight", "anchors[1].weight"],
        ),
        (["a.b.x", "c.b.x", "y"], ["a.b.x", "c.b.x", "y"]),
    ],
)
def test_names_are_as_short_as_they_stay_distinct(keys, names):
    assert list(short_names(keys).values()) == names


def test_a_setting_in_words_is_one_line():
    assert in_words({STRENGTH: 1.0, BETA: 0.05}) == "strength=1, beta=0.05"


def test_the_number_of_settings_counts_only_what_a_stage_sees():
    space = Space(
        {STRENGTH: Parameter(choices=(1.0, 2.0)), BETA: Parameter(low=0.1, high=1.0, log=True)}
    )
    assert space.size(0) == 2
    assert space.size(1) == float("inf")
