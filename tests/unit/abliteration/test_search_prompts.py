"""Which harmless prompts a search is judged on.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_search_prompts.py
"""

from types import SimpleNamespace

import pytest

from abliteration.stage import (
    FEW_HARMLESS_PROMPTS,
    MAX_HARMLESS_PROMPTS,
    _harmless_to_search_on,
)


@pytest.mark.parametrize(
    ("num_validation", "num_filled"),
    [(10, FEW_HARMLESS_PROMPTS - 10), (FEW_HARMLESS_PROMPTS, 0), (MAX_HARMLESS_PROMPTS + 5, 0)],
)
def test_prompts_of_the_direction_fill_up_a_small_validation_set_and_no_other(
    num_validation, num_filled
):
    unseen = [f"unseen {number}" for number in range(num_validation)]
    known = [f"known {number}" for number in range(400)]
    ground = SimpleNamespace(
        recipe=SimpleNamespace(seed=0), estimation=SimpleNamespace(harmless=known)
    )
    drawn = _harmless_to_search_on(ground, SimpleNamespace(harmless=unseen))
    first, rest = drawn[:num_validation], drawn[num_validation:]
    assert set(first) <= set(unseen)
    assert len(first) == min(num_validation, MAX_HARMLESS_PROMPTS)
    assert len(rest) == num_filled
    assert set(rest) <= set(known)
