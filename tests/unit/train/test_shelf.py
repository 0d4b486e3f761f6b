"""What the two models say is asked once, whichever training wants it, and never served for anything else.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_shelf.py
"""

import json
import multiprocessing
from collections import Counter

import pytest
import torch

from common import artifacts
from common.edits import save_edit
from common.errors import StageError
from common.model import load_tokenizer
from common.recipe import Recipe
from eval.quick import QuickEvaluation
from tests.editing import edit_of, vector
from train import material, pairs, plan, run, shelf
from train.anchors import TeacherRow, load_rows, save_rows
from train.damage import DamageAwareMix
from train.shelf import Answers, shelf_of
from train.stopping import Baseline

QUESTIONS = [
    {"prompt": f"{kind} {n}", "kind": kind, "right": str(n)}
    for kind in ("sums", "towns")
    for n in range(3)
]

UNMIXED = {"train__mix": None, "train__anchors__0__prompts__domain": None}


@pytest.fixture
def ablated(build_model, tokenizer, tmp_path):
    """A folder of stage one: another model than the original, an edit, and answers to calibrate a filter on."""
    folder = tmp_path / "abliteration"
    model = build_model("llama", seed=5, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_edit(edit_of(model, about={"layer": 1}), folder / "edit.safetensors")
    return folder


@pytest.fixture
def make_recipe(model_folder, tmp_path):
    """A recipe with two sources, two anchors, a mix and stopping by the same questions; changes by dotted key."""
    for name, rows in {
        "asked": QUESTIONS,
        "healing": [{"prompt": f"heal {row['prompt']}", "kind": row["kind"]} for row in QUESTIONS],
        "bad": [{"prompt": f"bad {n}"} for n in range(3)],
        "good": [{"prompt": f"good {n}"} for n in range(3)],
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("asked", "bad", "good")}
    healing = {"path": str(tmp_path / "healing.jsonl"), "domain": "kind"}
    questions = {**paths["asked"], "answer": "right", "domain": "kind"}
    short = {"max_new_tokens": 4}

    def make(**changes):
        data = {
            "name": "mini",
            "output_dir": str(tmp_path / "runs"),
            "model": {"name_or_path": str(model_folder), "dtype": "float32"},
            "abliteration": {"prompts": {"harmful": paths["bad"], "harmless": paths["good"]}},
            "train": {
                "preferences": [
                    {"name": "on_policy", "prompts": healing, "num_candidates": 2, **short}
                ],
                "filters": {"refusals": False, "identical": False},
                "anchors": [
                    {"to": "original", "prompts": healing, **short},
                    {"to": "abliterated", "prompts": paths["bad"], **short},
                ],
                "mix": {"questions": questions, **short},
                "stopping": {
                    "questions": questions,
                    "harmful": paths["bad"],
                    "harmless": paths["good"],
                    **short,
                },
            },
            "eval": {
                "benchmarks": [
                    {"name": "refusal", "panel": "p", "prompts": paths["good"], "harmless": True}
                ]
            },
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            inner = data
            for parent in parents:
                inner = inner[int(parent)] if parent.isdigit() else inner.setdefault(parent, {})
            inner[last] = value
        return Recipe.model_validate(data)

    return make


@pytest.fixture
def prepare(ablated, monkeypatch):
    """Make the material as the stage does; gives it, the models that were loaded and the prompts they answered."""
    asked: Counter[str] = Counter()
    loaded: list[str] = []
    generate, load_teacher = shelf.generate, material._load_teacher

    def counting(model, tokenizer, prompts, **settings):
        asked.update(f"{settings['description']}: {prompt}" for prompt in prompts)
        return generate(model, tokenizer, prompts, **settings)

    def loading(recipe, teacher, upstream):
        loaded.append(teacher)
        return load_teacher(recipe, teacher, upstream)

    for module in (shelf, pairs.on_policy):
        monkeypatch.setattr(module, "generate", counting)
    monkeypatch.setattr(material, "_load_teacher", loading)

    def run(recipe):
        asked.clear()
        loaded.clear()
        base = ablated / "model"
        own = shelf_of(recipe, base, load_tokenizer(base))
        mix, halt = recipe.train.mix, recipe.train.stopping
        by_damage = mix and DamageAwareMix(mix, QuickEvaluation(mix, 0), own, recipe.seed)
        baseline = halt and Baseline(halt, QuickEvaluation(halt, 0), own)
        more = baseline.pieces if baseline else ()
        upstream = {"abliteration": ablated}
        found = material.prepare(recipe, own, upstream, frozenset(), more, by_damage)
        return found, list(loaded), Counter(asked)

    return run


def _same(one, other):
    assert one.pairs == other.pairs
    for rows, others in zip(one.anchors, other.anchors, strict=True):
        assert [(row.prompt, row.answer) for row in rows] == [(r.prompt, r.answer) for r in others]
        for row, its in zip(rows, others, strict=True):
            assert torch.equal(row.top_logps, its.top_logps)


def test_each_model_is_asked_once_for_sources_anchors_mix_and_stopping(prepare, make_recipe):
    _, loaded, asked = prepare(make_recipe())
    assert loaded == ["original", "abliterated", "original"]
    greedy = [row["prompt"] for row in QUESTIONS] + [
        f"{k} {n}" for k in ("bad", "good") for n in range(3)
    ]
    heal = [f"heal {row['prompt']}" for row in QUESTIONS]
    assert asked == Counter(
        {
            **{f"answers of the original model: {prompt}": 1 for prompt in [*greedy, *heal]},
            **{f"answers of the abliterated model: {prompt}": 1 for prompt in greedy},
            # Two candidates each.
            **{f"answers of the abliterated model: {prompt}": 2 for prompt in heal},
        }
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"train__trainer": {"learning_rate": 1e-3, "beta": 0.5, "loss_type": ["ipo"]}},
        {"train__adapter": {"r": 4}, "train__keep_ablated": "none", "train__l2": 1.0},
        {"train__anchors__0__weight": 3.0, "train__anchors__0__batch_size": 3, "name": "other"},
        {"train__mix__floor": 0.2, "train__stopping__every": 3},
        {"train__preferences__0__cap": 2, "train__preferences__0__batch_size": 5},
    ],
    ids=["trainer", "adapter", "anchors", "looks", "pairs"],
)
def test_a_second_training_asks_nobody(changes, prepare, make_recipe):
    first, _, _ = prepare(make_recipe())
    again, loaded, asked = prepare(make_recipe(**changes))
    assert (loaded, asked) == ([], Counter())
    if "train__preferences__0__cap" not in changes and "train__mix__floor" not in changes:
        _same(again, first)


