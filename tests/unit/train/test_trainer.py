"""The trainer begins at its reference, adds the anchors' mean whatever the batches, and goes on exactly.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_trainer.py
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from common.architecture import find_writers
from common.chat import NO_THINKING
from common.edits import SIDECAR, apply_to_weights, component_along, save_edit
from common.errors import StageError
from common.model import tokenizer_files
from common.recipe import load_recipe
from tests.editing import edit_of
from tests.training import settings_of, taught
from train.adapter import build_adapter
from train.anchors import AnchorBatches, anchor_and_stream_loss, anchor_loss
from train.constraint import keep_ablated
from train.pull import Distance
from train.settings import build_trainer_settings
from train.stage import save
from train.streams import Sketch
from train.trainer import HealingTrainer, WeightedAnchor

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own

PATIENT = Path(__file__).parents[3] / "recipes" / "patient.yaml"
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ADAPTER = {"r": 4, "lora_alpha": 8}
SKETCH = Sketch(8, (DIRECTION / DIRECTION.norm())[None])


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", seed=0, dtype=torch.float32)


@pytest.fixture(scope="module")
def pairs():
    """Eleven pairs of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"question {n}" + " x" * (n % 4)}],
                "chosen": [{"role": "assistant", "content": "good" + " yes" * (n % 3)}],
                "rejected": [{"role": "assistant", "content": "bad" + " no" * (n % 5)}],
            }
            for n in range(11)
        ]
    )


@pytest.fixture(scope="module")
def rows(build_model, tokenizer):
    """What another model answers, so that the divergence is not zero."""
    teacher = build_model("llama", seed=9, dtype=torch.float32)
    prompts = ["a", "the other one", "how is it", "why not", "x y z"]
    rows = taught(teacher, tokenizer, prompts, top_k=20, max_new_tokens=5, batch_size=5)
    # Unequal lengths, so that a mean of means would not be the mean over tokens.
    short = rows[0]
    rows[0] = type(short)(short.prompt, short.answer[:2], short.top_ids[:2], short.top_logps[:2])
    return rows


@pytest.fixture(scope="module")
def streamed(build_model, tokenizer):
    """What another model answers, and its residual stream; lengths differ."""
    teacher = build_model("llama", seed=9, dtype=torch.float32)
    prompts = ["a", "the other one", "how is it", "why not", "x y z"]
    settings = {"top_k": 20, "max_new_tokens": 5, "batch_size": 5}
    return taught(teacher, tokenizer, prompts, **settings, sketch=SKETCH)


@pytest.fixture
def make_trainer(model, tokenizer, pairs, tmp_path):
    """Make a trainer on a copy of the model."""

    def make(
        *,
        adapter=ADAPTER,
        anchors=(),
        policy=None,
        ref_model=None,
        num_pairs=8,
        share_prompts=True,
        **settings,
    ):
        own = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "linear",
        }
        torch.manual_seed(0)  # the adapter's initial values
        return HealingTrainer(
            model=copy.deepcopy(policy if policy is not None else model),
            ref_model=ref_model,
            args=settings_of(tmp_path / "out", **{**own, **settings}),
            train_dataset=pairs.select(range(num_pairs)),
            processing_class=tokenizer,
            peft_config=build_adapter(adapter) if adapter is not None else None,
            anchors=anchors,
            share_prompts=share_prompts,
        )

    return make


def _steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _anchors(rows, weight=1.0, batch_size=5):
    return [WeightedAnchor("original", AnchorBatches(rows, batch_size, 0), weight)]


def _streamed_anchors(rows, weight, residual_weight, batch_size=5):
    batches = AnchorBatches(rows, batch_size, 0)
    return [WeightedAnchor("original", batches, weight, SKETCH, residual_weight)]


