"""Planted scores end training where they should, the best weights are kept, and a kill changes nothing.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_stopping.py
"""

import copy
import json

import pytest
import torch
import yaml
from datasets import Dataset

from common.artifacts import Stopwatch
from common.errors import StageError
from common.generation import generate
from common.recipe import PromptSource, Questions, Stopping, load_recipe
from tests.training import settings_of, shelf_in
from train import run, stage, stopping
from train.adapter import build_adapter
from train.anchors import anchored_divergence, load_rows
from train.launch import Strategy
from train.shelf import decoded
from train.stopping import Baseline, StopWhenHealed
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own

ADAPTER = {"r": 4, "lora_alpha": 8}


def _scores(recovery, *, low=0.86, high=0.9, refusal=0.0, over_refusal=0.0):
    intervals = {"recovery_low": low, "recovery_high": high}
    return {
        "recovery": recovery,
        **intervals,
        "refusal": refusal,
        "over_refusal": over_refusal,
        "kl": 0.5,
    }


def _settings(tmp_path, **changes):
    """Settings over files with three prompts each."""
    for name in ("questions", "harmful", "harmless"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {n}\n" for n in range(3)))
    sources = {
        "questions": Questions(path=str(tmp_path / "questions.txt")),
        "harmful": PromptSource(path=str(tmp_path / "harmful.txt")),
        "harmless": PromptSource(path=str(tmp_path / "harmless.txt")),
    }
    return Stopping(**{**sources, "every": 2, "max_new_tokens": 5, **changes})


class Killed(Exception):
    """The process ends here."""


class Planned:
    """An evaluation whose scores are planted; it generates all the same, and remembers the weights it saw."""

    def __init__(self, settings, tokenizer, scores, kill_at=None):
        """Plant one entry of scores for each look."""
        self.settings, self.tokenizer, self.left = settings, tokenizer, list(scores)
        self.seen, self.kill_at = [], kill_at

    def start(self):
        return _scores(0.0)

    def evaluate(self, model):
        assert not model.training
        generate(model, self.tokenizer, ["a", "b c"], max_new_tokens=3, batch_size=2)
        self.seen.append(_weights(model))
        if len(self.seen) == self.kill_at:
            raise Killed
        return self.left.pop(0)


def _weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=0, dtype=torch.float32)


