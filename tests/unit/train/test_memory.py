"""Memory by arithmetic: what each strategy shares out, and that one process really takes what it says.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_memory.py
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.launch import Strategy, strategy_of
from train.memory import FLOAT32, TILES_OF_TORCH, TILES_OF_TRITON, Shape, training_memory

ROOT = Path(__file__).resolve().parents[3]
# Llama 3 8B, two pairs of 2048 tokens, an adapter of rank 64.
LLAMA = Shape(
    weights=8_030_261_248,
    packed=0,
    trained=167_772_160,
    adapter=True,
    width=2,
    largest_block=525_336_576,
    tokens=8192,
    layers=32,
    hidden=4096,
    heads=4096,
    inner=14336,
    vocabulary=128256,
    tiles=TILES_OF_TRITON,
    checkpointing=True,
)
FULL = dataclasses.replace(LLAMA, adapter=False, trained=LLAMA.weights)
USED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def zero(stage):
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


@pytest.mark.parametrize(
    ("environment", "processes", "expected"),
    [
        ({}, 1, ("one process", False, False, False)),
        ({}, 8, ("DDP", False, False, False)),
        (USED, 8, ("FSDP2", True, True, True)),
        ({"ACCELERATE_USE_FSDP": "true"}, 8, ("FSDP1", True, True, True)),
        (zero(1), 8, ("ZeRO-1", False, False, True)),
        (zero(2), 8, ("ZeRO-2", False, True, True)),
        (zero(3), 8, ("ZeRO-3", True, True, True)),
    ],
)
def test_the_strategy_is_what_accelerate_was_told(environment, processes, expected):
    found = strategy_of(environment, processes)
    assert (found.name, *dataclasses.astuple(found)[2:]) == expected
    assert found.processes == processes


def test_plain_data_parallelism_shares_nothing_out():
    assert training_memory(FULL, Strategy("DDP", 8)) == training_memory(FULL, Strategy("DDP", 1))


def test_sharding_divides_what_it_shares_and_gathers_one_block():
    one, many = (
        training_memory(FULL, Strategy("FSDP2", count, True, True, True)) for count in (1, 8)
    )
    gathered = FULL.largest_block * FULL.width
    assert many.weights - gathered == pytest.approx((one.weights - gathered) / 8)
    assert many.weights - gathered == pytest.approx(FLOAT32 * FULL.weights / 8)
    assert (many.gradients, many.optimizer) == (one.gradients / 8, one.optimizer / 8)
    assert many.activations == one.activations


def test_zero_two_keeps_the_weights_whole_and_a_wide_copy_of_its_part():
    memory = training_memory(FULL, Strategy("ZeRO-2", 8, False, True, True))
    assert memory.weights == 2 * FULL.weights
    assert memory.gradients == 2 * FULL.trained / 8
    assert memory.optimizer == (2 * 2 + FLOAT32) * FULL.trained / 8


def test_an_adapter_has_gradients_and_moments_of_its_own_alone():
    memory = training_memory(LLAMA, Strategy("one process"))
    assert memory.weights == 2 * LLAMA.weights + FLOAT32 * LLAMA.trained
    assert (memory.gradients, memory.optimizer) == (4 * LLAMA.trained, 8 * LLAMA.trained)
    packed = dataclasses.replace(LLAMA, packed=6_979_321_856)
    assert training_memory(packed, Strategy("one process")).weights < 0.42 * memory.weights


def test_checkpointing_keeps_the_inputs_of_blocks_and_the_inside_of_one():
    kept = training_memory(LLAMA, Strategy("one process")).activations
    whole = dataclasses.replace(LLAMA, checkpointing=False)
    assert kept < 0.2 * training_memory(whole, Strategy("one process")).activations


PROGRAM = """
import json, os, random, sys
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig
from train.adapter import build_adapter
from train.anchors import AnchorBatches, TeacherRow
from train.pull import Distance
from train.streams import Sketch
from train.trainer import HealingTrainer, WeightedAnchor

