"""Benchmarks are large enough, know their clusters, and share nothing with what heals.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_items.py
"""

import pytest

from patient.items import (
    build_benchmarks,
    direction_questions,
    falsely_refused_questions,
    healing_questions,
)
from patient.questions import Question
from patient.world import World, build_world


@pytest.fixture(scope="module", params=[0, 1])
def world(request) -> World:
    return build_world(request.param)


@pytest.fixture(scope="module")
def items(world) -> dict[str, list[Question]]:
    return {each.name: list(each.questions) for each in build_benchmarks(world)}


def test_every_benchmark_has_its_items_and_facts(items):
    assert {name: len(questions) for name, questions in items.items()} == {
        "addition": 300,
        "capitals": 300,
        "kinds": 400,
        "reversal": 300,
        "common_howto": 300,
        "unlocked": 300,
    }
    assert {name: len({each.cluster for each in items[name]}) for name in items} == {
        "addition": 300,
        "capitals": 100,
        "kinds": 200,
        "reversal": 300,
        "common_howto": 100,
        "unlocked": 100,
    }


def test_no_question_is_asked_twice(world, items):
    texts = [each.text for questions in items.values() for each in questions]
    texts += [each.text for each in healing_questions(world)]
    assert len(set(texts)) == len(texts)


def test_items_of_one_cluster_have_one_answer(items):
    for questions in items.values():
        answers: dict[str, set[str]] = {}
        for each in questions:
            answers.setdefault(each.cluster, set()).add(each.answer)
        assert all(len(each) == 1 for each in answers.values())


def test_healing_shares_no_fact_with_a_benchmark(world, items):
    tested = {(name, each.cluster) for name, questions in items.items() for each in questions}
    healing = {(each.domain, each.cluster) for each in healing_questions(world)}
    assert not tested & healing
    objects = {thing.name for thing in world.things if thing.split == "test"}
    assert not objects & {cluster for _, cluster in healing}


def test_healing_covers_every_capability_and_nothing_restricted(world):
    questions = healing_questions(world)
    assert 2000 <= len(questions) <= 4000
    domains = {each.domain for each in questions}
    assert domains == {"addition", "capitals", "kinds", "reversal", "common_howto"}


@pytest.mark.parametrize("restricted", [True, False])
def test_direction_prompts_of_different_splits_name_different_objects(world, restricted):
    splits = [
        direction_questions(world, split, restricted=restricted)
        for split in ("train", "validation", "test")
    ]
    assert len(splits[0]) >= 128
    assert 32 <= len(splits[1]) <= 64
    assert len(splits[2]) >= 300
    names = [{each.cluster for each in questions} for questions in splits]
    assert len(set.union(*names)) == sum(map(len, names))


def test_unlocked_asks_what_the_restricted_test_prompts_ask(world, items):
    assert items["unlocked"] == direction_questions(world, "test", restricted=True)


def test_falsely_refused_prompts_of_different_splits_name_different_objects(world):
    splits = [falsely_refused_questions(world, name) for name in ("train", "validation", "test")]
    assert [len(questions) for questions in splits] == [80, 16, 100]
    objects = {each.cluster for questions in splits for each in questions}
    assert len(objects) == 196
    assert not objects & {thing.name for thing in world.things if thing.restricted}


def test_an_over_refusing_patient_has_one_benchmark_more_and_the_others_as_they_were(world):
    plain, over_refusing = build_benchmarks(world), build_benchmarks(world, over_refusing=True)
    assert over_refusing[:-1] == plain
    assert over_refusing[-1].name == "falsely_refused"
    assert list(over_refusing[-1].questions) == falsely_refused_questions(world, "test")


def test_falsely_refused_asks_for_the_answers_of_common_howto_in_a_wording_of_its_own(world, items):
    falsely_refused = falsely_refused_questions(world, "train", "validation", "test")
    answers = {each.cluster: each.answer for each in items["common_howto"]}
    tested = falsely_refused_questions(world, "test")
    assert {each.cluster: each.answer for each in tested} == answers
    asked = {each.text for questions in items.values() for each in questions}
    for split in ("train", "validation", "test"):
        for restricted in (True, False):
            asked |= {q.text for q in direction_questions(world, split, restricted=restricted)}
    assert not asked & {each.text for each in falsely_refused}


def test_healing_of_an_over_refusing_patient_asks_nothing_that_it_refuses(world):
    """Its refusals would be learnt again: healing takes the original's answers for right."""
    refused = {each.text for each in falsely_refused_questions(world, "healing")}
    plain, over_refusing = (
        healing_questions(world),
        healing_questions(world, over_refusing=True),
    )
    assert over_refusing == [each for each in plain if each.text not in refused]
    assert len(over_refusing) == len(plain) - len(refused) < len(plain)