def test_another_seed_samples_anew_and_asks_no_greedy_answer_again(prepare, make_recipe):
    prepare(make_recipe())
    _, loaded, asked = prepare(make_recipe(seed=1))
    assert loaded == ["abliterated", "original"]
    assert sum(asked.values()) == 2 * len(QUESTIONS)
    greedy = {"train__preferences__0__temperature": 0, "train__preferences__0__num_candidates": 1}
    prepare(make_recipe(**greedy))
    assert prepare(make_recipe(seed=1, **greedy))[1] == []


def test_what_changed_is_asked_again_and_nothing_else(prepare, make_recipe, tmp_path):
    prepare(make_recipe())
    with (tmp_path / "bad.jsonl").open("a") as file:
        file.write('{"prompt": "bad 9"}\n')
    _, loaded, asked = prepare(make_recipe())
    assert loaded == ["original", "abliterated"]
    assert {text.split(": ")[1] for text in asked} == {"bad 0", "bad 1", "bad 2", "bad 9"}
    _, loaded, asked = prepare(make_recipe(train__anchors__1__top_k=3))
    assert (loaded, asked) == (["abliterated"], Counter()), "the answers are there"
    longer = {"train__anchors__1__max_new_tokens": 5}
    _, loaded, asked = prepare(make_recipe(**longer))
    assert (loaded, sum(asked.values())) == (["abliterated"], 4)


def test_streams_are_kept_anew_for_another_size_or_edit_and_for_no_other_weight(
    prepare, make_recipe, ablated, build_model
):
    def held(**settings):
        return prepare(make_recipe(train__anchors__0__residual=settings))

    plain, _, _ = prepare(make_recipe())
    assert all(row.streams is None for row in plain.anchors[0])
    first, loaded, asked = held(size=4)
    assert (loaded, asked) == (["original"], Counter()), "the answers are there"
    assert {row.streams.shape[1:] for row in first.anchors[0]} == {(3, 4)}
    sketch, none = (lessons.sketch() for lessons in first.lessons)
    unit = vector() / vector().norm()
    assert (sketch.size, none) == (4, None)
    assert abs(float(sketch.removed @ unit)) == pytest.approx(1, abs=1e-6)
    assert all(row.streams is None for row in first.anchors[1])
    _same(first, plain)
    assert held(size=4, weight=2.0)[1] == []
    assert held(size=5)[1] == ["original"]
    model = build_model("llama", seed=5, dtype=torch.float32)
    other = edit_of(model, "orthogonalize", vector(8), about={"layer": 1})
    save_edit(other, ablated / "edit.safetensors")
    assert "original" in held(size=4)[1]


