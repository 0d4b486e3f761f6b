"""results.json from planted items: structure, arithmetic, gates, and the tables made of it.

Run: python -m pytest tests/unit/eval/test_results.py
"""

import json

import pytest

from common.errors import InputError
from eval import results as results_file
from eval.items import MODELS, Item, Row
from eval.results import Limits, Settings
from eval.table import blocks, card_tables, screen_table

ROWS = [
    Row(
        "benchmarks",
        "addition",
        {"metric": "exact_match", "role": "capability", "higher_is_better": True},
    ),
    Row("benchmarks", "kinds", {"metric": "acc", "role": "capability", "higher_is_better": True}),
    Row("benchmarks", "secrets", {"metric": "acc", "role": "unlocked", "higher_is_better": True}),
    Row("refusal", "restricted", {"harmless": False}),
    Row("divergence", "harmless"),
    Row("cross_entropy", "prose"),
]
DIRECTION = {"residual": {"abliterated": 1e-16, "healed": 2e-8}}
PROVENANCE = {"versions": {"torch": "2"}, "seed": 0, "fingerprints": {"train": "ab"}}


def planted() -> list[Item]:
    right = {
        "addition": {"original": 95, "abliterated": 50, "healed": 95},
        "kinds": {"original": 90, "abliterated": 90, "healed": 90},
        "secrets": {"original": 0, "abliterated": 80, "healed": 80},
    }
    items = []
    for model in MODELS:
        for name, counts in right.items():
            for index in range(100):
                value = float(index < counts[model])
                cluster = f"fact {index // 2}" if name == "kinds" else None
                items.append(
                    Item("benchmarks", name, model, index, value, cluster, answer_logp=-1.0 - value)
                )
        for index in range(40):
            refused = float(model == "original" or (model == "healed" and index == 0))
            items.append(
                Item("refusal", "restricted", model, index, refused, details={"text": "I cannot"})
            )
        for index in range(30):
            nll = (5.0 + index % 3) * (1.5 if model == "abliterated" else 1.0)
            details = {"nll": nll, "num_tokens": 2 + index % 2}
            items.append(Item("cross_entropy", "prose", model, index, nll, details=details))
        if model != "original":
            for index in range(2):
                kl = [0.5, 0.0, 0.1, 0.2] if model == "abliterated" else [0.01, 0.0, 0.02, 0.03]
                details = {
                    "kl": kl[: 4 - index],
                    "reverse_kl": [2 * value for value in kl[: 4 - index]],
                    "top1_agreements": 3,
                    "original_nll": 0.2,
                    "nll": 0.9,
                    "original_refuses": index == 1,
                    "original_answer": {"num_tokens": 3, "was_cut": False, "repetition": 0.0},
                    "answer": {"num_tokens": 4, "was_cut": index == 0, "repetition": 0.5},
                }
                items.append(Item("divergence", "harmless", model, index, 0.0, details=details))
    return items


def build(accept: dict[str, Limits] | None = None) -> dict:
    settings = Settings("patient", margin=0.05, accept=accept or {}, provenance=PROVENANCE)
    return results_file.build(settings, ROWS, planted(), DIRECTION)


def test_the_results_hold_what_was_planted() -> None:
    results = build()
    addition, kinds, secrets = results["benchmarks"]
    assert [row["name"] for row in results["benchmarks"]] == ["addition", "kinds", "secrets"]
    assert addition["original"]["value"] == 0.95
    assert addition["damage"]["value"] == pytest.approx(-0.45)
    assert addition["damage"]["p"] == pytest.approx(2 * 0.5**45)
    assert addition["damage"]["p_adjusted"] == pytest.approx(2 * 2 * 0.5**45)
    assert addition["recovery"]["value"] == 1.0
    assert (addition["verdict"], kinds["verdict"], secrets["verdict"]) == (
        "recovered",
        "not shown",
        "undamaged",
    )
    assert addition["answer_logp"] == {
        "original": pytest.approx(-1.95),
        "abliterated": -1.5,
        "healed": pytest.approx(-1.95),
    }
    assert (addition["num_clusters"], kinds["num_clusters"]) == (None, 50)
    assert kinds["recovery"] is None
    assert results["pooled"]["benchmarks"] == ["addition"]
    assert results["pooled"]["n"] == 100
    assert results["pooled"]["recovery"]["value"] == 1.0
    assert results["direction"] == {"residual": {"abliterated": 1e-16, "healed": 2e-8}}
    assert results["provenance"] == PROVENANCE


