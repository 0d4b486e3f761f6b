"""What training adds along removed vectors is measured as it is, and costs what it should.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_drift.py
"""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from common.architecture import find_writers
from common.edits import apply_to_weights, as_stored
from common.errors import StageError
from tests.editing import edit_of, vector
from tests.training import settings_of
from train.adapter import build_adapter
from train.constraint import (
    PENALTY_WEIGHT,
    find_drifts,
    keep_ablated,
    penalty,
    penalty_weight,
)
from train.drift import residual
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's, peft's and torch's own

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "llama": {"target_modules": ["embed_tokens", "o_proj", "down_proj"], "use_rslora": True},
    "gpt2": {"target_modules": ["wte", "c_proj"]},
    "qwen3_moe": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    "gpt_oss": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
}


@pytest.fixture
def abliterated(build_model):
    """Make an edited model that loses two vectors, with its edit."""

    def make(family, dtype=torch.float64, **changes):
        if "moe" in family:
            changes |= {"mlp_only_layers": []}
        model = build_model(family, dtype=dtype, **changes)
        edit = edit_of(model, "orthogonalize", vector(1), vector(2))
        apply_to_weights(model, edit)
        return model, edit

    return make


def _trained(model, family, adapter):
    """The model with random changes, and, by writer, its differentiable change [..., d_in, d_model]."""
    torch.manual_seed(0)
    if not adapter:
        drifting = copy.deepcopy(model)
        for parameter in drifting.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        return drifting
    settings = {"r": 3, "lora_alpha": 8, "init_lora_weights": False, **ADAPTERS[family]}
    return get_peft_model(copy.deepcopy(model), build_adapter(settings)).double()


def _explicit(trained, model, drifts):
    """|U^T dW|^2 / (|[W b]|^2 k / d_model) by writer, from a whole dW that autograd knows."""
    writers = {writer.name: writer for writer in find_writers(model)}
    shares = []
    for drift in drifts:
        before = writers[drift.writer]
        if hasattr(drift, "layer"):
            changes = [as_stored(drift.layer.get_delta_weight(drift.adapter), before.layout)]
        else:
            after = next(w for w in find_writers(trained) if w.name == drift.writer)
            changes = [as_stored(after.weight - before.weight.detach(), before.layout)]
            if after.bias is not None:
                changes.append(after.bias - before.bias.detach())
        along = sum((change @ drift.basis.T).square().sum() for change in changes)
        size = before.weight.detach().square().sum()
        size = size + (0 if before.bias is None else before.bias.detach().square().sum())
        shares.append(along / (size * len(drift.basis) / drift.basis.shape[1]))
    return torch.stack(shares)


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("family", ADAPTERS)
def test_penalty_and_residual_and_gradient_are_those_of_the_whole_change(
    family, adapter, abliterated
):
    model, edit = abliterated(family)
    start = copy.deepcopy(model)
    if adapter:
        trained = _trained(model, family, adapter=True)
        drifts, problems = find_drifts(trained, edit)
    else:
        # Its drifts are found before training.
        trained = copy.deepcopy(model)
        drifts, problems = find_drifts(trained, edit)
        assert residual(drifts) == 0.0
        trained.load_state_dict(_trained(model, family, adapter=False).state_dict())
    assert not problems
    assert {len(drift.basis) for drift in drifts} == {2}
    shares = _explicit(trained, start, drifts)
    assert residual(drifts) == pytest.approx(math.sqrt(float(shares.max())), rel=1e-12)
    ours, theirs = penalty(drifts, torch.device("cpu")), shares.mean()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    mine = torch.autograd.grad(ours, parameters, allow_unused=True)
    explicit = torch.autograd.grad(theirs, parameters, allow_unused=True)
    moved = 0.0
    for gradient, due in zip(mine, explicit, strict=True):
        assert (gradient is None) == (due is None)
        if due is not None:
            assert (gradient - due).norm() <= 1e-12 * due.norm()
            moved += float(due.norm())
    assert moved > 0


SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "logging_steps": 2,
}


@pytest.fixture
def train(tokenizer, tmp_path):
    """Train an edited model on a few pairs under a mode."""
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

    def run(model, edit, mode, adapter, **settings):
        torch.manual_seed(0)
        trainer = HealingTrainer(
            model=copy.deepcopy(model),
            args=settings_of(tmp_path, **{**SETTINGS, **settings}),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=build_adapter(adapter) if adapter else None,
        )
        keep_ablated(trainer, edit, mode)
        trainer.train()
        return trainer

    return run


def _logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("adapter", [{"r": 4}, None], ids=["adapter", "full"])
def test_training_logs_its_residual_and_a_penalty_makes_it_small(adapter, abliterated, train):
    model, edit = abliterated("olmo2", dtype=torch.float32)
    none, soft, hard = (train(model, edit, mode, adapter) for mode in ("none", "soft", "hard"))
    residuals = {
        mode: _logged(trainer, "ablation/residual")
        for mode, trainer in {"none": none, "soft": soft, "hard": hard}.items()
    }
    assert len(residuals["none"]) == 3
    assert residuals["none"][-1] > 0.01
    assert residuals["soft"][-1] < 0.5 * residuals["none"][-1]
    assert max(residuals["hard"]) < 1e-5
    assert residuals["none"][-1] == pytest.approx(residual(none.drifts), rel=1e-6)
    penalties = _logged(soft, "keep_ablated/penalty")
    assert min(penalties) >= 0
    assert max(penalties) > 0
    assert all("keep_ablated/penalty" not in entry for entry in none.state.log_history)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penalty_enters_the_loss_once_however_many_passes_a_step_has(
    accumulation, abliterated, train, monkeypatch
):
    model, edit = abliterated("llama", dtype=torch.float32)
    settings = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "logging_steps": 1,
    }
    trainer = train(model, edit, "soft", None, **settings)
    plain = _logged(train(model, edit, "none", None, **settings), "loss")
    # At the first step nothing was added; behind it the losses part by the weighted penalty.
    first, second = _logged(trainer, "loss")
    assert first == pytest.approx(plain[0], abs=1e-4)
    due = plain[1] + penalty_weight(1, 2) * _logged(trainer, "keep_ablated/penalty")[1]
    assert second == pytest.approx(due, abs=1e-4)
    assert due - plain[1] > 1e-2


def test_the_penalty_is_strongest_at_the_start_and_nothing_at_the_end():
    weights = [penalty_weight(step, 4) for step in range(5)]
    assert weights == [PENALTY_WEIGHT * share for share in (1, 0.75, 0.5, 0.25, 0)]


def test_where_training_cannot_be_held_it_may_only_be_free(abliterated, train, caplog):
    model, edit = abliterated("llama", dtype=torch.float32)
    adapter = {"r": 4, "use_dora": True}
    for mode in ("soft", "hard"):
        with pytest.raises(StageError, match=r"DoRA .*, or set train\.keep_ablated to none"):
            train(model, edit, mode, adapter)
    with caplog.at_level("INFO"):
        trainer = train(model, edit, "none", adapter)
    assert "ablation/residual is not logged, since DoRA" in caplog.text
    assert all("ablation/residual" not in entry for entry in trainer.state.log_history)