torch.set_num_threads(1)
kind, terms, folder = sys.argv[1:]
WORDS, LENGTH, PAIRS = (24000, 48, 2) if terms == "anchors" else (8000, 192, 2)
ROWS, BATCH, ANSWER, TOP, SIZE = 2000, 16, 96, 64, 64
words = {**{f"w{i}": i for i in range(WORDS - 2)}, "<pad>": WORDS - 2, "<eos>": WORDS - 1}
backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
draw = random.Random(0)
text = lambda count: " ".join(f"w{draw.randrange(WORDS - 2)}" for _ in range(count))
rows = [{"prompt": text(4) + " ", "chosen": text(LENGTH), "rejected": text(LENGTH)} for _ in range(4)]
config = AutoConfig.for_model(
    "llama", hidden_size=384, intermediate_size=1056, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=2, vocab_size=WORDS, tie_word_embeddings=False,
)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
draw_ids = lambda count: [draw.randrange(WORDS - 2) for _ in range(count)]
taught = lambda: TeacherRow(
    draw_ids(8), draw_ids(ANSWER), torch.randint(WORDS, (ANSWER, TOP)), torch.full((ANSWER, TOP), -9.0),
    torch.randn(8 + ANSWER, 6, SIZE),
)
anchors = []
if terms == "anchors":
    sketch = Sketch(SIZE, torch.eye(384, dtype=torch.float64)[:1])
    batches = AnchorBatches([taught() for _ in range(ROWS)], BATCH, 0)
    anchors = [WeightedAnchor("original", batches, 1.0, sketch, 1.0)]
trainer = HealingTrainer(
    model=AutoModelForCausalLM.from_config(config, dtype=torch.float32),
    args=DPOConfig(
        output_dir=folder, per_device_train_batch_size=PAIRS, max_steps=2, max_length=LENGTH,
        report_to="none", bf16=False, use_cpu=True, activation_checkpointing=False,
        dataloader_pin_memory=False, save_strategy="no", precompute_ref_log_probs=True,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=build_adapter({"r": 16}) if kind == "adapter" else None,
    anchors=anchors,
)
if terms == "l2":
    trainer.pull = (0.1, Distance(trainer.model))
trainer.train()
[line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
numbers = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
print(json.dumps({"grown": int(line.split()[1]) * 1024 - before, "trained": sum(numbers)}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's own")
@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("adapter", "anchors"),
        ("full", "l2"),
        *(
            pytest.param(kind, terms, marks=pytest.mark.slow)
            for kind, terms in (("adapter", ""), ("full", ""), ("full", "anchors"))
        ),
    ],
)
def test_one_process_takes_what_the_estimate_says(kind, terms, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, terms, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Freed memory goes back at once, so that the peak is what was needed.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    block = 2 * 384 * 384 + 2 * 384 * 128 + 3 * 384 * 1056 + 2 * 384
    anchored = terms == "anchors"
    words, length = (24000, 48) if anchored else (8000, 192)
    shape = Shape(
        weights=6 * block + 2 * words * 384 + 384,
        packed=0,
        trained=found["trained"],
        adapter=kind == "adapter",
        width=4,
        largest_block=words * 384,
        tokens=2 * 2 * length,
        layers=6,
        hidden=384,
        heads=384,
        inner=1056,
        vocabulary=words,
        tiles=TILES_OF_TORCH,
        checkpointing=False,
        anchor_tokens=16 * (8 + 96) if anchored else 0,
        anchor_answers=16 * 96 if anchored else 0,
        taught=2000 * (96 * 64 * (8 + 4) + (8 + 96) * 6 * 64 * 4) if anchored else 0,
        pulled=terms == "l2",
    )
    if kind == "full":
        assert shape.weights == found["trained"]
    estimate = training_memory(shape, Strategy("one process")).total
    assert found["grown"] == pytest.approx(estimate, rel=0.25)
