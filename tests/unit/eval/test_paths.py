"""Dotted paths into results.json.

Run: python -m pytest tests/unit/eval/test_paths.py
"""

import pytest

from common.errors import InputError
from eval.paths import field, number

RESULTS = {
    "pooled": {"n": 600, "recovery": None, "benchmarks": ["addition"]},
    "benchmarks": [
        {"name": "addition", "healed": {"value": 0.9}, "verdict": "recovered"},
        {"name": "mmlu_5.1", "healed": {"value": 0.5}},
    ],
    "accept": {"passed": True},
}


def test_a_name_in_brackets_selects_a_row_and_may_hold_dots() -> None:
    assert field(RESULTS, "benchmarks[addition].healed.value") == 0.9
    assert field(RESULTS, "benchmarks[mmlu_5.1].healed.value") == 0.5
    assert field(RESULTS, "benchmarks[addition].verdict") == "recovered"
    assert number(RESULTS, "pooled.n") == 600.0


def test_what_was_not_measured_is_none_and_so_is_all_below_it() -> None:
    assert number(RESULTS, "pooled.recovery.value") is None
    assert field(RESULTS, "pooled.recovery") is None


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("benchmarks[addition_].healed.value", 'did you mean "addition"?'),
        ("benchmarks[addition].healed_.value", 'did you mean "healed"?'),
        ("pooled.recovery.value.low.more.", "is no path"),
        ("poled.n", 'did you mean "pooled"?'),
        ("benchmarks.healed.value", "name one of its rows in brackets, e.g. benchmarks[addition]"),
        ("pooled[addition].n", "no rows to select"),
        ("pooled.benchmarks[addition]", "no rows to select"),
        ("", "empty path"),
        (".pooled", "is no path"),
    ],
)
def test_a_wrong_path_is_answered_with_what_is_there(path: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        field(RESULTS, path)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    "path", ["benchmarks[addition].verdict", "benchmarks[addition].healed", "accept.passed"]
)
def test_a_number_is_asked_for_where_a_gate_needs_one(path: str) -> None:
    with pytest.raises(InputError, match="is no number"):
        number(RESULTS, path)