def _mean_divergence(model, rows):
    """The plain mean over all answer tokens of a batch of anchor rows."""
    with torch.no_grad():
        total = sum(float(anchor_loss(model, [row], 2, torch.device("cpu"))) for row in rows)
    return total / sum(len(row.answer) for row in rows)


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
@pytest.mark.parametrize("precompute", [True, False])
def test_training_begins_at_the_reference(adapter, precompute, make_trainer, model_folder, model):
    policy = copy.deepcopy(model)
    # Without an adapter trl loads the reference from where the model says it came from.
    policy.config._name_or_path = str(model_folder)
    trainer = make_trainer(adapter=adapter, policy=policy, precompute_ref_log_probs=precompute)
    trainer.train()
    first, second = _steps(trainer)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(second["rewards/margins"]) > 1e-3, "the second step is not at the reference any more"


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
@pytest.mark.parametrize("precompute", [True, False])
def test_a_reference_that_is_another_model_is_refused(
    adapter, precompute, make_trainer, build_model
):
    other = build_model("llama", seed=5, dtype=torch.float32)
    trainer = make_trainer(adapter=adapter, ref_model=other, precompute_ref_log_probs=precompute)
    with pytest.raises(
        StageError, match=r"before the first update the rewards are .* instead of 0"
    ):
        trainer.train()


def test_the_abliterated_model_against_the_original_as_reference_is_refused(make_trainer, model):
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit_of(edited, "orthogonalize", DIRECTION))
    trainer = make_trainer(adapter=None, policy=edited, ref_model=copy.deepcopy(model))
    with pytest.raises(StageError, match="the reference is not the abliterated model"):
        trainer.train()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "trl"])
def test_the_likelihood_of_chosen_is_logged_as_trl_takes_it(share, make_trainer):
    trainer = make_trainer(
        share_prompts=share, loss_type=["sft"], gradient_accumulation_steps=1, learning_rate=1e-2
    )
    trainer.train()
    first, *_, last = _steps(trainer)
    assert first["nll/chosen"] == pytest.approx(first["loss"], rel=1e-3)
    assert last["nll/chosen"] < first["nll/chosen"]


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_the_guard_over_the_reference_takes_rounding_for_what_beta_makes_of_it(beta, make_trainer):
    trainer = make_trainer(beta=beta)
    for off, is_wrong in ((0.005, False), (0.05, True)):
        trainer._metrics["train"] = {
            f"rewards/{side}": [beta * off] for side in ("chosen", "rejected")
        }
        if is_wrong:
            with pytest.raises(StageError, match="instead of 0"):
                trainer._guard_reference()
        else:
            trainer._guard_reference()


def test_an_anchor_adds_its_weighted_mean_divergence_to_the_loss(make_trainer, model, rows):
    trainer = make_trainer(anchors=_anchors(rows, weight=0.7))
    trainer.train()
    first = _steps(trainer)[0]
    expected = _mean_divergence(model, rows)
    assert expected > 0.1
    assert first["anchors/original"] == pytest.approx(expected, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + 0.7 * expected, abs=1e-4)


def test_two_anchors_are_both_in_the_loss(make_trainer, model, rows):
    two = [
        WeightedAnchor("original", AnchorBatches(rows, 5, 0), 1.0),
        WeightedAnchor("abliterated", AnchorBatches(rows[:2], 2, 0), 2.0),
    ]
    trainer = make_trainer(anchors=two)
    trainer.train()
    first = _steps(trainer)[0]
    one, other = _mean_divergence(model, rows), _mean_divergence(model, rows[:2])
    assert first["anchors/abliterated"] == pytest.approx(other, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + one + 2 * other, abs=1e-4)


