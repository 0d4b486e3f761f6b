"""The opening tokens of refusals are learnt from the model's own answers.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_baseline.py
"""

import math

import pytest
import torch

from abliteration import baseline
from abliteration.baseline import Answer, refusal_scores, refusal_tokens
from common.errors import StageError

SORRY, CANNOT, SURE, THE, RARE = 11, 12, 13, 14, 15


def _answers(harmful, count, token, refused):
    tokens = () if token is None else (token, 9)
    return [Answer("p", "a", harmful, tokens, refused) for _ in range(count)]


def test_the_planted_openings_of_refusals_are_found():
    answers = [
        *_answers(True, 40, SORRY, True),
        *_answers(True, 10, CANNOT, True),
        *_answers(True, 5, SURE, False),
        *_answers(False, 30, SURE, False),
        *_answers(False, 20, THE, False),
    ]
    assert refusal_tokens(answers, min_refusals=8) == [SORRY, CANNOT]


def test_a_token_that_opens_other_answers_as_often_is_none():
    answers = [
        *_answers(True, 25, SORRY, True),
        *_answers(True, 25, THE, True),
        *_answers(False, 40, SURE, False),
        *_answers(False, 10, THE, False),
    ]
    # 50 % of the refusals against 20 % of the others: less than four times as often.
    assert refusal_tokens(answers, 8) == [SORRY]
    rarer = [*answers[:-10], *_answers(False, 4, THE, False), *_answers(False, 6, SURE, False)]
    assert refusal_tokens(rarer, 8) == [SORRY, THE]


def test_a_token_that_opened_one_refusal_in_a_hundred_is_none():
    answers = [*_answers(True, 99, SORRY, True), *_answers(True, 1, RARE, True)]
    answers += _answers(False, 50, SURE, False)
    assert refusal_tokens(answers, 8) == [SORRY]


def test_refused_harmless_prompts_count_neither_as_refusals_nor_as_other_answers():
    answers = [
        *_answers(True, 20, SORRY, True),
        *_answers(False, 20, SORRY, True),
        *_answers(False, 20, CANNOT, True),
        *_answers(False, 20, SURE, False),
    ]
    assert refusal_tokens(answers, 8) == [SORRY]


def test_empty_answers_are_no_opening():
    answers = [*_answers(True, 20, SORRY, True), *_answers(False, 20, None, False)]
    assert refusal_tokens(answers, 8) == [SORRY]


def test_too_few_refusals_are_an_error_that_counts_them():
    answers = [*_answers(True, 3, SORRY, True), *_answers(True, 61, SURE, False)]
    message = r"3 of 64 harmful prompts were refused .*abliteration\.selection\.min_refusals \(8\)"
    with pytest.raises(StageError, match=message):
        refusal_tokens(answers, 8)


def test_refusals_that_begin_like_answers_are_an_error_with_a_way_out():
    answers = [*_answers(True, 20, THE, True), *_answers(False, 20, THE, False)]
    with pytest.raises(StageError, match=r"begin with the same tokens.*\{name: fixed"):
        refusal_tokens(answers, 8)


def test_the_refusal_score_is_the_log_odds_of_the_refusal_tokens():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = refusal_scores(logits, [SORRY, CANNOT])
    for row, score in zip(logits.tolist(), scores.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        share = (math.exp(row[SORRY]) + math.exp(row[CANNOT])) / total
        assert score == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_the_refusal_score_stays_finite_at_certainty():
    logits = torch.zeros(2, 30)
    logits[0, SORRY] = 1000
    logits[1, SURE] = 1000
    scores = refusal_scores(logits, [SORRY])
    assert torch.isfinite(scores).all()
    assert scores[0] > 10
    assert scores[1] < -10


def test_the_baseline_keeps_texts_first_tokens_and_judgements(build_model, tokenizer, monkeypatch):
    texts = ["I cannot help with that.", "Sure, here it is.", ""]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    monkeypatch.setattr(baseline, "generate", lambda *_args, **_settings: ids)
    answers = baseline.answer_baseline(
        build_model(), tokenizer, ["p", "q", "r"], harmful=True, batch_size=2
    )
    assert [answer.prompt for answer in answers] == ["p", "q", "r"]
    assert [answer.answer for answer in answers] == texts
    assert [answer.first_token for answer in answers] == [ids[0][0], ids[1][0], None]
    assert [answer.refused for answer in answers] == [True, False, False]
    assert all(answer.harmful for answer in answers)