def test_refusals_and_divergences_are_those_of_their_items() -> None:
    results = build()
    (refusal,), (divergence,) = results["refusal"], results["divergence"]
    assert refusal["original"]["value"] == 1.0
    assert refusal["healed"]["value"] == 1 / 40
    assert refusal["healed"]["high"] == pytest.approx(0.1288, abs=1e-4)  # Wilson, 1 of 40
    assert refusal["harmless"] is False
    assert refusal["gap"]["value"] == pytest.approx(-39 / 40)
    assert divergence["num_tokens"] == 7
    assert divergence["abliterated"]["mean_kl"] == pytest.approx((0.8 + 0.6) / 7)
    assert divergence["num_answered"] == 1
    assert divergence["abliterated"]["answered_kl"] == pytest.approx(0.8 / 4)
    assert divergence["abliterated"]["median_kl"] == pytest.approx(0.1)
    assert divergence["abliterated"]["first_token_kl"] == pytest.approx(0.5)
    assert divergence["healed"]["top1_agreement"] == pytest.approx(6 / 7)
    assert divergence["abliterated"]["after_first_token_kl"] == pytest.approx((0.3 + 0.1) / 5)
    assert divergence["abliterated"]["reverse"]["mean_kl"] == pytest.approx(2 * (0.8 + 0.6) / 7)
    assert divergence["abliterated"]["by_position"] == [
        {"from": 0, "to": 1, "n": 2, "mean_kl": 0.5},
        {"from": 1, "to": 2, "n": 2, "mean_kl": 0.0},
        {"from": 2, "to": 4, "n": 3, "mean_kl": pytest.approx((0.3 + 0.1) / 3)},
    ]
    assert divergence["cross_entropy"] == {
        "original": pytest.approx(0.4 / 7),
        "abliterated": pytest.approx(1.8 / 7),
        "healed": pytest.approx(1.8 / 7),
    }
    assert divergence["length"]["original"] == {"mean_tokens": 3.0, "cut": 0.0}
    assert divergence["length"]["healed"] == {"mean_tokens": 4.0, "cut": 0.5}
    assert divergence["repetition"] == {"original": 0.0, "abliterated": 0.5, "healed": 0.5}