def test_an_anchor_adds_the_mean_distance_of_its_stream_over_all_tokens(
    make_trainer, model, streamed
):
    trainer = make_trainer(anchors=_streamed_anchors(streamed, 0.7, 3.0))
    trainer.train()
    first = _steps(trainer)[0]
    with torch.no_grad():
        found = [
            anchor_and_stream_loss(model, model, [row], 2, torch.device("cpu"), SKETCH)[1]
            for row in streamed
        ]
    far = float(sum(found)) / sum(len(row.tokens) for row in streamed)
    near = _mean_divergence(model, streamed)
    assert far > 0.1
    assert first["residual/original"] == pytest.approx(far, abs=1e-5)
    assert first["anchors/original"] == pytest.approx(near, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2) + 0.7 * near + 3.0 * far, abs=1e-4)


@pytest.mark.parametrize("size", [3, 5])
def test_accumulation_does_not_change_the_anchor(size, make_trainer, streamed):
    logs = []
    for per_device, accumulation in ((1, 8), (2, 4), (8, 1)):
        trainer = make_trainer(
            anchors=_streamed_anchors(streamed, 1.0, 1.0, batch_size=size),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        logs.append(_steps(trainer))
    for key in ("loss", "anchors/original", "residual/original"):
        assert logs[1][0][key] == pytest.approx(logs[0][0][key], abs=1e-6)
        assert logs[2][0][key] == pytest.approx(logs[0][0][key], abs=1e-6)
        # The second step follows from the first one's gradients.
        assert logs[1][1][key] == pytest.approx(logs[0][1][key], rel=1e-3)
        assert logs[2][1][key] == pytest.approx(logs[0][1][key], rel=1e-3)


def test_a_last_step_with_fewer_forward_passes_has_the_whole_anchor(make_trainer, model, rows):
    # Eleven pairs, two a pass, four passes a step: the second step has two passes, of two pairs and of one.
    trainer = make_trainer(
        anchors=_anchors(rows),
        num_pairs=11,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=1e-9,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    steps = _steps(trainer)
    assert len(steps) == 2
    expected = _mean_divergence(model, rows)
    for entry in steps:
        assert entry["anchors/original"] == pytest.approx(expected, rel=1e-4)
        assert entry["loss"] == pytest.approx(math.log(2) + expected, abs=1e-3)


def test_every_step_has_the_anchor_batch_of_its_number(make_trainer, model, rows):
    anchors = _anchors(rows, batch_size=2)
    trainer = make_trainer(anchors=anchors, max_steps=4, learning_rate=1e-9)
    trainer.train()
    found = [entry["anchors/original"] for entry in _steps(trainer)]
    expected = [_mean_divergence(model, anchors[0].batches.batch(step)) for step in range(4)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 4) for value in expected}) == 4


def test_the_anchor_pulls_the_model_to_its_teacher(make_trainer, model, rows):
    pulled = make_trainer(anchors=_anchors(rows, weight=5.0), adapter=None, max_steps=15)
    pulled.train()
    assert _mean_divergence(pulled.model, rows) < 0.7 * _mean_divergence(model, rows)


