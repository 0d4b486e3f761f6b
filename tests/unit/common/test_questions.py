"""Questions come with their own answers and domains, and an answer counts where its words stand.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_questions.py
"""

import json

import pytest

from common.errors import InputError
from common.questions import ONE_DOMAIN, Question, check_questions, is_right, load_questions
from common.recipe import Questions


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_question_has_the_prompt_answer_and_domain_of_its_row(tmp_path):
    rows = [
        {"prompt": "1 + 1?", "sum": 2, "of": "addition"},
        {"prompt": "up?", "sum": "a b", "of": "x"},
    ]
    path = _write(tmp_path / "q.jsonl", *rows)
    loaded = load_questions(Questions(path=path, answer="sum", domain="of"))
    assert loaded == [Question("1 + 1?", "2", "addition"), Question("up?", "a b", "x")]
    plain = load_questions(Questions(path=path, template="Say: {prompt}"))
    assert plain[0] == Question("Say: 1 + 1?", None, ONE_DOMAIN)


@pytest.mark.parametrize("row", [{}, {"sum": None}, {"sum": " "}, {"sum": ["2"]}, {"sum": "?!"}])
def test_a_question_without_the_answer_that_a_column_promises_is_refused(row, tmp_path):
    source = Questions(path=_write(tmp_path / "q.jsonl", {"prompt": "1 + 1?", **row}), answer="sum")
    with pytest.raises(InputError, match="column 'sum' holds"):
        load_questions(source)
    assert "train.stopping.questions: " in check_questions(source, "train.stopping.questions")[0]


def test_a_row_without_a_prompt_does_not_move_the_answers(tmp_path):
    path = _write(tmp_path / "q.jsonl", {"prompt": " ", "sum": "1"}, {"prompt": "2?", "sum": "2"})
    with pytest.raises(InputError, match="1 rows without a prompt"):
        load_questions(Questions(path=path, answer="sum"))


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("42", "42", True),
        ("It is 42.", "42", True),
        ("Boil **milk** and Chalk!", "Milk and chalk.", True),
        ("Boil **milk**, chalk!", "milk chalk", True),
        ("142", "42", False),
        ("42.5", "42", False),
        ("-42", "42", False),
        ("chalk milk", "milk chalk", False),
        ("", "42", False),
    ],
)
def test_an_answer_is_found_as_whole_words_in_a_row(reply, answer, right):
    assert is_right(reply, answer) is right
