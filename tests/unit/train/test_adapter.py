"""Adapters of every kind train, save, go on and merge into a model that answers as the trained one did.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_adapter.py
"""

import json
import math

import pytest
import torch
from datasets import Dataset

from common.errors import StageError
from common.lora import merge_adapter
from common.model import load_model
from common.recipe import Recipe
from eval.subjects import load_healed
from tests.training import settings_of
from train import adapter as adapters
from train import pull, stage
from train.adapter import (
    LOST_FROM_4BIT,
    MERGE_TOLERANCE,
    answer_logits,
    build_adapter,
    carried_over,
    keep_adapter_in_float32,
    merge_tolerance,
    require_same_answers,
)
from train.launch import Strategy
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's, peft's and torch's own

KINDS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
}
ROWS = [[1, 40, 41, 42, 43, 44], [1, 60, 61, 7, 8, 9, 70, 71]]


@pytest.fixture(scope="module")
def pairs():
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"question {n}"}],
                "chosen": [{"role": "assistant", "content": "good" + " yes" * (n % 3)}],
                "rejected": [{"role": "assistant", "content": "bad" + " no" * (n % 5)}],
            }
            for n in range(8)
        ]
    )


@pytest.fixture
def make_trainer(model_folder, tokenizer, pairs, tmp_path):
    """Make a trainer on the model folder's weights."""

    def make(adapter, *, base=model_folder, in_4bit=False, folder="out", **settings):
        own = {"max_steps": 4}
        torch.manual_seed(0)  # the adapter's initial values
        trainer = HealingTrainer(
            model=load_model(base, dtype="float32", in_4bit=in_4bit),
            args=settings_of(tmp_path / folder, **{**own, **settings}),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=build_adapter(adapter),
        )
        if in_4bit:
            keep_adapter_in_float32(trainer.model)
        return trainer

    return make


