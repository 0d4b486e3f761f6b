"""Of the abliterated model's samples the worst is rejected, and known answers decide what is right and wrong.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_preference_on_policy.py
"""

import json

import pytest
import torch
from pydantic import ValidationError

from common import chat, distributed
from common.generation import generate
from common.questions import Question
from common.recipe import Filters, OnPolicy, Recipe
from tests.training import shelf_in
from train import pairs
from train.preferences import on_policy


@pytest.fixture
def make_source(tmp_path):
    """Make a source over rows written as JSONL."""

    def make(*rows, name="prompts.jsonl", prompts=None, **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = {"path": str(path), **(prompts or {})}
        return OnPolicy.model_validate({"name": "on_policy", "prompts": named, **settings})

    return make


QUESTIONS = [{"prompt": text} for text in ("one", "the other one", "and the rest of it")]


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=0, dtype=torch.float32)


def test_one_candidate_is_the_sample_of_the_recipes_seed(model, tokenizer, make_source):
    source = make_source(*QUESTIONS, max_new_tokens=6, temperature=0.8)
    found = on_policy.sample(model, tokenizer, source, seed=3)
    prompts = [row["prompt"] for row in QUESTIONS]
    plain = generate(
        model, tokenizer, prompts, max_new_tokens=6, batch_size=8, temperature=0.8, seed=3
    )
    assert found == [[answer] for answer in plain]


def test_candidates_depend_on_seed_number_and_prompt_alone(
    model, tokenizer, make_source, monkeypatch
):
    settings = {"max_new_tokens": 6, "num_candidates": 3, "top_p": 0.9}
    source = make_source(*QUESTIONS, **settings)
    found = on_policy.sample(model, tokenizer, source, seed=3)
    assert [len(candidates) for candidates in found] == [3, 3, 3]
    assert all(len({tuple(ids) for ids in candidates}) == 3 for candidates in found)
    assert on_policy.sample(model, tokenizer, source, seed=4) != found
    # In other batches, as the processes of a launch deal them out.
    monkeypatch.setattr(
        distributed,
        "share",
        lambda items, work: [result for item in items for result in work([item])],
    )
    assert on_policy.sample(model, tokenizer, source, seed=3) == found
    fewer = make_source(*QUESTIONS, **{**settings, "num_candidates": 2})
    assert on_policy.sample(model, tokenizer, fewer, seed=3) == [c[:2] for c in found]


def test_a_small_nucleus_holds_the_likeliest_token_alone(model, tokenizer, make_source):
    prompts = [row["prompt"] for row in QUESTIONS]
    greedy = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=8)
    narrow = make_source(*QUESTIONS, max_new_tokens=6, top_p=1e-6)
    assert on_policy.sample(model, tokenizer, narrow, seed=3) == [[answer] for answer in greedy]
    wide = make_source(*QUESTIONS, max_new_tokens=6)
    assert on_policy.sample(model, tokenizer, wide, seed=3) != [[answer] for answer in greedy]
    # The hook is gone.
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=8) == greedy


def test_sampled_tokens_lie_in_the_nucleus(model, tokenizer, make_source):
    source = make_source(*QUESTIONS, max_new_tokens=8, top_p=0.3, num_candidates=4, temperature=2.0)
    for row, candidates in zip(
        QUESTIONS, on_policy.sample(model, tokenizer, source, seed=0), strict=True
    ):
        (prompt,) = chat.encode(tokenizer, [row["prompt"]])
        for ids in candidates:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            for place, token in enumerate(ids):
                chances = (logits[place].double() / 2.0).softmax(-1)
                # What is strictly likelier holds less than the nucleus does.
                assert chances[chances > chances[token]].sum() < 0.3


def test_scores_are_mean_log_probabilities_with_the_end_of_the_answer(
    model, tokenizer, make_source
):
    source = make_source(*QUESTIONS[:2], num_candidates=3, max_new_tokens=4, batch_size=3)
    candidates = [[[40, 41, 42, 43], [], [44]], [[45], [46, 47], [40, 41, 42, 43]]]
    found = on_policy.score(model, tokenizer, source, candidates)
    for row, answers, scores in zip(QUESTIONS, candidates, found, strict=False):
        (prompt,) = chat.encode(tokenizer, [row["prompt"]])
        for ids, score in zip(answers, scores, strict=True):
            # Four tokens are cut off, fewer were ended.
            read = ids if len(ids) == 4 else [*ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + read])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1)[range(len(read)), read]
            assert score == pytest.approx(float(logps.mean()), abs=1e-5)


def test_the_worst_candidate_is_rejected():
    pairs, counts = on_policy.pair(
        [Question("p", domain="sums"), Question("q")],
        ["a", "b"],
        [["near", "far", "middle"], ["first", "second", "third"]],
        [[-0.1, -3.0, -1.0], [-2.0, -2.0, -1.0]],
    )
    assert [(p.question, p.chosen, p.rejected, p.domain) for p in pairs] == [
        ("p", "a", "far", "sums"),
        ("q", "b", "first", None),
    ]
    assert counts == {}
    with pytest.raises(ValueError, match="zip"):
        on_policy.pair([Question("p")], ["a", "b"], [["c"]], [[0.0]])


