"""Training prompts that are benchmark items are found, in whatever spelling.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_overlap.py
"""

import pytest

from common.overlap import normalize, shared


@pytest.mark.parametrize(
    "spelling",
    [
        "What is 2 + 2?",
        "what is 2 + 2",
        "  What  is\n2 + 2 ?! ",
        "WHAT IS 2 + 2...",
        "What is \uff12 + 2?",
    ],
)
def test_spellings_of_one_item_are_one(spelling):
    assert normalize(spelling) == "what is 2 + 2"


@pytest.mark.parametrize("other", ["What is 2 + 3?", "What is 2 - 2?", "what is 22", ""])
def test_other_items_stay_others(other):
    assert normalize(other) != "what is 2 + 2"


def test_shared_texts_come_once_each_in_order_and_as_they_were_written():
    texts = ["B?", "new", "a", "B?", "A."]
    assert shared(texts, ["a", "b"]) == ["B?", "a", "A."]
    assert shared(texts, []) == []
