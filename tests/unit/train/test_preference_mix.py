"""Weights and caps give the documented counts, and what trl would drop without a word is dropped aloud.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_preference_mix.py
"""

import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset
from pydantic import ValidationError
from trl import DPOConfig, DPOTrainer

from common.errors import StageError
from common.recipe import Filters, Recipe
from tests.conftest import TEMPLATE
from tests.training import shelf_in
from train import pairs, stage
from train.mixture import cap, draw, num_drawn
from train.preferences.filters import Pair, fills, filter_pairs

REFUSAL = "I'm sorry, but I can't help with that."


def test_equal_weights_draw_everything_once():
    groups = [list("abc"), [], list("defgh")]
    assert draw(groups, [2.0, 2.0, 2.0], seed=1) == groups


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([10, 10], [3.0, 1.0], [15, 5]),
        ([10, 30], [3.0, 1.0], [20, 20]),  # a weight belongs to a pair: 3 * 10 against 1 * 30
        ([10, 10, 10], [1.0, 1.0, 2.0], [8, 7, 15]),  # 7.5, 7.5 and 15: the first gets the rest
        ([10, 0], [1.0, 5.0], [10, 0]),
        ([3, 3], [0.1, 0.1], [3, 3]),
        ([1, 1000], [1.0, 1e6], [0, 1001]),
        ([], [], []),
        ([0, 0], [1.0, 2.0], [0, 0]),
    ],
)
def test_pairs_are_drawn_as_often_as_their_weights_say(sizes, weights, counts):
    assert num_drawn(sizes, weights) == counts
    assert num_drawn(sizes, [7 * weight for weight in weights]) == counts
    groups = [[(group, item) for item in range(size)] for group, size in enumerate(sizes)]
    drawn = draw(groups, weights, seed=0)
    assert [len(group) for group in drawn] == counts
    for group, found in zip(groups, drawn, strict=True):
        assert found == sorted(found)
        copies = Counter(found)
        # As even as whole numbers can be: no pair is drawn twice before every pair is drawn once.
        assert {copies[item] for item in group} <= {
            len(found) // max(len(group), 1) + k for k in (0, 1)
        }


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else():
    groups = [list(range(20)), list(range(20, 40))]
    first = draw(groups, [1.0, 2.0], seed=0)
    assert draw(groups, [1.0, 2.0], seed=0) == first
    assert draw(groups, [1.0, 2.0], seed=1) != first


def test_a_cap_draws_without_replacement_and_in_order():
    items = list(range(50))
    found = cap(items, 10, "seed")
    assert len(set(found)) == 10
    assert found == sorted(found)
    assert found == cap(items, 10, "seed")
    assert found != cap(items, 10, "another seed")
    assert cap(items, 50, "seed") == cap(items, None, "seed") == items


@pytest.fixture
def make_recipe(tmp_path):
    """Make a recipe over preference files, given as lists of rows with settings."""

    def make(*sources, **train):
        source = {"path": str(tmp_path / "prompts.txt")}
        preferences = []
        for index, (rows, settings) in enumerate(sources):
            path = tmp_path / f"pairs-{index}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            preferences.append({"name": "dataset", "path": str(path), **settings})
        return Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": "m"},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {"preferences": preferences, **train},
                "eval": {
                    "benchmarks": [
                        {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
                    ]
                },
            }
        )

    return make


@pytest.fixture
def mix(make_recipe, tokenizer, tmp_path):
    """Mix sources as the stage does."""

    def run(*sources, excluded=frozenset(), **train):
        recipe = make_recipe(*sources, **train)
        screen = pairs.Screen(recipe, shelf_in(tmp_path, tokenizer), tmp_path, excluded)
        return pairs.mix(recipe, screen)

    return run


def _rows(name, number, **more):
    return [
        {"prompt": f"{name} {n}", "chosen": "good", "rejected": "bad", **more}
        for n in range(number)
    ]


def test_sources_are_filtered_then_capped_then_weighted_and_counted(mix, caplog):
    maths = [*_rows("sum", 8), *_rows("no", 2, chosen=REFUSAL)]
    with caplog.at_level(logging.INFO, "train.pairs"):
        found, counts = mix(
            (maths, {"cap": 6, "weight": 3.0, "domain": "maths"}), (_rows("talk", 6), {})
        )
    first, second = counts.values()
    # 6 + 6 pairs in all, three to one.
    assert first == {"kept": 6, "above the cap": 2, "chosen refuses": 2, "drawn": 9}
    assert second == {"kept": 6, "drawn": 3}
    assert Counter(pair.domain for pair in found) == {"maths": 9, None: 3}
    assert len({pair.question for pair in found if pair.domain}) == 6
    assert "6 kept (9 drawn), 2 dropped: above the cap, 2 dropped: chosen refuses" in caplog.text


def test_without_settings_every_pair_is_taken_as_it_is(mix):
    found, counts = mix((_rows("a", 3), {}), (_rows("b", 2), {}))
    assert [pair.question for pair in found] == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert list(counts.values()) == [{"kept": 3}, {"kept": 2}]
    assert [name.split(":")[0] for name in counts] == ["0", "1"]