@pytest.fixture
def make(model, tokenizer, tmp_path):
    """Make a trainer with a planned evaluation every 2 of 8 steps."""
    pairs = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"question {n}"}],
                "chosen": [{"role": "assistant", "content": "good" + " yes" * (n % 3)}],
                "rejected": [{"role": "assistant", "content": "bad" + " no" * (n % 5)}],
            }
            for n in range(8)
        ]
    )

    def build(scores, *, name="run", adapter=ADAPTER, kill_at=None, limits=None, **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        own = {"per_device_train_batch_size": 2, "max_steps": 8, "save_total_limit": 1}
        torch.manual_seed(0)  # the adapter's initial values
        trainer = HealingTrainer(
            model=copy.deepcopy(model),
            args=settings_of(folder / "checkpoints", **{**own, **settings}),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=build_adapter(adapter) if adapter is not None else None,
        )
        if scores is None:
            return trainer, None
        planned = Planned(_settings(tmp_path, **(limits or {})), tokenizer, scores, kill_at)
        stopper = StopWhenHealed(planned, trainer.log, folder, Stopwatch())
        trainer.add_callback(stopper)
        return trainer, stopper

    return build


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _quick(trainer):
    """The logged curve without times."""
    entries = [e for e in trainer.state.log_history if "quick/recovery" in e]
    return [{k: v for k, v in e.items() if k != "quick/seconds"} for e in entries]


def test_training_ends_where_the_interval_reaches_full_recovery(make):
    trainer, stopper = make([_scores(0.7), _scores(0.95, high=1.0), _scores(0.99)])
    trainer.train()
    assert trainer.state.global_step == 4
    assert stopper.reason == "full recovery is within the interval"
    assert stopper.best["step"] == 4
    assert [entry["step"] for entry in _quick(trainer)] == [0, 2, 4]
    assert [entry["quick/recovery"] for entry in _quick(trainer)] == [0.0, 0.7, 0.95]


def test_full_recovery_over_a_limit_does_not_end_training(make):
    full = _scores(1.0, high=1.0, over_refusal=0.1)
    trainer, stopper = make([_scores(0.7), full, full, _scores(0.8)])
    trainer.train()
    assert trainer.state.global_step == 8
    assert stopper.summary()["reason"] == "trained to the end"
    assert stopper.best["step"] == 8


def test_an_interval_that_is_wide_for_want_of_questions_does_not_end_training(make):
    plan = [_scores(0.9, low=0.5, high=1.0), *[_scores(1.0, low=0.84, high=1.0)] * 3]
    trainer, stopper = make(plan)
    trainer.train()
    assert trainer.state.global_step == 8
    assert stopper.best["step"] == 4


def test_training_ends_when_patience_runs_out(make):
    trainer, stopper = make([_scores(0.7), _scores(0.6), _scores(0.7)], limits={"patience": 2})
    trainer.train()
    assert trainer.state.global_step == 6
    assert stopper.reason == "no new best in 2 quick evaluations"
    assert stopper.best["step"] == 2, "an equal recovery later is no new best"


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
def test_the_best_weights_within_the_limits_are_kept_bit_for_bit(adapter, make, model_folder):
    plan = [
        _scores(0.5),
        _scores(0.8),
        _scores(0.99, refusal=0.1),
        _scores(0.98, high=1.0, over_refusal=0.1),
    ]
    trainer, stopper = make(plan, adapter=adapter, limits={"patience": 4})
    trainer.train()
    assert stopper.best["step"] == 4
    seen = stopper.baseline.seen
    assert _same(_weights(trainer.model), seen[1])
    assert not _same(seen[1], seen[3]), "training went on behind the best"


def test_what_is_saved_is_the_best(make, model_folder, tmp_path):
    trainer, stopper = make([_scores(0.8), *[_scores(0.5)] * 3])
    trainer.train()
    stage.save(trainer, model_folder, tmp_path)
    saved = stopping.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {name.replace(".default", ""): w for name, w in stopper.baseline.seen[0].items()}
    assert _same(saved, kept)


def test_weights_over_the_limits_are_never_kept(make):
    trainer, _ = make([_scores(0.9, refusal=0.03)] * 4, limits={"patience": 9})
    with pytest.raises(
        StageError, match=r"in none of the quick evaluations were refusal at most 0\.02"
    ):
        trainer.train()


def test_the_last_step_is_evaluated_too(make):
    trainer, stopper = make([_scores(0.5), _scores(0.6), _scores(0.7)], limits={"every": 3})
    trainer.train()
    assert [entry["step"] for entry in _quick(trainer)] == [0, 3, 6, 8]
    assert stopper.best["step"] == 8


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_looking_changes_neither_the_losses_nor_their_log(logging_steps, make):
    alone, _ = make(None, name="alone", logging_steps=logging_steps)
    alone.train()
    looking, _ = make([_scores(0.1 * n) for n in range(4)], logging_steps=logging_steps)
    looking.train()
    logged = [[e for e in t.state.log_history if "loss" in e] for t in (alone, looking)]
    assert [e["step"] for e in logged[0]] == [e["step"] for e in logged[1]]
    assert logged[0] == logged[1]
    assert _same(_weights(alone.model), _weights(looking.model))


@pytest.mark.parametrize(("kill_at", "adapter"), [(1, ADAPTER), (3, None), (4, ADAPTER)])
def test_a_killed_training_goes_on_to_the_same_end(kill_at, adapter, make, tmp_path):
    # Killed before any checkpoint, between the best and its checkpoint, and behind a first miss.
    plan = [_scores(0.6), _scores(0.8), _scores(0.7), _scores(0.5)]
    saving = {
        "save_strategy": "steps",
        "save_steps": 3,
        "limits": {"patience": 2},
        "adapter": adapter,
    }
    whole, its = make(plan, name="whole", **saving)
    whole.train()
    assert (whole.state.global_step, its.best["step"], its.misses) == (8, 4, 2)

    killed, _ = make(plan, name="killed", kill_at=kill_at, **saving)
    with pytest.raises(Killed):
        killed.train()
    checkpoint = stage._last_checkpoint(tmp_path / "killed" / "checkpoints")
    step = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    assert step == {1: 0, 3: 3, 4: 6}[kill_at]
    done = step // 2
    resumed, other = make(plan[done:], name="killed", **saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert _quick(resumed) == _quick(whole)
    assert (other.best, other.misses, other.reason) == (its.best, its.misses, its.reason)
    assert _same(_weights(resumed.model), _weights(whole.model))
    assert _same(_weights(whole.model), its.baseline.seen[1])
    assert other.seconds > other.watch.seconds or done == 0, "seconds before the kill count"


def test_no_checkpoint_is_made_where_training_was_stopped(make, tmp_path):
    # Going on from it would train beyond the end.
    trainer, _ = make([_scores(0.9, high=1.0)], save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert stage._last_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_only_the_best_weights_stay_on_disk_beside_a_checkpoint(make, tmp_path):
    plan = [_scores(0.5), _scores(0.6), _scores(0.7), _scores(0.8)]
    trainer, _ = make(plan, save_strategy="steps", save_steps=8)
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("*best*")] == ["best-8.safetensors"]


class Quick:
    """Replies that are asked for, and scores that show which replies they were made of."""

    def __init__(self):
        """Begin with nothing asked."""
        self.asked = []

    def ask(self, model, tokenizer, description):
        self.asked.append(description)
        return [f"reply {len(self.asked)}"]

    def scores(self, original, abliterated, healed):
        return {**_scores(0.5), "made of": (*original, *abliterated, *healed)}


def test_the_baseline_is_made_once_and_divergence_equals_a_plain_one(
    build_model, model, tokenizer, tmp_path
):
    quick, settings = Quick(), _settings(tmp_path)
    shelf = shelf_in(tmp_path, tokenizer)
    baseline = Baseline(settings, quick, shelf)
    abliterated = build_model("llama", seed=4, dtype=torch.float32)
    for piece in {piece.path: piece for piece in baseline.pieces}.values():
        assert not piece.path.exists()
        piece.make(model if piece.teacher == "original" else abliterated)
        assert piece.path.exists()
    prompts = [f"{kind} {n}" for kind in ("questions", "harmful", "harmless") for n in range(3)]
    first, second = (
        decoded(tokenizer, generate(one, tokenizer, prompts, max_new_tokens=5, batch_size=9))
        for one in (model, abliterated)
    )
    assert baseline.start()["made of"] == (*first, *second, *second)
    assert quick.asked == []
    scores = baseline.evaluate(abliterated)
    assert scores["made of"] == (*first, *second, "reply 1")
    assert scores["kl"] == pytest.approx(baseline.start()["kl"], rel=1e-6)
    assert baseline.evaluate(model)["kl"] == pytest.approx(0, abs=1e-5)
    (path,) = (tmp_path / "anchors").iterdir()
    rows = load_rows(path)
    assert len(rows) == 3
    total = 0.0
    for row in rows:  # one at a time, without padding
        with torch.no_grad():
            logits = abliterated(torch.tensor([row.prompt + row.answer])).logits[0]
        predicted = logits[len(row.prompt) - 1 : -1]
        total += float(anchored_divergence(predicted, row.top_ids, row.top_logps).sum())
    assert scores["kl"] == pytest.approx(total / sum(len(row.answer) for row in rows), rel=1e-5)
    assert scores["kl"] > 0.01


@pytest.fixture
def recipe_file(tmp_path, model_folder):
    """A recipe with `train.stopping` over files of its own; changes replace sources by path."""

    def write(**stopping_changes):
        sources = {}
        for name in ("trained", "asked", "bad", "good", "panel"):
            (tmp_path / f"{name}.txt").write_text("".join(f"{name} {n}?\n" for n in range(4)))
            sources[name] = {"path": str(tmp_path / f"{name}.txt")}
        section = {
            "questions": sources["asked"],
            "harmful": sources["bad"],
            "harmless": sources["good"],
        }
        panel = {"name": "refusal", "panel": "p", "prompts": sources["panel"], "harmless": True}
        data = {
            "name": "stopping",
            "model": {"name_or_path": str(model_folder), "dtype": "float32"},
            "abliteration": {
                "prompts": {"harmful": sources["bad"], "harmless": sources["good"], "validation": 1}
            },
            "train": {
                "preferences": [{"name": "on_policy", "prompts": sources["trained"]}],
                "stopping": {**section, **stopping_changes},
                "trainer": {"max_steps": 40},
            },
            "eval": {"benchmarks": [panel]},
            "output_dir": str(tmp_path / "runs"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize("name", ["questions", "harmful", "harmless"])
def test_a_recipe_whose_stopping_looks_at_benchmark_items_is_refused(
    name, recipe_file, tmp_path, capsys
):
    assert run.main([str(recipe_file()), "--check"]) == 0, capsys.readouterr().err
    assert "stopping      12 prompts are answered every 20 steps" in capsys.readouterr().out
    path = recipe_file(**{name: {"path": str(tmp_path / "panel.txt")}})
    assert run.main([str(path), "--check"]) == 2
    assert "train: 4 of its prompts are items of a benchmark" in capsys.readouterr().err


def test_a_recipe_that_trains_on_what_it_stops_at_is_refused(recipe_file, tmp_path, capsys):
    path = recipe_file(questions={"path": str(tmp_path / "trained.txt")})
    assert run.main([str(path), "--check"]) == 2
    assert "train.stopping.questions: 4 of its prompts are trained on" in capsys.readouterr().err


def test_what_cannot_stop_anything_is_refused(recipe_file, monkeypatch):
    recipe = load_recipe(recipe_file(every=40))
    (problem,) = stopping.check(recipe, [])
    assert problem.startswith("train.stopping.every: 40 steps are not fewer than 40")
    missing = load_recipe(recipe_file(harmful={"path": "missing.txt"}))
    assert stopping.check(missing, [])[0].startswith("train.stopping.harmful: ")
    monkeypatch.setattr(stopping, "launch_strategy", lambda: Strategy("FSDP2", 2, True, True, True))
    (problem,) = stopping.check(load_recipe(recipe_file()), [])
    assert "FSDP2 shares out its weights" in problem


def test_the_result_depends_on_the_prompts_content_and_not_on_where_they_lie(recipe_file, tmp_path):
    before = stage.inputs(load_recipe(recipe_file()), frozenset())["stopping"]
    (tmp_path / "moved.txt").write_text((tmp_path / "asked.txt").read_text())
    moved = load_recipe(recipe_file(questions={"path": str(tmp_path / "moved.txt")}))
    assert stage.inputs(moved, frozenset())["stopping"] == before
    (tmp_path / "moved.txt").write_text("another?\n")
    assert stage.inputs(moved, frozenset())["stopping"] != before
    json.dumps(before)
