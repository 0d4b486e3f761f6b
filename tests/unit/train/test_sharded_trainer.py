"""Sharded as accelerate's FSDP 2 shards, a model trains as it does whole; one process is enough to meet DTensors.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_sharded_trainer.py
"""

import pytest
import torch
from datasets import Dataset
from torch import distributed

from tests.sharding import shard
from tests.training import settings_of
from train.adapter import build_adapter
from train.references import References
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
