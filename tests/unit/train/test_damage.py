"""Only what the edit surely broke is weighed up: planted damage is found, and the draw follows it.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_damage.py
"""

import json
import logging
from collections import Counter

import pytest
from pydantic import ValidationError

from common import artifacts
from common.recipe import Recipe
from eval.quick import QuickEvaluation
from tests.training import shelf_in
from train import damage, pairs, stage
from train.damage import DamageAwareMix
from train.mixture import shares

DOMAINS = ("addition", "capitals", "reversal")
NUM_QUESTIONS, NUM_PAIRS = 40, 20


@pytest.mark.parametrize(
    ("damages", "sizes", "floor", "cap", "expected"),
    [
        # All that is not floor goes to the one that is damaged,
        ([0.5, 0, 0], [1, 1, 1], 0.1, 1.0, [0.8, 0.1, 0.1]),
        # up to the cap; the others take the rest by their sizes,
        ([0.5, 0, 0], [1, 3, 1], 0.1, 0.6, [0.6, 0.1 + 0.2 * 0.75, 0.1 + 0.2 * 0.25]),
        # which cuts none that has more as it comes.
        ([0.5, 0, 0], [80, 10, 10], 0.05, 0.5, [0.8, 0.1, 0.1]),
        ([0.5, 0, 0], [90, 5, 5], 0.2, 0.5, [0.6, 0.2, 0.2]),
        # the damaged ones before them.
        ([0.9, 0.1, 0], [1, 1, 1], 0.1, 0.5, [0.5, 0.4, 0.1]),
        ([0.3, 0.1, 0], [1, 5, 9], 0.0, 1.0, [0.75, 0.25, 0.0]),
        ([0.3, 0.3], [1, 99], 0.1, 0.6, [0.5, 0.5]),
        # Too few domains for the cap.
        ([0.3], [7], 0.0, 0.5, [1.0]),
        ([0.3, 0.0], [7, 7], 0.0, 0.4, [0.5, 0.5]),
    ],
)
def test_shares_follow_damage_between_floor_and_cap(damages, sizes, floor, cap, expected):
    found = shares(damages, sizes, floor, cap)
    assert found == pytest.approx(expected)
    assert sum(found) == pytest.approx(1)
    assert shares([7 * d for d in damages], sizes, floor, cap) == pytest.approx(found)


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.fixture
def make_recipe(tmp_path):
    """A recipe with pairs of three domains, an anchor on prompts of the same, and questions about them."""
    asked = [
        {"prompt": f"ask {domain} {n}", "right": str(n), "kind": domain}
        for domain in DOMAINS
        for n in range(NUM_QUESTIONS)
    ]
    files = {
        "asked": _write(tmp_path / "asked.jsonl", asked),
        "prompts": _write(
            tmp_path / "prompts.jsonl",
            [{"prompt": f"tell {d} {n}", "kind": d} for d in DOMAINS for n in range(NUM_PAIRS)],
        ),
        "other": _write(tmp_path / "other.jsonl", [{"prompt": f"bad {n}"} for n in range(4)]),
    }

    def rows(domains):
        return [
            {"prompt": f"{d} {n}", "chosen": "good", "rejected": "bad", "kind": d}
            for d in domains
            for n in range(NUM_PAIRS)
        ]

    def make(mix=None, *, domains=DOMAINS, columns=None, anchor=None, **train):
        questions = {**files["asked"], "answer": "right", "domain": "kind"}
        source = _write(tmp_path / "pairs.jsonl", rows(domains))
        named = {"domain": "kind"} if columns is None else columns
        prompts = {**files["prompts"], "domain": "kind"} if anchor is None else anchor
        return Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": "m"},
                "abliteration": {
                    "prompts": {
                        "harmful": files["other"],
                        "harmless": {**files["other"], "slice": "1:"},
                    }
                },
                "train": {
                    "preferences": [{"name": "dataset", **source, "columns": named}],
                    "anchors": [{"to": "original", "prompts": prompts}],
                    "mix": {"questions": questions, **(mix or {})},
                    **train,
                },
                "eval": {
                    "benchmarks": [
                        {
                            "name": "refusal",
                            "panel": "p",
                            "prompts": files["other"],
                            "harmless": True,
                        }
                    ]
                },
            }
        )

    return make


@pytest.fixture
def plant(tokenizer, tmp_path):
    """Make the mix of a recipe where the abliterated model answers so many questions of each domain right."""

    def make(recipe, right):
        settings = recipe.train.mix
        shelf = shelf_in(tmp_path / "shelf", tokenizer)
        found = DamageAwareMix(settings, QuickEvaluation(settings, 0), shelf, recipe.seed)
        for own, counts in zip(found._answers, ({}, right), strict=True):
            texts = [
                f"It is {n}." if n < counts.get(domain, NUM_QUESTIONS) else "no idea"
                for domain in DOMAINS
                for n in range(NUM_QUESTIONS)
            ]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            own.path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_jsonl(own.path, [{"tokens": one} for one in ids])
        return found

    return make


