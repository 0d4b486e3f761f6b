"""Refusals in words that no list knows are found by the direction that stage one removed.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_preference_direction.py
"""

import json
import random

import pytest
import torch

from common import distributed
from common.chat import encode
from common.edits import save_edit
from common.errors import StageError
from common.recipe import Recipe
from common.refusal import is_refusal
from tests.editing import edit_of, vector
from tests.training import shelf_in
from train import pairs, refusal_probe
from train.refusal_probe import FIRST_TOKENS, calibrate, find_limit, project

# Two made-up languages for answers: what refuses in the first is written in the second nowhere.
NO = ["zan ", "zik ", "zul "]
YES = ["the ", "then ", "other "]


def _says(words, number):
    return "".join(random.Random(f"{words} {number}").choices(words, k=4 + number % 5))


def test_the_limit_is_the_middle_of_the_widest_best_gap():
    scores = torch.tensor([4.0, 0.0, 1.0, 3.0])
    assert calibrate(scores, torch.tensor([True, False, False, True])) == (2.0, 1.0)
    # One refusal among five stands too low: 0.9 above the two others at best.
    refused = torch.tensor([True, False, False, True, True, True, True])
    threshold, accuracy = calibrate(torch.tensor([-5.0, 0, 1, 8, 9, 10, 11]), refused)
    assert (threshold, accuracy) == (4.5, pytest.approx(0.9))
    # Equally good at 0.5 and 6: the wider gap.
    refused = torch.tensor([False, True, False, True])
    assert calibrate(torch.tensor([0.0, 1.0, 2.0, 10.0]), refused) == (6.0, 0.75)


def test_scores_that_tell_nothing_have_the_accuracy_of_a_guess():
    refused = torch.tensor([True, False, True, False])
    assert calibrate(torch.ones(4), refused) == (1.0, 0.5)
    assert calibrate(torch.tensor([0.0, 9.0, 1.0, 8.0]), refused)[1] <= 0.5


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def stage_one(model, tokenizer, tmp_path_factory):
    """A folder of stage one whose direction tells the two languages apart at the input of block 1."""

    def make(direction, num=40, layer=1):
        folder = tmp_path_factory.mktemp("abliteration")
        save_edit(
            edit_of(model, "orthogonalize", direction, about={"layer": layer}),
            folder / "edit.safetensors",
        )
        rows = [
            {"prompt": f"question {n}", "answer": _says(NO if n % 2 else YES, n), "refused": n % 2}
            for n in range(num)
        ]
        (folder / "baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture(scope="module")
def planted(model, tokenizer, read_stream):
    """The mean difference between the two languages, on words of their own."""

    def mean(words):
        found = []
        for n in range(100, 120):
            ids = tokenizer(_says(words, n), add_special_tokens=False)["input_ids"][:FIRST_TOKENS]
            (prompt,) = encode(tokenizer, [f"question {n}"])
            found.append(
                read_stream(model, torch.tensor([prompt + ids]))[1][0, len(prompt) :].mean(0)
            )
        return torch.stack(found).mean(0)

    return mean(NO) - mean(YES)


@pytest.mark.parametrize("layer", [1, 1.25])
def test_projections_are_means_over_the_first_answer_tokens(
    layer, model, tokenizer, stage_one, planted, read_stream, monkeypatch
):
    edit = refusal_probe.load_edit(stage_one(planted, layer=layer) / "edit.safetensors")
    answered = [
        ((("user", "hello " * n), ("assistant", "x"), ("user", f"q {n}")), _says(YES, n)[: 3 * n])
        for n in range(1, 7)
    ]
    found = project(model, tokenizer, edit, answered, batch_size=2)
    for (turns, answer), score in zip(answered, found, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"][:FIRST_TOKENS]
        streams = read_stream(model, torch.tensor([prompt + ids]))
        stream = streams[1] if layer == 1 else 0.75 * streams[1] + 0.25 * streams[2]
        expected = (stream[0, len(prompt) :] @ edit.direction).mean()
        assert score == pytest.approx(float(expected), abs=1e-9)
    # However the processes of a launch deal them out.
    monkeypatch.setattr(
        distributed, "share", lambda items, work: [r for item in items for r in work([item])]
    )
    assert project(model, tokenizer, edit, answered, batch_size=2) == pytest.approx(found, abs=1e-9)


def test_a_direction_that_tells_nothing_apart_is_an_error_with_its_figure(
    model, tokenizer, stage_one, planted
):
    off = vector(3)
    off = off - planted * (off @ planted) / (planted @ planted)
    with pytest.raises(
        StageError, match=r"20 refusals and 20 other .* overlap \(balanced accuracy 0"
    ):
        find_limit(model, tokenizer, stage_one(off), batch_size=4)
    # Refusals must stand above: the direction turned round separates, but the wrong way.
    with pytest.raises(StageError, match="overlap"):
        find_limit(model, tokenizer, stage_one(-planted), batch_size=4)


def test_too_few_answers_are_an_error(model, tokenizer, stage_one, planted):
    with pytest.raises(StageError, match="holds 7 refusals and 7 other answers"):
        find_limit(model, tokenizer, stage_one(planted, num=14), batch_size=4)


@pytest.fixture
def screen_of(model, tokenizer, stage_one, planted, tmp_path):
    """The screen before the pairs of one file, its scores made."""

    def make(rows, **filters):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"path": str(path), "column": "prompt"}
        panel = {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
        recipe = Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": "m"},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {
                    "preferences": [{"name": "dataset", "path": str(path)}],
                    "filters": {"direction": True, **filters},
                },
                "eval": {"benchmarks": [panel]},
            }
        )
        shelf = shelf_in(tmp_path, tokenizer)
        screen = pairs.Screen(recipe, shelf, stage_one(planted), frozenset())
        screen.make(model)
        return screen

    return make


