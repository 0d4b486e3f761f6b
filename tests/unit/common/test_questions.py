"""Questions come with their own answers and domains, and what is right is said whole or at the end.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_questions.py
"""

import json

import pytest

from common.errors import InputError
from common.questions import Question, check_questions, is_right, load_questions
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
    assert plain[0] == Question("Say: 1 + 1?")


@pytest.mark.parametrize(
    "row", [{}, {"sum": None}, {"sum": " "}, {"sum": ["2"]}, {"sum": "?!"}, {"sum": True}]
)
def test_a_question_without_the_answer_that_a_column_promises_is_refused(row, tmp_path):
    source = Questions(path=_write(tmp_path / "q.jsonl", {"prompt": "1 + 1?", **row}), answer="sum")
    with pytest.raises(InputError, match="column 'sum' should hold"):
        load_questions(source)
    assert "train.stopping.questions: " in check_questions(source, "train.stopping.questions")[0]


def test_a_row_without_a_prompt_does_not_move_the_answers(tmp_path):
    path = _write(tmp_path / "q.jsonl", {"prompt": " ", "sum": "1"}, {"prompt": "2?", "sum": "2"})
    with pytest.raises(InputError, match="1 rows without a prompt"):
        load_questions(Questions(path=path, answer="sum"))


@pytest.mark.parametrize(
    ("text", "known", "right"),
    [
        ("Rome", "Rome", True),
        ("  rome. ", "Rome", True),
        ("The capital of Italy is Rome.", "Rome", True),
        ("It is old. The capital is Rome!", "Rome", True),
        ("Rome is the capital. It is not Milan.", "Rome", False),
        ("The capital is Jerome.", "Rome", False),
        ("Milan", "Rome", False),
        ("", "Rome", False),
        ("25 plus 16 is 41.", "41", True),
        ("First 25, then 41 in all", "41", True),
        ("41 minus 16 is 25", "41", False),
        ("It is 141.", "41", False),
        ("1,041", "1041", True),
        ("41.0", "41", True),
        ("-41", "41", False),
        ("no number", "41", False),
        ("mol zer rin", "mol zer rin", True),
        ("mol rin zer", "mol zer rin", False),
    ],
)
def test_an_answer_is_right_as_a_whole_or_at_the_end_of_its_last_sentence(text, known, right):
    assert is_right(text, known) is right
