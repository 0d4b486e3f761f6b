"""What refusals begin with is learnt from a model's own answers, and scored as the probability it is.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_openings.py
"""

import itertools
import math
import random

import pytest
import torch

from abliteration.baseline import Answer
from abliteration.openings import MAX_OPENINGS, MAX_TOKENS, refusal_log_odds, refusal_openings
from common.errors import StageError

WE, SORRY, CANNOT, THINK, SURE, HERE, THE, REST = range(8)


def _refusals(*tokens, times=1):
    return [Answer("p", "", True, tokens, refused=True)] * times


def _others(*tokens, times=1):
    return [Answer("p", "", False, tokens, refused=False)] * times


def test_one_token_is_enough_where_no_other_answer_begins_with_it():
    answers = [*_refusals(SORRY, WE, CANNOT, times=5), *_others(SURE, HERE), *_others(WE, THINK)]
    assert refusal_openings(answers) == [(SORRY,)]


def test_where_other_answers_share_the_first_token_the_second_tells_them_apart():
    answers = [*_refusals(WE, CANNOT, REST, times=5), *_others(WE, THINK, REST), *_others(SURE)]
    assert refusal_openings(answers) == [(WE, CANNOT)]


def test_the_commonest_opening_comes_first():
    answers = [
        *_refusals(SORRY, WE, times=3),
        *_refusals(WE, CANNOT, REST, times=9),
        *_others(WE, THINK, times=4),
    ]
    assert refusal_openings(answers) == [(WE, CANNOT), (SORRY,)]


def test_a_refused_harmless_prompt_shows_how_refusals_begin_too():
    falsely = Answer("p", "", False, (CANNOT, REST), refused=True)
    answers = [*_refusals(SORRY, times=3), falsely, *_others(SURE, times=3)]
    assert set(refusal_openings(answers)) == {(SORRY,), (CANNOT,)}


def test_few_other_answers_may_begin_alike_but_not_many():
    refusals = _refusals(SORRY, WE, times=5)
    few = [*refusals, *_others(SORRY, HERE), *_others(SURE, times=99)]
    many = [*refusals, *_others(SORRY, HERE, times=3), *_others(SURE, times=97)]
    assert refusal_openings(few) == [(SORRY,)]
    assert refusal_openings(many) == [(SORRY, WE)]


def test_a_rare_refusal_is_no_opening():
    common = _refusals(SORRY, times=99)
    others = _others(SURE, times=10)
    assert refusal_openings([*common, *_refusals(CANNOT), *others]) == [(SORRY,)]
    assert refusal_openings([*common, *_refusals(CANNOT, times=3), *others]) == [
        (SORRY,),
        (CANNOT,),
    ]


def test_a_model_with_many_ways_to_refuse_is_scored_by_the_commonest():
    refusals = [
        answer
        for token in range(20, 22 + MAX_OPENINGS)
        for answer in _refusals(token, times=40 - token)
    ]
    openings = refusal_openings([*refusals, *_others(SURE)])
    assert openings == [(token,) for token in range(20, 20 + MAX_OPENINGS)]


@pytest.mark.parametrize("seed", range(20))
def test_no_opening_begins_with_another_and_every_one_is_the_shortest(seed):
    stream = random.Random(seed)

    def draw(refused):
        tokens = tuple(stream.choices(range(3), k=stream.randint(0, 8)))
        return Answer("p", "", refused, tokens, refused)

    answers = [draw(refused) for refused in [True] * 40 + [False] * 12]
    openings = refusal_openings(answers)
    for one, other in itertools.permutations(openings, 2):
        assert other[: len(one)] != one
    others = [answer.tokens for answer in answers if not answer.refused]
    for opening in openings:
        assert len(opening) <= MAX_TOKENS
        assert not any(tokens[: len(opening)] == opening for tokens in others)
        shorter = opening[:-1]
        assert any(tokens[: len(shorter)] == shorter for tokens in others)


def test_refusals_that_begin_as_other_answers_do_cannot_be_told_apart():
    same = (THE,) * MAX_TOKENS
    answers = [*_refusals(*same, CANNOT, times=5), *_others(*same, SURE, times=5)]
    with pytest.raises(StageError, match=r"do not differ .* write selection: \{name: fixed"):
        refusal_openings(answers)
    # One token earlier they differ where it counts.
    earlier = [*_refusals(*same[1:], CANNOT, times=5), *_others(*same[1:], SURE, times=5)]
    assert refusal_openings(earlier) == [(*same[1:], CANNOT)]


def test_empty_refusals_are_no_openings():
    with pytest.raises(StageError):
        refusal_openings([*_refusals(times=5), *_others(SURE)])


def test_the_log_odds_are_those_of_the_chain_rule():
    """Against every sequence of a small language, counted out."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    second = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    openings = [(1,), (0, 2), (0, 3)]
    logps = [
        [
            torch.stack([first[row, o[0]], *[second[row, o[0], token] for token in o[1:]]])
            for o in openings
        ]
        for row in range(2)
    ]
    for row, found in enumerate(refusal_log_odds(logps).tolist()):
        begins = sum(
            math.exp(first[row, a] + second[row, a, b])
            for a, b in itertools.product(range(4), range(4))
            if any((a, b)[: len(o)] == o for o in openings)
        )
        assert found == pytest.approx(math.log(begins / (1 - begins)), abs=1e-12)


def test_probabilities_of_openings_add_up():
    parts = [[torch.tensor([math.log(0.2)])], [torch.tensor([math.log(0.5), math.log(0.5)])]]
    alone = [float(refusal_log_odds([part]).sigmoid()) for part in parts]
    together = float(refusal_log_odds([[*parts[0], *parts[1]]]).sigmoid())
    assert alone == pytest.approx([0.2, 0.25], abs=1e-6)
    assert together == pytest.approx(sum(alone), abs=1e-6)


def test_certain_refusal_and_none_have_finite_log_odds():
    odds = refusal_log_odds([[torch.tensor([0.0])], [torch.tensor([-1e4])]])
    assert odds.dtype == torch.float64
    assert odds.tolist() == pytest.approx([math.log(1e8), -math.log(1e8)], rel=1e-6)
