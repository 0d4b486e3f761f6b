"""Sharded as accelerate's FSDP 2 shards, a model trains as it does whole; one process is enough to meet DTensors.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_sharded_trainer.py
"""

import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from common.architecture import find_blocks
from tests.sharding import shard, whole
from tests.training import settings_of
from train.adapter import build_adapter, lora_layers
from train.pull import Distance
from train.references import References
from train.shards import is_zero3, numel
from train.trainer import HealingTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's and torch's own

KINDS = pytest.mark.parametrize(
    "adapter", [{"r": 4, "lora_alpha": 8}, None], ids=["adapter", "full"]
)


@pytest.fixture(scope="module")
def mesh():
    """This process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("shards",))
    distributed.destroy_process_group()


@pytest.fixture
def make_trainer(build_model, tokenizer, tmp_path):
    """Make a trainer that keeps what the reference says for the next one."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"question {n}" + " x" * (n % 4)}],
            "chosen": [{"role": "assistant", "content": "good" + " yes" * (n % 3)}],
            "rejected": [{"role": "assistant", "content": "bad" + " no" * (n % 5)}],
        }
        for n in range(8)
    ]

    def make(adapter, *, dtype=torch.float32, **settings):
        torch.manual_seed(0)  # the adapter's initial values
        return HealingTrainer(
            model=build_model("llama", dtype=dtype),
            args=settings_of(tmp_path / "out", **{"max_steps": 4, **settings}),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=build_adapter(adapter) if adapter is not None else None,
            references=References(tmp_path / "references"),
        )

    return make


def _blocks(model):
    return find_blocks(model.get_base_model() if isinstance(model, PeftModel) else model)


def _logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


@KINDS
def test_a_training_that_finds_its_references_computed_begins_in_shards(
    adapter, make_trainer, mesh
):
    whole = make_trainer(adapter)
    whole.train()
    # Nothing has called this model when it is shared out.
    sharded = make_trainer(adapter)
    shard(sharded.model, mesh)
    sharded.train()
    for key in ("loss", "logps/chosen", "grad_norm"):
        assert _logged(sharded, key) == pytest.approx(_logged(whole, key), rel=1e-4), key
    assert _logged(whole, "loss")[-1] < 0.5


@KINDS
def test_references_are_the_same_from_a_model_in_shards(
    adapter, make_trainer, mesh, tmp_path, monkeypatch
):
    whole = make_trainer(adapter).references.read()
    shutil.rmtree(tmp_path / "references")
    monkeypatch.setattr("train.trainer.share_out", lambda _accelerator, model: shard(model, mesh))
    trainer = make_trainer(adapter)
    assert all(isinstance(block, FSDPModule) for block in _blocks(trainer.model))
    found = trainer.references.read()
    assert found.keys() == whole.keys()
    assert all(found[key] == pytest.approx(whole[key], abs=1e-4) for key in whole)
    # Under FSDP 2 the trainer begins with this by itself.
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    trainer.train()
    assert _logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert _logged(trainer, "loss")[-1] < 0.5


def test_what_is_in_shards_counts_whole():
    assert numel(torch.nn.Parameter(torch.zeros(3, 4))) == 12
    # As DeepSpeed leaves them.
    empty = torch.nn.Parameter(torch.zeros(0))
    empty.ds_id, empty.ds_numel = 0, 12
    assert numel(empty) == 12
    module = torch.nn.Module()
    assert not is_zero3(module)
    module.weight = empty
    assert is_zero3(module)


@KINDS
def test_every_block_is_gathered_by_itself(adapter, make_trainer, mesh):
    model = make_trainer(adapter).model
    shard(model, mesh)
    assert all(isinstance(block, FSDPModule) for block in _blocks(model))


def test_the_trainer_keeps_the_launchs_policy_before_it_prepares_its_model(
    make_trainer, monkeypatch
):
    kept = []
    monkeypatch.setattr("train.trainer.keep_wrap_policy", kept.append)
    trainer = make_trainer({"r": 4, "lora_alpha": 8})
    assert kept == [trainer.accelerator]


class Moved(TrainerCallback):
    """How far the weights have gone after each step, written without the code under test."""

    def __init__(self, model):
        """Take a model that nothing has moved."""
        self.model, self.start, self.found = model, self._weights(model), []

    def on_step_end(self, args, state, control, **kwargs):
        """Measure."""
        pairs = zip(self._weights(self.model), self.start, strict=True)
        self.found.append(sum(float((now - then).square().sum()) for now, then in pairs))

    def _weights(self, model):
        layers = [layer for _, layer in lora_layers(model)]
        if not layers:
            return [whole(parameter.detach()).double() for parameter in model.parameters()]
        factors = [
            [whole(half["default"].weight.detach()).double() for half in (each.lora_B, each.lora_A)]
            for each in layers
        ]
        return [
            each.scaling["default"] * b @ a for each, (b, a) in zip(layers, factors, strict=True)
        ]


@KINDS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_pull_sees_how_far_the_weights_go_that_steps_change(dtype, adapter, make_trainer, mesh):
    settings = {"bf16": dtype is not None, "max_steps": 5, "learning_rate": 1e-4}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    free, pulled = (make_trainer(adapter, **settings) for _ in range(2))
    for trainer, weight in ((free, 0.0), (pulled, 1e3)):
        trainer.pull = (weight, Distance(trainer.model))
        shard(trainer.model, mesh, computed_in=dtype)
        trainer.add_callback(moved := Moved(trainer.model))
        trainer.train()
        # Behind a forward pass the unembedding is gathered, and rounded to what it computes in.
        assert _logged(trainer, "l2")[0] == 0
        assert _logged(trainer, "l2")[1:] == pytest.approx(moved.found[:-1], rel=1e-3)
    assert 0 < _logged(pulled, "l2")[-1] < 0.5 * _logged(free, "l2")[-1]


@KINDS
def test_pulled_weights_train_in_shards_as_they_do_whole(adapter, make_trainer, mesh):
    plain, sharded = (make_trainer(adapter) for _ in range(2))
    for trainer in (plain, sharded):
        trainer.pull = (1.0, Distance(trainer.model))
    shard(sharded.model, mesh)
    for trainer in (plain, sharded):
        trainer.train()
    for key in ("loss", "l2", "grad_norm"):
        assert _logged(sharded, key) == pytest.approx(_logged(plain, key), rel=1e-4), key
    assert _logged(plain, "l2")[-1] > 0.1