@pytest.mark.parametrize("broken", DOMAINS)
def test_the_one_broken_domain_is_found_and_drawn_most(
    broken, make_recipe, plant, tokenizer, tmp_path, caplog
):
    recipe = make_recipe()
    # Beside it one domain that loses a single answer, which is nothing sure.
    slight = next(domain for domain in DOMAINS if domain != broken)
    by_damage = plant(recipe, {broken: 15, slight: NUM_QUESTIONS - 1})
    screen = pairs.Screen(recipe, shelf_in(tmp_path, tokenizer), tmp_path, frozenset())
    with caplog.at_level(logging.INFO, "train"):
        found, counts = pairs.mix(recipe, screen, by_damage)
    total = len(DOMAINS) * NUM_PAIRS
    drawn = Counter(pair.domain for pair in found)
    assert drawn == {domain: total // 2 if domain == broken else total // 4 for domain in DOMAINS}
    assert next(iter(counts.values())) == {"kept": total, "drawn": total}
    record = by_damage.record()
    json.dumps(record)
    assert {name: one["significant"] for name, one in record["damage"].items()} == {
        domain: domain == broken for domain in DOMAINS
    }
    assert record["damage"][broken]["difference"]["value"] == pytest.approx(-25 / 40)
    low, high = (record["damage"][broken]["difference"][end] for end in ("low", "high"))
    assert low < -25 / 40 < high < 0
    assert record["drawn"]["pairs"][broken] == {"available": 20, "weight": 1.5, "drawn": 30}
    assert f"{broken} 30 of 20" in caplog.text
    assert f"{broken}: the edit took 1.000 to 0.375" in caplog.text


def test_an_undamaged_domain_keeps_its_floor_and_a_damaged_one_its_cap(make_recipe, plant):
    by_damage = plant(make_recipe({"floor": 0.2, "cap": 0.9}), {"capitals": 0})
    items = [(domain, n) for domain in DOMAINS for n in range(NUM_PAIRS)]
    (drawn,) = by_damage.draw("rows", [items], [[domain for domain, _ in items]], [1.0])
    assert Counter(domain for domain, _ in drawn) == {
        "addition": 12,
        "capitals": 36,
        "reversal": 12,
    }


def test_where_nothing_is_surely_damaged_everything_is_drawn_once(make_recipe, plant):
    by_damage = plant(make_recipe(), {"capitals": NUM_QUESTIONS - 2})
    items = [["a", "b"], ["c"]]
    assert by_damage.draw("rows", items, [["capitals", None], ["addition"]], [1.0, 1.0]) == items


def test_within_a_domain_the_sources_weights_hold(make_recipe, plant):
    by_damage = plant(make_recipe({"floor": 0.0, "cap": 0.75}), {"addition": 0})
    groups = [list(range(30)), list(range(30, 60)), list(range(60, 120))]
    domains = [["addition"] * 30, ["addition"] * 30, [None] * 60]
    drawn = by_damage.draw("rows", groups, domains, [2.0, 1.0, 1.0])
    assert [len(group) for group in drawn] == [60, 30, 30]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"columns": {}, "anchor": {"path": "prompts"}},
            "no pair and no anchor's prompt has a dom",
        ),
        (
            {"domains": ["talk", "code"], "anchor": {"path": "prompts"}},
            "what is trained on is code",
        ),
        ({"domains": ["addition"], "anchor": {"path": "prompts"}}, "is of one domain"),
        ({"mix": {"floor": 0.4}}, "train.mix.floor: 0.4 for each of the 3 domains of train.pref"),
    ],
)
def test_a_mix_without_effect_is_refused_before_a_model_is_loaded(
    changes, message, make_recipe, tmp_path
):
    if "anchor" in changes:
        changes = {**changes, "anchor": {"path": str(tmp_path / "prompts.jsonl")}}
    assert damage.check(make_recipe()) == []
    assert message in " ".join(damage.check(make_recipe(**changes)))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"questions": {"path": "q.jsonl"}}, "is missing; name the column"),
        ({"floor": 0.5}, "not below cap 0.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(mix, message, make_recipe):
    with pytest.raises(ValidationError, match=message):
        make_recipe(mix)


def test_domains_that_no_mix_reads_are_refused(make_recipe, tmp_path):
    data = make_recipe().model_dump(mode="json", exclude_unset=True)
    del data["train"]["mix"]
    with pytest.raises(ValidationError, match=r"has no effect without train\.mix"):
        Recipe.model_validate(data)
    data = make_recipe().model_dump(mode="json", exclude_unset=True)
    data["train"]["anchors"][0]["to"] = "abliterated"
    with pytest.raises(ValidationError, match="knows nothing of damage"):
        Recipe.model_validate(data)


def test_the_stages_inputs_change_with_the_mix_and_the_questions_content(make_recipe, tmp_path):
    def inputs(*arguments, **changes):
        return stage.inputs(make_recipe(*arguments, **changes), frozenset())

    base = inputs()
    assert inputs({"batch_size": 3}) == base
    assert inputs({"floor": 0.1}) != base
    assert inputs({"max_new_tokens": 3}) != base
    untagged = {"path": str(tmp_path / "prompts.jsonl")}
    assert inputs(anchor=untagged) != base
    path = tmp_path / "asked.jsonl"
    path.write_text(path.read_text().replace('"right": "3"', '"right": "4"'))
    assert inputs()["mix"]["questions"] != base["mix"]["questions"]
    assert str(tmp_path) not in json.dumps(base)