@pytest.mark.parametrize("mixed", [True, False])
def test_prompts_that_a_teacher_refuses_are_left_out_of_its_anchor(
    mixed, prepare, make_recipe, tokenizer, monkeypatch
):
    changes = {} if mixed else UNMIXED
    whole, _, _ = prepare(make_recipe(**changes, train__anchors__0__drop_refusals=False))
    assert whole.refused == [0, 0]
    refused = [tokenizer.decode(row.answer, skip_special_tokens=True) for row in whole.anchors[0]]
    refused = set(refused[:2])
    monkeypatch.setattr(material, "is_refusal", lambda text: text in refused)
    found, loaded, _ = prepare(make_recipe(**changes))
    assert loaded == []
    assert found.refused[0] >= 2
    assert len(found.anchors[0]) == len(QUESTIONS) - found.refused[0]
    texts = {tokenizer.decode(row.answer, skip_special_tokens=True) for row in found.anchors[0]}
    assert texts.isdisjoint(refused)
    kept = prepare(make_recipe(**changes, train__anchors__0__drop_refusals=False))[0]
    assert len(kept.anchors[0]) == len(QUESTIONS)
    monkeypatch.setattr(material, "is_refusal", lambda text: True)
    with pytest.raises(StageError, match=r"anchors\[0\]: the original model refuses all 6 prompts"):
        prepare(make_recipe(**changes))


def test_another_model_is_asked_itself(prepare, make_recipe, build_model, ablated):
    first, _, _ = prepare(make_recipe())
    build_model("llama", seed=6, dtype=torch.float32).save_pretrained(ablated / "model")
    again, loaded, asked = prepare(make_recipe())
    # The original judges the new candidates, and answers nothing again.
    assert loaded == ["abliterated", "original"]
    assert not any("original" in text for text in asked)
    assert again.pairs != first.pairs


def test_another_template_or_number_type_is_another_model(ablated, make_recipe, tokenizer):
    def models(recipe):
        return shelf_of(recipe, ablated / "model", tokenizer).models

    before = models(make_recipe())
    assert models(make_recipe()) == before
    narrow = make_recipe(model__dtype="bfloat16")
    assert all(models(narrow)[name] != before[name] for name in before)
    (template,) = (ablated / "model").glob("chat_template.jinja")
    template.write_text(template.read_text() + " ")
    assert all(models(make_recipe())[name] != before[name] for name in before)


def test_the_filter_by_the_direction_is_kept_too(make_recipe, ablated, tokenizer):
    recipe = make_recipe(train__filters={"direction": True})
    own = shelf_of(recipe, ablated / "model", tokenizer)
    path = pairs.Screen(recipe, own, ablated, frozenset()).path
    faster = make_recipe(train__filters={"direction": True}, train__trainer={"beta": 0.2})
    assert pairs.Screen(faster, own, ablated, frozenset()).path == path
    shorter = make_recipe(train__filters={"direction": True}, train__trainer={"max_length": 9})
    assert pairs.Screen(shorter, own, ablated, frozenset()).path != path


def _write(path, number):
    rows = [TeacherRow([1] * 50, [2] * 50, torch.full((50, 4), 3), torch.zeros(50, 4))] * 20
    for _ in range(number):
        save_rows(rows, path)
        artifacts.write_jsonl(path.with_suffix(".jsonl"), [{"tokens": [1] * 500}] * 20)


def test_two_that_write_one_file_never_show_half_of_it(tmp_path):
    path = tmp_path / "anchors" / "one.safetensors"
    _write(path, 1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, 40)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert len(load_rows(path)) == 20
        assert len(artifacts.read_jsonl(path.with_suffix(".jsonl"))) == 20
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {file.name for file in path.parent.iterdir()} == {"one.safetensors", "one.jsonl"}


def test_answers_come_back_as_texts(build_model, tokenizer, tmp_path, make_recipe, ablated):
    own = shelf_of(make_recipe(), ablated / "model", tokenizer)
    answers = Answers(own, "original", ["a", "b"], max_new_tokens=3, batch_size=2)
    answers.piece.make(build_model("llama", dtype=torch.float32))
    assert [len(ids) for ids in answers.ids()] == [3, 3]
    assert answers.texts() == [tokenizer.decode(ids) for ids in answers.ids()]


def test_the_plan_says_what_is_asked_first(make_recipe):
    lines = plan.plan_lines(make_recipe(), [])
    line = "by what the edit damages, after 6 questions: 5% to 50% for a domain"
    assert any(line in text for text in lines)
    assert not any(line in text for text in plan.plan_lines(make_recipe(**UNMIXED), []))


def test_what_a_stage_found_is_in_its_manifest(make_recipe, tmp_path):
    recipe = make_recipe(tracking__mode="disabled")
    store = artifacts.Store(tmp_path / "runs")
    entry, found = store.entry("train", 1, {}), {"mix": {"floor": 0.05}}
    step = run.Step("train", entry, lambda *_: found, {})
    run._run_step(recipe, step, store, tmp_path / "runs" / "mini", {})
    assert entry.manifest()["mix"] == found["mix"]
    assert entry.manifest()["seed"] == recipe.seed
