"""Trains the learned part of the refusal judge: softmax regression on answers drawn from the grammar.

No part of it depends on the order of parallel sums, and rounding the weights to 8 bits hides the last digits, in
which machines may differ: a second training writes the same bytes.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix

from common.refusal_model import CLASSES, extract, find, read, values_of
from common.refusal_training.grammar import draw_answers, load_grammar

NUM_ANSWERS = 30_000
SEED = 0
L2 = 5e-5
NUM_STEPS = 200
# A feature of fewer answers is chance, and the file would grow.
MIN_ANSWERS = 30
# The share of answers of which some words are blanked, and of the words in these: the grammar knows few ways to put
# things, people many.
BLANKED_ANSWERS, BLANKED_WORDS = 0.5, 0.12
# Answers drawn from a grammar are told apart more easily than real ones, and more of them refuse. So a refusal is one
# above this probability, chosen on real answers of several writers.
THRESHOLD = 0.71

Floats = NDArray[np.float64]
Features = NDArray[np.uint32]


def build(path: Path, *, num_answers: int = NUM_ANSWERS, num_steps: int = NUM_STEPS) -> None:
    """Draw the answers, train on them and write the model."""
    grammar = load_grammar()
    vocabulary = {word: index for index, word in enumerate(sorted(grammar.words), start=1)}
    answers = draw_answers(num_answers, SEED)
    rng = random.Random(SEED)
    features = [extract(_blank(read(text, vocabulary), rng)) for text, _ in answers]
    known = frequent(features, MIN_ANSWERS)
    weights, bias = train(features, [label for _, label in answers], known, num_steps=num_steps)
    bias[CLASSES.index("compliance")] += np.log(THRESHOLD / (1 - THRESHOLD))
    scale = np.abs(weights).max(axis=1) / 127
    tensors = {
        "features": known,
        "weights": np.round(weights / scale[:, None]).astype(np.int8),
        "scale": np.round(scale, 6).astype(np.float32),
        "bias": np.round(bias, 3).astype(np.float32),
    }
    metadata = {
        "classes": CLASSES,
        "grammar": grammar.fingerprint,
        "num_answers": num_answers,
        "words": sorted(vocabulary),
    }
    save_file(tensors, path, {"refusal_model": json.dumps(metadata, sort_keys=True)})


def frequent(features: Sequence[Features], min_answers: int) -> Features:
    """The features of at least so many answers, sorted."""
    known, counts = np.unique(np.concatenate(features), return_counts=True)
    return np.asarray(known[counts >= min_answers])


def train(
    features: Sequence[Features], labels: Sequence[int], known: Features, *, num_steps: int
) -> tuple[Floats, Floats]:
    """Softmax regression by Nesterov's accelerated gradient.

    Args:
        features: of each answer.
        labels: the class of each.
        known: the features to read, sorted.
        num_steps: of the descent, over all answers each.

    Returns:
        Weights [classes, known] and bias [classes].
    """
    matrix = _rows(features, known)
    wanted = np.eye(len(CLASSES))[np.asarray(labels)]
    transposed = matrix.T.tocsr()
    # A row's square is 2 at most, so that the loss never bends by more than 1: the longest step that is always safe.
    step = 1.0
    weights = np.zeros((len(known) + 1, len(CLASSES)))
    ahead = weights.copy()
    for index in range(num_steps):
        scores = matrix @ ahead
        scores -= scores.max(axis=1, keepdims=True)
        shares = np.exp(scores)
        shares /= shares.sum(axis=1, keepdims=True)
        gradient = transposed @ (shares - wanted) / len(wanted) + L2 * ahead
        stepped = ahead - step * gradient
        ahead = stepped + index / (index + 3) * (stepped - weights)
        weights = stepped
    return weights[:-1].T.copy(), weights[-1].copy()


def _rows(features: Sequence[Features], known: Features) -> csr_matrix:
    """Answers as rows of length 1 at most; behind each stands a column of ones, for the bias."""
    found = [find(each, known) for each in features]
    columns = np.concatenate([np.append(where, len(known)) for where, _ in found])
    values = np.concatenate(
        [
            np.append(values_of(each)[kept], 1.0)
            for each, (_, kept) in zip(features, found, strict=True)
        ]
    )
    starts = np.append(0, np.cumsum([len(where) + 1 for where, _ in found]))
    return csr_matrix((values, columns, starts), shape=(len(features), len(known) + 1))


def _blank(words: NDArray[np.int64], rng: random.Random) -> NDArray[np.int64]:
    """Some words of some answers made unknown, and runs of unknown ones one."""
    if rng.random() >= BLANKED_ANSWERS:
        return words
    numbers = [0 if rng.random() < BLANKED_WORDS else int(number) for number in words[0]]
    kept = [
        index for index, number in enumerate(numbers) if number or not index or numbers[index - 1]
    ]
    return np.stack([np.asarray(numbers)[kept], words[1][kept]])
