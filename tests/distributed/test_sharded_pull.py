"""Two processes that hold a model in shards (FSDP 2) pull it as one does that holds it whole: distance and gradients.

Run: make setup && .venv/bin/python -m pytest tests/distributed/test_sharded_pull.py
"""

import copy

import pytest
import torch
import torch.multiprocessing
from peft import get_peft_model
from torch import distributed

from tests.sharding import shard, whole
from train.adapter import build_adapter
from train.pull import Distance

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore"),  # peft's and torch's own
]

ADAPTER = {"r": 3, "lora_alpha": 8, "init_lora_weights": False, "modules_to_save": ["norm"]}


def _in_shards(rank, models, folder):
    """What each of two processes does: the same steps as one process, with a row of its own."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("shards",))
    for name, model in models.items():
        distance = Distance(model)
        shard(model, mesh)
        found = _steps(model, distance, slice(rank, rank + 1))
        torch.save(found, f"{folder}/{name}-{rank}.pt")
    distributed.destroy_process_group()


def _steps(model, distance, mine=slice(None)):
    """Of a second step how far the first had gone, and the gradients."""
    for step in range(2):
        ids = torch.randint(3, 280, (2, 8), generator=torch.Generator().manual_seed(step))[mine]
        distance.look_up()
        loss = model(input_ids=ids, labels=ids).loss
        gone = distance()
        (loss + 0.5 * gone).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: whole(parameter.grad).clone() for name, parameter in trained.items()}
        torch.optim.SGD(trained.values(), lr=0.1).step()
        model.zero_grad()
    return {"gone": gone.detach(), **gradients}


def test_two_processes_measure_and_pull_as_one_does(build_model, tmp_path):
    base = build_model("llama", attention_bias=True)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), build_adapter(ADAPTER)).double()
    models = {"full": base, "adapter": adapted}
    alone = copy.deepcopy(models)
    torch.multiprocessing.spawn(_in_shards, (models, str(tmp_path)), nprocs=2)
    for name, model in alone.items():
        due = _steps(model, Distance(model))
        assert due["gone"] > 0.01, name
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert found.keys() == due.keys()
            for key, value in due.items():
                torch.testing.assert_close(
                    found[key], value, rtol=1e-8, atol=1e-10, msg=f"{name} {key}"
                )