def test_the_seed_decides_what_a_cap_keeps(make_recipe, tokenizer, tmp_path):
    def kept(seed):
        recipe = make_recipe((_rows("a", 30), {"cap": 5}))
        recipe = recipe.model_copy(update={"seed": seed})
        screen = pairs.Screen(recipe, shelf_in(tmp_path, tokenizer), tmp_path, frozenset())
        return pairs.mix(recipe, screen)[0]

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


def test_nothing_left_is_an_error_with_the_counts(mix):
    with pytest.raises(StageError, match=r"left no preference pair \(0: .* 2 dropped: in a bench"):
        mix((_rows("a", 2), {}), excluded=frozenset({"a 0", "a 1"}))


@pytest.mark.parametrize("weights", [[2.0], [0.5, 0.5]])
def test_weights_that_change_no_proportion_are_refused(weights, make_recipe):
    with pytest.raises(ValidationError, match="changes no proportion"):
        make_recipe(*((_rows("a", 1), {"weight": weight}) for weight in weights))


def test_a_filter_that_needs_answers_of_stage_one_is_refused_where_it_asks_for_none(make_recipe):
    recipe = make_recipe((_rows("a", 1), {}), filters={"direction": True})
    assert pairs.check(recipe) == []
    fixed = {"name": "fixed", "layer": 1, "position": -1}
    data = recipe.model_dump(mode="json", exclude_unset=True)
    data["abliteration"]["selection"] = fixed
    (problem,) = pairs.check(Recipe.model_validate(data))
    assert problem.startswith("train.filters.direction: needs the original's answers")
    del data["train"]["filters"]
    assert pairs.check(Recipe.model_validate(data)) == []


def test_answers_without_a_worse_one_are_refused_beside_a_loss_that_compares(make_recipe):
    instructions = ([{"prompt": "p", "chosen": "good"}], {"columns": {"rejected": None}})
    (problem,) = pairs.check(make_recipe((_rows("a", 1), {}), instructions))
    assert problem.startswith("train.preferences[1].columns.rejected: is null, and sigmoid comp")
    both = {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 1.0]}
    (problem,) = pairs.check(make_recipe(instructions, trainer=both))
    assert "is null, and ipo compares" in problem
    assert pairs.check(make_recipe(instructions, trainer={"loss_type": ["sft"]})) == []


def test_a_swap_that_nothing_leads_to_is_refused(make_recipe):
    with pytest.raises(ValidationError, match="without refusals or direction"):
        make_recipe((_rows("a", 1), {}), filters={"swap": True, "refusals": False})


def test_a_swap_is_refused_where_no_source_has_another_answer(make_recipe):
    instructions = ([{"prompt": "p", "chosen": "good"}], {"columns": {"rejected": None}})
    settings = {"filters": {"swap": True}, "trainer": {"loss_type": ["sft"]}}
    with pytest.raises(
        ValidationError, match=r"swap\n.*no other answer could be chosen; delete it"
    ):
        make_recipe(instructions, **settings)
    make_recipe(instructions, (_rows("a", 1), {}), **settings)


def test_the_stages_inputs_change_with_every_filter_and_with_nothing_else(make_recipe):
    def inputs(**train):
        return stage.inputs(make_recipe((_rows("a", 2), {}), **train), frozenset())

    base = inputs()
    assert inputs(filters={"refusals": True, "direction": False}) == base
    assert inputs(trainer={"logging_steps": 3}) == base
    for name, default in Filters():
        assert inputs(filters={name: not default}) != base


# Opens answers with words that stand in no finished conversation: prompts end before their own end.
PARTING = TEMPLATE.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nthinking{% endif %}")


@pytest.mark.parametrize("template", [TEMPLATE, PARTING])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.filterwarnings("ignore")  # trl's own
def test_what_is_dropped_as_too_long_is_what_trl_would_drop(
    template, mode, make_tokenizer, make_recipe, tmp_path
):
    tokenizer = make_tokenizer(template)
    found = [
        Pair((("system", "s"), ("user", "x" * n)), "good" * (n % 3 + 1), "bad", "here")
        for n in range(1, 40)
    ]
    settings = {"max_length": 30, "truncation_mode": mode}
    trl = DPOTrainer._prepare_dataset(
        SimpleNamespace(),
        Dataset.from_list([{**pair.as_row(), "n": n} for n, pair in enumerate(found)]),
        tokenizer,
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings),
        "train",
    )
    recipe = make_recipe((_rows("a", 1), {}), trainer=settings)
    is_overlong = fills(tokenizer, pairs._row_length(recipe))
    kept, counts = filter_pairs(found, frozenset(), is_overlong=is_overlong)
    assert kept == [found[n] for n in trl["n"]]
    if mode == "keep_start":
        assert 0 < len(kept) < len(found)
        assert counts["prompt fills max_length"] == len(found) - len(kept)
    else:
        assert kept == found


def test_trls_own_max_length_holds_where_the_recipe_names_none(make_recipe):
    assert pairs._row_length(make_recipe((_rows("a", 1), {}))) == 1024
    assert pairs._row_length(make_recipe((_rows("a", 1), {}), trainer={"max_length": None})) is None