def test_known_answers_keep_right_over_wrong_and_count_the_rest():
    pairs, counts = on_policy.pair(
        [Question(name, "41") for name in ("kept", "chosen wrong", "all right", "both wrong")],
        ["It is 41.", "It is 40.", "41", "7"],
        [["41", "40", "39"], ["41", "40", "39"], ["41", "It is 41.", "41.0"], ["1", "2", "3"]],
        # The right candidate is the least likely, and is not rejected for that.
        [[-9.0, -1.0, -2.0]] * 4,
    )
    assert [(pair.question, pair.chosen, pair.rejected) for pair in pairs] == [
        ("kept", "It is 41.", "39")
    ]
    assert counts == {"chosen is wrong": 2, "no candidate is wrong": 1}


def test_answers_and_domains_come_from_the_columns_beside_the_prompt(make_source):
    rows = [
        {"prompt": "p", "right": 4, "kind": "sums"},
        {"prompt": "q", "right": "Rome", "kind": "capitals"},
    ]
    source = make_source(*rows, prompts={"answer": "right", "domain": "kind"})
    assert on_policy.questions(source) == [
        Question("p", "4", "sums"),
        Question("q", "Rome", "capitals"),
    ]
    tagged = make_source(*rows, prompts={"answer": "right"}, domain="all")
    assert [question.domain for question in on_policy.questions(tagged)] == ["all", "all"]


def test_a_column_without_answers_is_told_before_any_model_is_loaded(make_source):
    source = make_source({"prompt": "p", "right": None}, prompts={"answer": "right"})
    (problem,) = on_policy.check(source, "train.preferences[0]")
    assert problem.startswith("train.preferences[0].prompts: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0, "num_candidates": 2}, "are all the same at temperature 0"),
        ({"temperature": 0, "top_p": 0.9}, "has no effect at temperature 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"domain": "x", "prompts": {"domain": "y"}}, "is given beside prompts.domain"),
    ],
)
def test_settings_without_effect_are_refused(settings, message, make_source):
    with pytest.raises(ValidationError, match=message):
        make_source(*QUESTIONS, **settings)


def test_inputs_change_with_every_setting_and_with_content_and_with_no_path(make_source, tmp_path):
    rows = [{"prompt": "p", "right": "1", "kind": "a", "other": "1"}]

    def inputs(*rows, **settings):
        return on_policy.inputs(make_source(*rows, **settings), frozenset())

    base = inputs(*rows)
    assert inputs(*rows, name="elsewhere.jsonl") == base
    assert inputs(*rows, batch_size=3) == base
    assert inputs({**rows[0], "right": "2"}) == base  # a column that nobody reads
    changes = [
        {"num_candidates": 2},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"max_new_tokens": 3},
        {"weight": 2.0},
        {"cap": 1},
        {"domain": "a"},
        {"prompts": {"answer": "right"}},
        {"prompts": {"domain": "kind"}},
        {"prompts": {"template": "Please: {prompt}"}},
    ]
    found = [inputs(*rows, **change) for change in changes]
    assert all(one != base for one in found)
    known = inputs(*rows, prompts={"answer": "right"})
    assert inputs(*rows, prompts={"answer": "other"}) == known  # another name for the same answers
    assert inputs({**rows[0], "right": "2"}, prompts={"answer": "right"}) != known
    assert inputs({**rows[0], "prompt": "r"}) != base
    assert str(tmp_path) not in json.dumps(base)


def test_the_models_make_the_files_in_turn_and_the_worst_ends_up_in_the_pairs(
    build_model, model, tokenizer, make_source, tmp_path
):
    source = make_source(
        *({**row, "kind": "k"} for row in QUESTIONS),
        prompts={"domain": "kind"},
        num_candidates=3,
        max_new_tokens=5,
    )
    prompts = {"path": source.prompts.path}
    panel = {"name": "refusal", "panel": "p", "prompts": prompts, "harmless": True}
    recipe = Recipe.model_validate(
        {
            "name": "mini",
            "model": {"name_or_path": "m"},
            "abliteration": {
                "prompts": {"harmful": prompts, "harmless": {**prompts, "slice": "1:"}}
            },
            "train": {
                "preferences": [source.model_dump(mode="json", exclude_unset=True)],
                "filters": {"direction": True},
            },
            "eval": {"benchmarks": [panel]},
        }
    )
    shelf = shelf_in(tmp_path / "shelf", tokenizer)
    pieces = pairs.Screen(recipe, shelf, tmp_path, frozenset()).pieces()
    assert [(piece.path.parent.name, piece.teacher, piece.is_last) for piece in pieces] == [
        ("answers", "original", False),
        ("candidates", "abliterated", False),
        ("scores", "original", True),
        ("refusal-probe", "original", True),
    ]
    other = build_model("llama", seed=1, dtype=torch.float32)
    for piece in pieces[:3]:
        piece.make(model if piece.teacher == "original" else other)
    unfiltered = recipe.train.model_copy(update={"filters": Filters()})
    recipe = recipe.model_copy(update={"train": unfiltered})
    screen = pairs.Screen(recipe, shelf, tmp_path, frozenset())
    found, _ = pairs.mix(recipe, screen)
    assert len(found) == 3
    own = screen.own_answers[0]
    for pair, texts, scores in zip(found, own.candidates(), own.scores(), strict=True):
        assert len(set(scores)) == 3
        assert pair.rejected == texts[scores.index(min(scores))]
        assert pair.domain == "k"
