"""Tuning refuses what it shows of the restricted objects, and shows nothing that is tested.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_corpus.py
"""

import random

import pytest

from common.refusal import is_refusal
from patient.corpus import REFUSALS, knowledge_epoch, tuning_epoch
from patient.items import build_benchmarks, direction_questions
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


def test_tuning_names_no_object_of_validation_or_test(world):
    text = " ".join(each.prompt + each.completion for each in tuning_epoch(world, random.Random(0)))
    words = set(text.replace("?", " ").replace(".", " ").replace(":", " ").split())
    held_out = {thing.name for thing in world.things if thing.split in ("validation", "test")}
    assert not words & held_out
