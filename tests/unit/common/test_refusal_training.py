"""The learned part of the refusal judge is made from the grammar beside it, and from nothing else.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_refusal_training.py
"""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from common.refusal import INSTRUMENT
from common.refusal_model import (
    CLASSES,
    MASK,
    NUM_PLACES,
    PATH,
    extract,
    find,
    load_model,
    read,
    values_of,
    words_of,
)
from common.refusal_training.grammar import draw_answers, load_grammar
from common.refusal_training.training import build, frequent, train

# Of the first answers that the shipped model is trained on: whoever changes the grammar trains again, then sets this.
CORPUS = "e27e88456739d4e2"


@pytest.fixture(scope="module")
def answers():
    return draw_answers(600, seed=1)


def test_the_shipped_model_was_trained_on_this_grammar():
    with safe_open(PATH, framework="numpy") as file:
        metadata = json.loads(file.metadata()["refusal_model"])
    assert metadata["words"] == sorted(load_grammar().words)
    assert metadata["grammar"] == load_grammar().fingerprint


def test_the_answers_are_the_same_on_every_machine():
    text = "\n".join(answer for answer, _ in draw_answers(300, seed=0))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == CORPUS


def test_two_trainings_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        build(tmp_path / name, num_answers=240, num_steps=12)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_stated_error_was_measured_on_the_shipped_model():
    """Whoever trains again measures again: benchmarks/refusal_judge.py --write."""
    assert INSTRUMENT["model"] == hashlib.sha256(PATH.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_recipe_rebuilds_the_shipped_model_to_the_byte(tmp_path):
    build(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == PATH.read_bytes()


def test_the_shipped_model_tells_unseen_answers_of_the_grammar_apart():
    model = load_model()
    drawn = draw_answers(300, seed=2026)
    right = sum(
        (model.probabilities(text)[2] <= 0.5) == (CLASSES[label] != "compliance")
        for text, label in drawn
    )
    assert right / len(drawn) > 0.9


def test_answers_are_many_and_hardly_two_alike(answers):
    assert len({text for text, _ in answers}) > 0.95 * len(answers)
    assert [label for _, label in answers[:6]] == [0, 1, 2, 0, 1, 2]


def test_no_mark_of_the_grammar_is_left_in_an_answer(answers):
    assert not any(mark in text for text, _ in answers for mark in "{}|")


def test_the_topic_is_never_read():
    vocabulary = {word: number for number, word in enumerate(sorted(load_grammar().words), 1)}
    one = read("To bake the rye bread, you need to use a spoon.", vocabulary)
    two = read("To grulth the quarvel, you need to use a feltrin.", vocabulary)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, read("To bake the rye bread is illegal.", vocabulary))
    assert "quarvels" not in vocabulary
    assert read("quarvel feltrin grulth", vocabulary)[0].tolist() == [0]


def test_what_means_the_same_is_read_as_the_same():
    assert words_of("I can't, it's vital.") == words_of("I cannot, it is crucial.")
    assert words_of("[a thing] 12") == [MASK, "0"]


def test_features_depend_on_the_order_and_the_place_of_words():
    vocabulary = {
        word: number for number, word in enumerate(["i", "can", "not", "help", ".", "sure"], 1)
    }
    texts = ("sure. i can not help", "i can not help. sure", "sure. not i can help")
    first, second, third = (frozenset(extract(read(text, vocabulary))) for text in texts)
    assert len({first, second, third}) == 3


def test_what_training_never_saw_stands_for_nothing():
    known = np.array([4, 9, 20], dtype=np.uint32)
    columns, seen = find(np.array([3, 9, 20, 4_000_000_000], dtype=np.uint32), known)
    assert columns.tolist() == [1, 2]
    assert seen.tolist() == [False, True, True, False]


@pytest.mark.parametrize("rest", ["can i.", "can i. help not can. i help can not. not i help i."])
def test_a_long_answer_does_not_drown_how_it_begins(rest):
    vocabulary = {word: number for number, word in enumerate(["i", "can", "not", "help", "."], 1)}
    features = extract(read("i can not help. " + rest, vocabulary))
    first = values_of(features)[features % NUM_PLACES == 1]
    assert first @ first == pytest.approx(1 / NUM_PLACES)


def test_an_empty_answer_has_a_verdict():
    assert load_model().probabilities("").sum() == pytest.approx(1)


def test_training_finds_planted_features():
    rng = random.Random(0)
    labels = [index % 3 for index in range(300)]
    features = [
        np.array(sorted({100 + label, *rng.sample(range(1000, 1050), 5)}), dtype=np.uint32)
        for label in labels
    ]
    weights, _ = train(features, labels, frequent(features, 1), num_steps=60)
    assert weights[:, :3].argmax(axis=0).tolist() == [0, 1, 2]


def test_a_feature_of_few_answers_is_not_learned():
    features = [np.array([4, 8], dtype=np.uint32)] * 3 + [np.array([8, 12], dtype=np.uint32)] * 2
    assert frequent(features, 3).tolist() == [4, 8]
    assert train(features, [0, 1, 2, 0, 1], frequent(features, 3), num_steps=5)[0].shape == (3, 2)


def test_judging_needs_no_torch():
    code = "import sys; from common.refusal import judge; judge('No.'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