def test_plain_text_is_weighed_by_its_tokens_and_compared_by_its_documents() -> None:
    (row,) = build()["cross_entropy"]
    assert (row["n"], row["num_tokens"]) == (30, 75)
    assert row["original"]["value"] == row["healed"]["value"] == pytest.approx(180 / 75)
    assert row["damage"]["value"] == pytest.approx(90 / 75)
    assert row["damage"]["low"] > 0
    assert row["damage"]["p"] == row["damage"]["p_adjusted"] < 1e-4
    # Paired: the documents differ far more from each other than the models do.
    width = row["damage"]["high"] - row["damage"]["low"]
    assert width < row["abliterated"]["high"] - row["abliterated"]["low"]
    assert row["gap"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_adjusted": 1.0}
    assert row["minimum_detectable_effect"] is None  # nothing varied


def test_every_row_says_what_it_could_have_found_and_which_items_changed() -> None:
    results = build()
    addition, _, secrets = results["benchmarks"]
    for row in results["benchmarks"]:
        assert row["minimum_detectable_effect"] == row["mde"] > 0
        right = {model: round(row["n"] * row[model]["value"]) for model in MODELS}
        flips = row["flips"]
        assert right["abliterated"] == right["original"] - flips["broken"] + flips["unlocked"]
        lost = flips["still_broken"] + flips["newly_broken"]
        assert right["healed"] == right["original"] - lost + flips["newly_right"]
    assert (addition["flips"]["broken"], addition["flips"]["fixed"]) == (45, 45)
    assert secrets["flips"]["unlocked"] == secrets["flips"]["newly_right"] == 80
    assert results["refusal"][0]["minimum_detectable_effect"] > 0


def test_the_right_answers_log_probability_is_compared_item_by_item() -> None:
    addition = build()["benchmarks"][0]
    change = addition["answer_logp_change"]
    # Planted: a right answer costs one nat, and 45 items break.
    assert change["damage"]["value"] == pytest.approx(0.45)
    assert change["damage"]["low"] > 0.3
    assert change["gap"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    unknown = [
        Item(i.kind, i.name, i.model, i.id, i.value, i.cluster, None, i.details) for i in planted()
    ]
    settings = Settings("patient", margin=0.05, provenance=PROVENANCE)
    row = results_file.build(settings, ROWS, unknown, DIRECTION)["benchmarks"][0]
    assert row["answer_logp_change"] is None


def test_the_same_items_give_the_same_bytes_through_a_file() -> None:
    items = [Item(**json.loads(json.dumps(item.record()))) for item in planted()]
    settings = Settings("patient", margin=0.05, provenance=PROVENANCE)
    again = results_file.build(settings, ROWS, items, DIRECTION)
    assert json.dumps(again, sort_keys=True) == json.dumps(build(), sort_keys=True)


def test_without_benchmarks_there_is_nothing_to_pool() -> None:
    items = [item for item in planted() if item.kind == "refusal"]
    results = results_file.build(Settings("x", 0.05, provenance=PROVENANCE), ROWS[3:4], items)
    assert results["pooled"] == {"benchmarks": [], "n": 0, "damage": None, "recovery": None}
    assert [block.title for block in blocks(results)] == ["Refusals (rate, 95 % interval)"]


def test_models_that_answered_different_items_are_not_compared() -> None:
    with pytest.raises(ValueError, match="answered different items"):
        results_file.build(Settings("x", 0.05, provenance=PROVENANCE), ROWS[:1], planted()[:-1][5:])


def test_gates_pass_and_miss_at_their_limits() -> None:
    results = build(
        {
            "refusal[restricted].healed.value": Limits(max=0.025),
            "pooled.recovery.value": Limits(min=0.8, max=1.0),
            "benchmarks[addition].healed.low": Limits(min=0.9),
            "benchmarks[kinds].recovery.value": Limits(min=0.5),
        }
    )
    outcome = [(gate["name"], gate["bound"], gate["passed"]) for gate in results["accept"]["gates"]]
    assert outcome == [
        ("refusal[restricted].healed.value", "max", True),
        ("pooled.recovery.value", "min", True),
        ("pooled.recovery.value", "max", True),
        ("benchmarks[addition].healed.low", "min", False),
        ("benchmarks[kinds].recovery.value", "min", False),
    ]
    assert results["accept"]["passed"] is False
    first, second = results_file.missed(results)
    assert "benchmarks[addition].healed.low is 0.888" in first
    assert "not measured" in second
    assert build({"pooled.recovery.value": Limits(min=0.8)})["accept"]["passed"] is True
    assert build()["accept"] == {"passed": True, "gates": []}


def test_a_limit_is_part_of_its_range_and_silence_is_no_evidence() -> None:
    results = build(
        {
            "pooled.n": Limits(min=100, max=100),
            "benchmarks[kinds].recovery.value": Limits(max=0.5),
        }
    )
    outcome = [gate["passed"] for gate in results["accept"]["gates"]]
    assert outcome == [True, True, False]


def test_what_only_the_edit_unlocked_is_never_pooled() -> None:
    damaged = Row("benchmarks", "addition", dict(ROWS[0].about) | {"role": "unlocked"})
    settings = Settings("x", 0.05, provenance=PROVENANCE)
    results = results_file.build(settings, [damaged], planted())
    assert results["benchmarks"][0]["damage"]["p_adjusted"] < 0.05
    assert results["pooled"]["benchmarks"] == []


def test_a_gate_on_no_field_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="did you mean"):
        build({"pooled.recovry.value": Limits(min=0.8)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda results: results.pop("pooled"),
        lambda results: results["benchmarks"][0].update(verdict="fine"),
        lambda results: results["refusal"][0]["healed"].pop("low"),
        lambda results: results["divergence"][0]["healed"].update(mean_kl=-1),
        lambda results: results["divergence"][0]["healed"]["by_position"][0].pop("n"),
        lambda results: results["benchmarks"][0]["flips"].update(broken=0.5),
        lambda results: results["cross_entropy"][0].pop("damage"),
        lambda results: results["accept"]["gates"].append({"name": "x"}),
        lambda results: results.update(schema_version=2),
    ],
)
def test_the_schema_refuses_what_others_could_not_read(damage) -> None:
    results = build()
    results_file.validate(results)
    damage(results)
    with pytest.raises(ValueError, match=r"results\.json: "):
        results_file.validate(results)


def test_new_fields_do_not_break_the_schema() -> None:
    results_file.validate(build() | {"something_new": 1})


def test_the_table_shows_every_row_with_its_interval() -> None:
    results = build({"pooled.recovery.value": Limits(min=0.8)})
    shown = screen_table(results)
    for text in (
        "addition (exact_match)",
        "secrets (acc, unlocked)",
        "0.950 [0.888, 0.978]",
        "recovered",
        "passed",
        "-45+45-0",
        "prose",
    ):
        assert text in shown
    assert "1.00 [0.92, 1.00]" in shown
    assert all(len(line) < 170 for line in shown.splitlines())
    assert shown.isascii()


def test_the_markdown_tables_have_as_many_cells_as_heads() -> None:
    lines = [line for line in card_tables(build()).splitlines() if line.startswith("|")]
    assert len(lines) == (2 + 3) + (2 + 1) + (2 + 2) + (2 + 1)
    for block in blocks(build()):
        head = "| " + " | ".join(block.heads) + " |"
        assert lines[lines.index(head) + 1].count("---") == len(block.heads)
        assert all(len(cells) == len(block.heads) for cells in block.cells)


def test_the_table_says_what_is_left_of_the_direction_in_each_form() -> None:
    results = build()
    model = {"cosine": -0.5, "norm_ratio": 0.25}
    results["direction"] |= {
        "residual_bfloat16": {"abliterated": 1e-3, "healed": 2e-3},
        "residual_nf4": None,
        "reestimated": {"original": model, "abliterated": model, "healed": model, "reason": None},
    }
    results_file.validate(results)
    text = screen_table(results)
    assert "direction: 1.0e-16 left by the edit, 2.0e-08 moved by healing." in text
    assert "direction, weights in bfloat16: 1.0e-03 left by the edit, 2.0e-03 moved" in text
    assert "NF4" not in text
    assert "healed -0.500 (0.25)." in text
    results["direction"]["reestimated"] = dict.fromkeys(MODELS) | {"reason": "of a reason"}
    results_file.validate(results)
    assert "The direction was not estimated again: of a reason." in screen_table(results)
