"""Parameters that two processes hold in shards (FSDP 2) are measured, penalized and held as whole ones are.

Run: make setup && .venv/bin/python -m pytest -m slow tests/distributed/test_shards.py
"""

import copy
import os

import pytest
import torch
import torch.multiprocessing
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from common.edits import apply_to_weights
from tests.editing import edit_of, vector
from train.adapter import build_adapter
from train.constraint import KeepAblated, find_drifts, penalty
from train.drift import residual

pytestmark = [
    pytest.mark.slow,  # most of a minute on two cores
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # peft's and torch's own
]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "llama": {"target_modules": ["embed_tokens", "o_proj", "down_proj"]},
    "qwen3_moe": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
}
CHANGES = {"llama": {"attention_bias": True}, "qwen3_moe": {"mlp_only_layers": []}}


def _in_shards(rank, port, cases, folder):
    """What each of two processes does: the same training steps and measurements as one process, in shards."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    for name, (model, edit) in cases.items():
        drifts, _ = find_drifts(model, edit)
        blocks = [module for module in model.modules() if type(module).__name__.endswith("Layer")]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = _steps(model, drifts, mesh)
        found["sharded"] = torch.tensor(
            all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
        )
        if rank == 0:
            torch.save(found, f"{folder}/{name}.pt")
    distributed.destroy_process_group()


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _steps(model, drifts, mesh=None):
    """After a free step: what was added, the gradients with the penalty's, and the weights after a held step."""
    for step in range(2):
        # Different rows for each half, as two processes have.
        ids = torch.randint(3, 280, (2, 8), generator=torch.Generator().manual_seed(step))
        mine = ids if mesh is None else ids[mesh.get_rank() :][:1]
        (model(input_ids=mine, labels=mine).loss + penalty(drifts, mine.device)).backward()
        # Sharding puts new parameters in the place of the old.
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {f"grad {name}": _whole(p.grad).clone() for name, p in trained.items()}
        added = torch.tensor(residual(drifts), dtype=torch.float64)
        torch.optim.SGD(trained.values(), lr=0.02).step()
        model.zero_grad()
    KeepAblated(drifts).on_optimizer_step(None, None, None)
    weights = {name: _whole(p).detach().clone() for name, p in trained.items()}
    held = torch.tensor(residual(drifts), dtype=torch.float64)
    return {"residual": added, "held": held, **gradients, **weights}


def test_two_processes_with_fully_sharded_parameters_hold_and_measure_as_one_does(
    build_model, tmp_path
):
    cases = {}
    for family, changes in CHANGES.items():
        model = build_model(family, dtype=torch.float64, **changes)
        edit = edit_of(model, "orthogonalize", vector(1), vector(2))
        apply_to_weights(model, edit)
        torch.manual_seed(0)
        settings = {"r": 3, "lora_alpha": 8, "init_lora_weights": False, **ADAPTERS[family]}
        adapted = get_peft_model(copy.deepcopy(model), build_adapter(settings)).double()
        cases |= {f"{family} full": (model, edit), f"{family} adapter": (adapted, edit)}
    alone = {name: copy.deepcopy(case) for name, case in cases.items()}
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(_in_shards, (port, cases, str(tmp_path)), nprocs=2)
    for name, (model, edit) in alone.items():
        due = _steps(model, find_drifts(model, edit)[0])
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.pop("sharded"), name
        assert due["held"] < 1e-12 < 1e-3 < due["residual"], name
        assert found.pop("held") < 1e-12, name
        due.pop("held")
        for key, value in due.items():
            assert torch.allclose(found[key], value, rtol=1e-8, atol=1e-10), (name, key)