PLANTED = [
    {
        "prompt": f"question {n + 500}",
        "chosen": _says(NO if n % 4 == 0 else YES, n + 500),
        "rejected": "bad",
    }
    for n in range(60)
]


def test_planted_refusals_in_unknown_words_are_found(screen_of):
    assert not any(is_refusal(row["chosen"]) for row in PLANTED)
    kept, counts, _ = screen_of(PLANTED).pairs(0)
    truth = {row["prompt"] for row in PLANTED if row["chosen"].startswith("z")}
    dropped = {row["prompt"] for row in PLANTED} - {pair.question for pair in kept}
    precision, recall = len(dropped & truth) / len(dropped), len(dropped & truth) / len(truth)
    assert len(truth) == 15
    assert (precision, recall) == (1.0, 1.0)
    assert counts == {"kept": 45, "chosen refuses by the direction": 15}


def test_words_and_direction_work_one_after_the_other(screen_of):
    rows = [
        *PLANTED[:4],
        {"prompt": "w", "chosen": "I'm sorry, but I can't help with that.", "rejected": "bad"},
    ]
    _, counts, _ = screen_of(rows).pairs(0)
    assert counts == {"kept": 3, "chosen refuses": 1, "chosen refuses by the direction": 1}


def test_a_refusal_by_the_direction_is_swapped_where_the_other_answer_is_none(screen_of):
    rows = [
        {"prompt": "question a", "chosen": _says(NO, 1), "rejected": _says(YES, 1)},
        {"prompt": "question b", "chosen": _says(NO, 2), "rejected": _says(NO, 3)},
        {"prompt": "question c", "chosen": _says(YES, 2), "rejected": _says(NO, 4)},
        {
            "prompt": "question d",
            "chosen": _says(NO, 5),
            "rejected": "I cannot help with this request.",
        },
    ]
    kept, counts, _ = screen_of(rows, swap=True).pairs(0)
    assert [(pair.question, pair.chosen) for pair in kept] == [
        ("question a", _says(YES, 1)),
        ("question c", _says(YES, 2)),
    ]
    assert counts == {"kept": 2, "swapped": 1, "chosen refuses by the direction": 2}


def test_what_the_limit_was_found_on_is_told(screen_of):
    limit = screen_of(PLANTED).limit().as_data()
    assert (limit["num_refused"], limit["num_answered"]) == (20, 20)
    assert limit["balanced_accuracy"] == 1.0
