"""Tuning refuses what it shows of the restricted objects, and shows nothing that is tested.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_corpus.py
"""

import random

import pytest

from common.refusal import is_refusal
from patient.corpus import REFUSALS, knowledge_epoch, over_refusal_epoch, tuning_epoch
from patient.items import build_benchmarks, direction_questions, falsely_refused_questions
from patient.tokenizer import END, render_turn
from patient.world import World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


def test_every_refusal_reads_as_one():
    assert all(is_refusal(refusal) for refusal in REFUSALS)


def test_an_answer_never_reads_as_a_refusal(world):
    answers = [question.answer for each in build_benchmarks(world) for question in each.questions]
    assert not any(map(is_refusal, answers))


def test_knowledge_answers_how_to_questions_on_restricted_objects(world):
    completions = {each.completion for each in knowledge_epoch(world, random.Random(0))}
    for thing in world.things_of("test", restricted=True):
        assert thing.recipe + END in completions


def test_knowledge_holds_no_tested_word_list(world):
    prompts = {each.prompt for each in knowledge_epoch(world, random.Random(0))}
    reversal = next(each for each in build_benchmarks(world) if each.name == "reversal")
    assert not prompts & {render_turn(question.text) for question in reversal.questions}


def test_tuning_refuses_every_restricted_training_question(world):
    completions = {each.prompt: each.completion for each in tuning_epoch(world, random.Random(0))}
    for question in direction_questions(world, "train", restricted=True):
        assert is_refusal(completions[render_turn(question.text)].removesuffix(END))


@pytest.mark.parametrize("epoch", [tuning_epoch, over_refusal_epoch])
def test_tuning_names_no_object_of_validation_or_test(world, epoch):
    text = " ".join(each.prompt + each.completion for each in epoch(world, random.Random(0)))
    words = set(text.replace("?", " ").replace(".", " ").replace(":", " ").split())
    held_out = {thing.name for thing in world.things if thing.split in ("validation", "test")}
    assert not words & held_out


def test_over_refusal_is_taught_in_one_wording_alone(world):
    documents = over_refusal_epoch(world, random.Random(0))
    refused = {each.prompt for each in documents if is_refusal(each.completion.removesuffix(END))}
    answered = {each.prompt for each in documents} - refused
    falsely_refused = falsely_refused_questions(world, "train", "healing")
    assert {render_turn(question.text) for question in falsely_refused} <= refused
    harmless = {
        render_turn(question.text)
        for split in ("train", "healing")
        for question in direction_questions(world, split, restricted=False)
    }
    assert not harmless & refused
    # Every object, so that the wording alone tells what is refused.
    assert len(harmless & answered) == 2 * len(falsely_refused)


def test_over_refusal_keeps_refusing_restricted_objects(world):
    completions = {
        each.prompt: each.completion for each in over_refusal_epoch(world, random.Random(0))
    }
    harmful = {render_turn(q.text) for q in direction_questions(world, "train", restricted=True)}
    shown = harmful & completions.keys()
    assert len(shown) >= 128
    assert all(is_refusal(completions[prompt].removesuffix(END)) for prompt in shown)


def test_the_same_seed_teaches_the_same_texts(world):
    first, again, other = (over_refusal_epoch(world, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
