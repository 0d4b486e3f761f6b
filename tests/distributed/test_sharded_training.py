"""Weights shared between two processes (FSDP2) train as whole ones do: the loss on shared prompts, step by step.

accelerate turns FSDP into plain data parallelism on a CPU, and says nothing; so the programs below share the weights
out themselves, with torch's own fully_shard over gloo, under TRL's loss as the trainer calls it.

make setup && .venv/bin/python -m pytest tests/distributed/test_sharded_training.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A minute on two cores.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from common.branches import Branches, pack
from train.shared_prompts import SharedPrompts

out, kind = sys.argv[1], sys.argv[2]
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
torch.set_num_threads(1)
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False, initializer_range=0.15,
)
inner = model = AutoModelForCausalLM.from_config(config)
add_fused_lm_head(inner, outputs=("log_probs",))
if kind == "lora":
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(inner, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
if world > 1:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (world,))
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    # PEFT calls the inner model past its hooks, so below an adapter the backbone is the root.
    fully_shard(inner if kind == "full" else inner.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in inner.model.parameters()), "a weight is not shared out"
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
PAIRS = [
    ([1, 5, 6, 7], [8, 9, 2], [10, 2]),
    ([1, 11], [12, 13, 14, 2], [15, 16, 2]),
    ([1, 17, 18], [19, 2], [20, 21, 22, 2]),
    ([1, 23, 24, 25, 26], [27, 28, 2], [29, 30, 2]),
]


def logps(pairs):
    rows = [prompt + chosen for prompt, chosen, _ in pairs] + [p + r for p, _, r in pairs]
    starts = [len(prompt) for prompt, _, _ in pairs] * 2
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    packed = pack([Branches(p, [c, r]) for p, c, r in pairs], 0, torch.device("cpu"))
    read = SharedPrompts(model, inner, packed)(
        input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
    )
    return read.log_probs.sum(dim=1).chunk(2)


mine = PAIRS[rank::world]
with torch.no_grad():
    reference = [part.clone() for part in logps(mine)]
losses = []
for _ in range(3):
    chosen, rejected = logps(mine)
    margin = (chosen - reference[0]) - (rejected - reference[1])
    loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    if world > 1:
        dist.all_reduce(mean)
    losses.append(float(mean) / world)
if rank == 0:
    with open(out, "w") as file:
        json.dump({"world": world, "losses": losses}, file)
if world > 1:
    dist.destroy_process_group()
"""


def run(processes: int, kind: str, folder: Path) -> list[float]:
    """The losses of three steps, by as many processes."""
    program, out = folder / "program.py", folder / f"{kind}-{processes}.json"
    program.write_text(PROGRAM)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, str(program), str(out), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["world"] == processes
    losses: list[float] = found["losses"]
    return losses


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shared_out_weights_give_the_losses_of_whole_ones(kind: str, tmp_path: Path) -> None:
    one, two = run(1, kind, tmp_path), run(2, kind, tmp_path)
    assert two == pytest.approx(one, abs=1e-5)
    assert one[0] == pytest.approx(0.693147, abs=1e-5)
    assert one[2] < one[0] - 1e-2, "two steps have to show"
