"""Pairs as branches of one row give what TRL's two rows give: numbers, gradients, and whole trainings.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_shared_prompts.py
"""

import copy
import random

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from common import branches
from common.architecture import ARCHITECTURES
from tests.training import settings_of
from train import shared_prompts
from train.adapter import build_adapter
from train.shared_prompts import PairCollator, SharedPrompts, take_packed
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own

NUMBERS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
PAD = 2


def _pairs(count=3):
    """Tokenized pairs of unequal lengths, some answers a single token."""
    rng = random.Random(0)

    def draw(low, high):
        return [rng.randrange(10, 200) for _ in range(rng.randint(low, high))]

    return [
        {"prompt_ids": draw(2, 9), "chosen_ids": draw(1, 7), "rejected_ids": draw(1, 12)}
        for _ in range(count)
    ]


def _both(model, pairs, **settings):
    """The numbers per token of TRL's rows and of shared prompts, on two copies of a model."""
    found = []
    for collator, share in ((DataCollatorForPreference, False), (PairCollator, True)):
        own = copy.deepcopy(model)
        add_fused_lm_head(own, outputs=NUMBERS)
        batch = collator(pad_token_id=PAD, **settings)(copy.deepcopy(pairs))
        rows, reader = batch, own
        if share:
            rows, packed = take_packed(batch)
            reader = SharedPrompts(own, own, packed)
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        output = reader(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
        found.append((own, output))
    return found


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_numbers_and_gradients_are_those_of_two_rows(family, build_model, in_float64_throughout):
    model = build_model(family)
    (plain_model, plain), (shared_model, shared) = _both(model, _pairs())
    for name in NUMBERS:
        torch.testing.assert_close(shared[name], plain[name], rtol=0, atol=1e-10, msg=name)
    weights = torch.randn(plain.log_probs.shape, generator=torch.Generator().manual_seed(0))
    for output in (plain, shared):
        (output.log_probs * weights).sum().backward()
    limit = 1e-12 if family == "gpt2" else 1e-10
    for (name, one), other in zip(
        plain_model.named_parameters(), shared_model.parameters(), strict=True
    ):
        if one.grad is None:
            assert other.grad is None, name
            continue
        assert (one.grad - other.grad).norm() <= limit * one.grad.norm(), name


def test_branches_that_see_each_other_give_other_numbers(build_model, monkeypatch):
    def sees_siblings(model, packed):
        merged = packed.branch_ids.clamp_max(branches.PROMPT + 1)
        return branches.attention_masks(
            model,
            branches.Packed(packed.input_ids, packed.position_ids, merged, packed.targets),
        )

    monkeypatch.setattr(shared_prompts, "attention_masks", sees_siblings)
    (_, plain), (_, shared) = _both(build_model("llama"), _pairs())
    assert (plain.log_probs - shared.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_truncation_leaves_is_what_trl_leaves(mode, build_model, in_float64_throughout):
    pairs = _pairs(6)
    longest = max(len(pair["prompt_ids"]) for pair in pairs) + 3
    settings = {"max_length": longest, "truncation_mode": mode}
    (_, plain), (_, shared) = _both(build_model("llama"), pairs, **settings)
    assert plain.log_probs.shape[1] == longest - 1
    torch.testing.assert_close(shared.log_probs, plain.log_probs, rtol=0, atol=1e-10)


def test_a_model_that_takes_no_masks_reads_two_rows(build_model, monkeypatch, caplog):
    model = build_model("llama")
    monkeypatch.setattr(branches, "_measured_obstacle", lambda *_: "it was made up")
    caplog.set_level("INFO", "common.branches")
    (_, plain), (_, shared) = _both(model, _pairs())
    assert torch.equal(shared.log_probs, plain.log_probs)
    assert caplog.text.count("it was made up") == 1


def test_a_prompt_is_read_once(build_model):
    pairs = [{"prompt_ids": [5] * 50, "chosen_ids": [6] * 4, "rejected_ids": [7] * 3}]
    _, packed = take_packed(PairCollator(pad_token_id=PAD)(pairs))
    assert packed.input_ids.shape == (1, 49 + 4 + 3)


@pytest.fixture(scope="module")
def dataset():
    """Pairs of texts of unequal lengths."""
    rng = random.Random(1)
    words = ["why", "not", "tell", "me", "how", "it", "is", "made", "and", "what", "it", "holds"]

    def say(role, low, high):
        return [{"role": role, "content": " ".join(rng.choices(words, k=rng.randint(low, high)))}]

    return Dataset.from_list(
        [
            {
                "prompt": say("user", 3, 12),
                "chosen": say("assistant", 1, 9),
                "rejected": say("assistant", 1, 15),
            }
            for _ in range(48)
        ]
    )


@pytest.fixture
def make_trainer(build_model, tokenizer, dataset, tmp_path):
    """Make a trainer of a model."""

    def make(*, share, adapter=None, family="llama", ref_model=None, **settings):
        own = {"max_steps": 50, "learning_rate": 1e-3, "max_length": 48}
        torch.manual_seed(0)
        return HealingTrainer(
            model=build_model(family, seed=0, dtype=torch.float32),
            ref_model=ref_model,
            args=settings_of(tmp_path / f"out-{share}", **{**own, **settings}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=build_adapter(adapter) if adapter is not None else None,
            share_prompts=share,
        )

    return make


@pytest.fixture
def train(make_trainer):
    """Train a model and give the loss and rewards of each step."""

    def run(**settings):
        trainer = make_trainer(**settings)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    return run


LOSSES = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "sigmoid + sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_training_has_the_losses_of_plain_trl(loss, train):
    plain, shared = (
        train(share=share, adapter={"r": 4, "lora_alpha": 8}, **LOSSES[loss])
        for share in (False, True)
    )
    assert len(plain) == len(shared) == 50
    assert abs(plain[-1]["loss"] - plain[0]["loss"]) > 1e-2, "nothing was learnt"
    for one, other in zip(plain, shared, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-4 * max(1.0, abs(one["loss"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"activation_checkpointing": True},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"precompute_ref_log_probs": False, "adapter": {"r": 4, "lora_alpha": 8}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_ways_of_training_agree_too(settings, train):
    plain, shared = (train(share=share, max_steps=6, **settings) for share in (False, True))
    assert plain[-1]["rewards/margins"] != 0
    for one, other in zip(plain, shared, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy"):
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key


def test_in_bfloat16_it_agrees_within_rounding(train):
    plain, shared = (train(share=share, max_steps=6, bf16=True) for share in (False, True))
    for one, other in zip(plain, shared, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=0.01)


def test_the_loss_that_balances_experts_reads_two_rows(train, caplog):
    caplog.set_level("INFO", "train.trainer")
    plain, shared = (train(share=share, max_steps=3, family="qwen3_moe") for share in (False, True))
    assert "router_aux_loss_coef" in caplog.text
    assert [step["loss"] for step in plain] == [step["loss"] for step in shared]
    assert plain[0]["aux_loss"] > 0


@pytest.mark.parametrize("adapter", [{"r": 4, "lora_alpha": 8}, None], ids=["adapter", "full"])
def test_a_reference_that_is_a_model_of_its_own_is_read_in_its_own_place(
    adapter, make_trainer, build_model
):
    # As trl keeps one under FSDP; with the gathering on the policy it would return its whole stream.
    said = []
    for share in (False, True):
        other = build_model("llama", seed=5, dtype=torch.float32)
        trainer = make_trainer(share=share, adapter=adapter, ref_model=other)
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        said.append(torch.tensor([trainer.train_dataset[column] for column in columns]))
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-4)
