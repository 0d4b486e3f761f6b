"""Every loss that the check takes begins at the reference and moves the model, on shared prompts.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_losses.py
"""

import copy
import math

import pytest
import torch
from datasets import Dataset

from tests.training import settings_of
from train.adapter import build_adapter
from train.settings import _words, check_trainer
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own

# What a loss is before the first step, where chosen and rejected are as likely as under the reference; beta is 0.1.
AT_THE_REFERENCE = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": 0.5 * (2 * math.log(0.5) - math.log(1e-3) - math.log(1 - 1e-3)),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * (math.log(2) + 1),
    "sft": None,  # the chosen answers' own
    "sigmoid_norm": math.log(2),
}


@pytest.fixture(scope="module")
def model(build_model):
    return build_model("llama", dtype=torch.float32)


@pytest.fixture
def train(model, tokenizer, tmp_path):
    """Train a copy of the model for two steps; gives the log and the trainer."""

    def run(worse="bad", share_prompts=True, **settings):
        pairs = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": f"question {n}" + " x" * (n % 4)}],
                    "chosen": [{"role": "assistant", "content": "good" + " yes" * (n % 3)}],
                    "rejected": [{"role": "assistant", "content": worse and worse + " no" * n}],
                }
                for n in range(4)
            ]
        )
        torch.manual_seed(0)
        trainer = HealingTrainer(
            model=copy.deepcopy(model),
            args=settings_of(tmp_path / "out", **settings),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=build_adapter({"r": 4, "lora_alpha": 8}),
            share_prompts=share_prompts,
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry], trainer

    return run


def test_every_loss_of_the_installed_trl_is_tried_here():
    assert set(_words("loss_type")) == AT_THE_REFERENCE.keys()


@pytest.mark.parametrize("loss", AT_THE_REFERENCE)
def test_a_loss_begins_at_the_reference_and_moves_the_model(loss, train):
    settings = {"loss_type": [loss], **({"label_smoothing": 1e-3} if loss == "exo_pair" else {})}
    assert check_trainer(settings) == []
    (first, second), _ = train(**settings)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    if AT_THE_REFERENCE[loss] is not None:
        assert first["loss"] == pytest.approx(AT_THE_REFERENCE[loss], rel=1e-3)
    assert abs(second["rewards/chosen"]) > 1e-3
    assert math.isfinite(second["loss"])


def test_the_likelihood_of_the_chosen_answers_alone_is_plain_fine_tuning(train):
    # The rejected answers are read, for the metrics, and nothing is learned from them.
    entries, trainer = train(loss_type=["sft"], max_steps=6)
    rows = [[*row["prompt_ids"], *row["chosen_ids"]] for row in trainer.train_dataset]
    answers = [len(row["chosen_ids"]) for row in trainer.train_dataset]
    with torch.no_grad(), trainer.model.disable_adapter():
        logps = [
            trainer.model(torch.tensor([ids]))
            .logits[0, :-1]
            .log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][-count:]
            for ids, count in zip(rows, answers, strict=True)
        ]
    assert entries[0]["loss"] == pytest.approx(-float(torch.cat(logps).mean()), rel=1e-4)
    assert entries[-1]["loss"] < 0.95 * entries[0]["loss"]


@pytest.mark.parametrize("engine", ["shared", "trl"])
def test_without_a_worse_answer_fine_tuning_is_the_same(engine, train):
    settings = {"loss_type": ["sft"], "max_steps": 4, "share_prompts": engine == "shared"}
    paired, first = train(**settings)
    alone, second = train(worse="", **settings)
    assert [entry["loss"] for entry in alone] == pytest.approx(
        [entry["loss"] for entry in paired], rel=1e-4
    )
    weights = dict(first.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-3, atol=1e-5)