def _weights(trainer):
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(
    adapter, make_trainer, rows, tmp_path
):
    settings = {"adapter": adapter, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def make(folder):
        trainer = make_trainer(
            anchors=_anchors(rows, batch_size=3), output_dir=str(tmp_path / folder), **settings
        )
        if adapter is None:
            edit = edit_of(trainer.model, "orthogonalize", DIRECTION)
            keep_ablated(trainer, edit, "hard")
        return trainer

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    final, other = _weights(whole), _weights(resumed)
    assert final.keys() == other.keys()
    for name in final:
        assert torch.equal(final[name], other[name]), name
    assert [entry["loss"] for entry in _steps(resumed)][-3:] == [e["loss"] for e in _steps(whole)][
        -3:
    ]


@pytest.mark.parametrize(("launched", "bf16"), [("bf16", False), ("no", True)])
def test_the_precision_is_the_recipes_whatever_the_launch_says(
    launched, bf16, model, tokenizer, pairs, tmp_path, monkeypatch
):
    losses = []
    for variable in (launched, None):
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if variable is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
        args = build_trainer_settings(
            load_recipe(PATIENT, ["train.trainer={max_steps: 2, save_strategy: 'no'}"]),
            output_dir=tmp_path,
            world_size=1,
            use_cpu=True,
            bf16=bf16,
        )
        torch.manual_seed(0)
        trainer = HealingTrainer(
            model=copy.deepcopy(model),
            args=args,
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=build_adapter(ADAPTER),
        )
        trainer.train()
        assert (args.bf16, args.fp16) == (bf16, False)
        assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        losses.append([entry["loss"] for entry in _steps(trainer)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
def test_the_constraint_holds_through_real_training(adapter, make_trainer, model, rows):
    edited = copy.deepcopy(model)
    edit = edit_of(edited, "orthogonalize", DIRECTION)
    apply_to_weights(edited, edit)
    trainer = make_trainer(adapter=adapter, policy=edited, anchors=_anchors(rows), max_steps=4)
    keep_ablated(trainer, edit, "hard")
    trainer.train()
    healed = trainer.model.merge_and_unload() if adapter is not None else trainer.model
    for writer, before in zip(find_writers(healed), find_writers(edited), strict=True):
        change = writer.weight.detach().double() - before.weight.detach().double()
        basis = edit.basis(writer.name)
        # Rounding of float32 weights, as in test_constraint.
        assert component_along(change, basis, writer.layout).abs().max() < 1e-6
    moved = (
        healed.model.layers[0].mlp.down_proj.weight - edited.model.layers[0].mlp.down_proj.weight
    )
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_moe", "gpt2"])
def test_other_kinds_of_models_are_trained_and_held_too(
    family, adapter, make_trainer, build_model, rows
):
    policy = build_model(family, dtype=torch.float32)
    edit = edit_of(policy, "orthogonalize", DIRECTION)
    apply_to_weights(policy, edit)
    trainer = make_trainer(adapter=adapter, policy=policy, anchors=_anchors(rows))
    keep_ablated(trainer, edit, "hard")
    trainer.train()
    healed = trainer.model.merge_and_unload() if adapter else trainer.model
    before = {writer.name: writer.weight for writer in find_writers(policy)}
    moved = []
    for writer in find_writers(healed):
        change = (writer.weight - before[writer.name]).detach()
        along = component_along(change, edit.basis(writer.name), writer.layout)
        assert along.abs().max() < 1e-6
        moved.append(float(change.abs().max()))
    assert max(moved) > 1e-3


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
def test_what_is_saved_has_the_tokenizer_files_and_additions_of_its_base(
    adapter, make_trainer, model, tokenizer, tmp_path
):
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    own = (base / "chat_template.jinja").read_bytes()
    save_edit(edit_of(model, "add", DIRECTION), base / SIDECAR)
    trainer = make_trainer(adapter=adapter)
    amended = copy.deepcopy(tokenizer)
    amended.chat_template = NO_THINKING + amended.chat_template
    amended.padding_side = "right"
    trainer.processing_class = amended
    save(trainer, base, tmp_path)
    folder = tmp_path / ("model" if adapter is None else "adapter")
    for file in tokenizer_files(base):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == own
    assert len(tokenizer_files(folder)) == len(tokenizer_files(base))
    # An adapter is put on the base, which has its own.
    assert (folder / SIDECAR).is_file() == (adapter is None)
    assert not (folder / "training_args.bin").exists()


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["adapter", "full"])
def test_a_pull_keeps_the_weights_near_where_they_began(adapter, make_trainer):
    def distance_after(weight):
        trainer = make_trainer(adapter=adapter, max_steps=6, learning_rate=1e-3)
        distance = Distance(trainer.model)
        if weight:
            trainer.pull = (weight, distance)
        trainer.train()
        return trainer, float(distance().detach())

    _, free = distance_after(None)
    trainer, pulled = distance_after(100.0)
    assert 0 < pulled < 0.5 * free
    logged = [step["l2"] for step in _steps(trainer)]
    assert logged[0] == 0
    assert logged[-1] > 0