@pytest.fixture(scope="module")
def wider_folder(build_model, tokenizer, tmp_path_factory):
    """A model of width 128: in one of 32 packed weights compute something else altogether."""
    folder = tmp_path_factory.mktemp("models") / "wider"
    shape = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.05}
    build_model("llama", dtype=torch.float32, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_answers_as_the_trained_model(
    kind, make_trainer, model_folder, tmp_path, recipe
):
    trainer = make_trainer(KINDS[kind])
    trainer.train()
    trainer.save_model(str(tmp_path / "train" / "adapter"))
    trained = answer_logits(trainer.model, ROWS)
    whole = merge_adapter(load_model(model_folder, dtype="float32"), tmp_path / "train" / "adapter")
    share = require_same_answers(
        trained, answer_logits(whole, ROWS), MERGE_TOLERANCE[torch.float32]
    )
    assert share < 1e-5, "merging in float32 rounds, and no more"
    # Training has moved the answers, so the check can fail: here it does, without the adapter.
    untouched = answer_logits(load_model(model_folder, dtype="float32"), ROWS)
    with pytest.raises(StageError, match="differ from the trained model's by"):
        require_same_answers(trained, untouched, MERGE_TOLERANCE[torch.float32])
    # Stage three loads the same weights.
    (tmp_path / "abliteration").mkdir()
    (tmp_path / "abliteration" / "model").symlink_to(model_folder)
    folders = {"abliteration": tmp_path / "abliteration", "train": tmp_path / "train"}
    evaluated = load_healed(recipe(), folders)
    for (name, one), other in zip(whole.named_parameters(), evaluated.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("changed", [{"use_dora": False}, {"lora_alpha": 4}, {"use_rslora": False}])
def test_a_merge_under_another_setting_is_refused(changed, make_trainer, model_folder, tmp_path):
    [key] = changed
    trainer = make_trainer(KINDS.get(key.removeprefix("use_"), KINDS["lora"]))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    whole = merge_adapter(load_model(model_folder, dtype="float32"), tmp_path / "adapter")
    answers = answer_logits(whole, ROWS)
    with pytest.raises(StageError, match="with the adapter merged into the weights"):
        require_same_answers(
            answer_logits(trainer.model, ROWS), answers, MERGE_TOLERANCE[torch.float32]
        )


def test_answers_that_are_no_numbers_are_refused():
    with pytest.raises(StageError, match="by nan of their spread"):
        require_same_answers(torch.ones(2, 3), torch.full((2, 3), math.nan), 0.5)


def test_the_tolerance_is_that_of_the_coarsest_numbers_in_the_way():
    assert merge_tolerance(torch.float32, half=False) < merge_tolerance(torch.float32, half=True)
    assert merge_tolerance(torch.bfloat16, half=False) == merge_tolerance(torch.float32, half=True)
    assert LOST_FROM_4BIT < 1, "an adapter that is not merged at all has to fail"


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_an_adapter_that_goes_on_from_a_checkpoint_ends_bit_identical(kind, make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(KINDS[kind], folder="whole", **settings)
    whole.train()
    resumed = make_trainer(KINDS[kind], folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    pieces = zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True)
    for (name, one), other in pieces:
        assert torch.equal(one, other), name


def test_an_adapter_on_weights_in_four_bits_begins_at_its_reference_and_merges_into_the_full_ones(
    make_trainer, wider_folder, tmp_path
):
    trainer = make_trainer(KINDS["lora"], base=wider_folder, in_4bit=True)
    packed = trainer.model.get_base_model().model.layers[0].mlp.down_proj.weight
    assert packed.dtype == torch.uint8
    before = packed.detach().clone()
    trainer.train()
    first = steps(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert steps(trainer)[-1]["loss"] < 0.9 * first["loss"]
    assert torch.equal(packed, before), "the packed weights are frozen"
    trainer.save_model(str(tmp_path / "adapter"))
    with trainer.model.disable_adapter():
        packed_answers = answer_logits(trainer.model, ROWS)
    full = load_model(wider_folder, dtype="float32")
    without = answer_logits(full, ROWS)
    trained = answer_logits(trainer.model, ROWS)
    expected, lost = carried_over(trained, packed_answers, without)
    whole = merge_adapter(full, tmp_path / "adapter")
    assert whole.model.layers[0].mlp.down_proj.weight.dtype == torch.float32
    share = require_same_answers(expected, answer_logits(whole, ROWS), lost)
    # Other weights than it was trained on: far more than rounding. But most of what was learned is there.
    assert MERGE_TOLERANCE[torch.float32] < share < 0.8 * lost
    with pytest.raises(StageError):
        require_same_answers(expected, without, lost)


def test_the_adapter_over_packed_weights_stays_in_float32(make_trainer):
    trainer = make_trainer(KINDS["lora"], in_4bit=True)
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}, "trl casts it to bfloat16, where a step of 1e-5 is lost"


@pytest.fixture
def recipe(model_folder, tmp_path):
    """Make a recipe over the model folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")

    def make(**train):
        source = {"path": str(prompts)}
        panel = {"name": "refusal", "panel": "p", "prompts": source, "harmless": True}
        return Recipe.model_validate(
            {
                "name": "mini",
                "model": {"name_or_path": str(model_folder), "dtype": "float32"},
                "abliteration": {
                    "prompts": {"harmful": source, "harmless": {**source, "slice": "1:"}}
                },
                "train": {
                    "preferences": [{"name": "on_policy", "prompts": source}],
                    "global_batch_size": 1,
                    **train,
                },
                "eval": {"benchmarks": [panel]},
            }
        )

    return make


def test_weights_in_four_bits_are_trained_through_an_adapter_only(recipe):
    assert stage.check(recipe(load_in_4bit=True)) == []
    with pytest.raises(ValueError, match=r"cannot be trained then; give train\.adapter"):
        recipe(load_in_4bit=True, adapter=None)


def test_packed_weights_are_not_shared_out(recipe, monkeypatch):
    shared = Strategy("FSDP2", 8, True, True, True)
    monkeypatch.setattr(stage, "launch_strategy", lambda: shared)
    [problem] = stage.check(recipe(load_in_4bit=True, global_batch_size=8))
    assert problem.startswith("train.load_in_4bit: FSDP2 would share out weights that are packed")
    assert stage.check(recipe(global_batch_size=8)) == []


@pytest.mark.parametrize("key", ["activation_checkpointing", "gradient_checkpointing"])
def test_an_adapter_over_zero_3_is_not_computed_again(key, recipe, monkeypatch):
    recomputed = {"trainer": {key: True}, "keep_ablated": "none", "global_batch_size": 2}
    for name, refused in (("ZeRO-3", True), ("ZeRO-2", False), ("FSDP2", False)):
        strategy = Strategy(name, 2)
        monkeypatch.setattr(stage, "launch_strategy", lambda strategy=strategy: strategy)
        problems = stage.check(recipe(**recomputed))
        assert [problem.split(":")[0] for problem in problems] == [f"train.trainer.{key}"] * refused
        assert stage.check(recipe(**recomputed, adapter=None)) == []


@pytest.mark.parametrize(
    ("strategy", "refused"),
    [
        (Strategy("ZeRO-3", 2, True, True, True), True),
        (Strategy("FSDP1", 2, True, True, True), True),
        (Strategy("FSDP2", 2, True, True, True), False),
        (Strategy("DDP", 2), False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_weights_that_a_pull_cannot_see_are_not_shared_out(strategy, refused, recipe, monkeypatch):
    monkeypatch.setattr(pull, "launch_strategy", lambda: strategy)
    problems = stage.check(recipe(l2=0.25))
    assert bool(problems) == refused
    if refused:
        assert problems[0].startswith("train.l2: 0.25 cannot see how far the weights go")
        assert strategy.name in problems[0]
    assert stage.check(recipe()) == []


def test_without_bitsandbytes_the_check_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda _name: None)
    [problem] = stage.check(recipe(load_in_4bit=True))
    assert "pip install -e '.[quantized]'" in problem


def test_an_adapter_of_experts_targets_their_parameters_alone():
    config = build_adapter({"target_parameters": ["mlp.experts.down_proj"]})
    assert config.target_modules is None
    assert build_adapter({}).target_modules == adapters.DEFAULT_TARGETS
