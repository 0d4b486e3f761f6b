"""A step of DPO: shared prompts against trl's own DPOTrainer with its best flags, in turns; peak memory of both.

OMP_NUM_THREADS=1 python benchmarks/dpo_step.py

Both train the same LoRA (r 16, all linear layers) on the same Llama (width 384, 8 layers, 32k tokens) with the same
batches of 4 pairs in float32: forward, backward and optimizer step. The peer is trl.DPOTrainer without activation
checkpointing and with precomputed references, so that neither computes a reference while it is timed. Lengths are
lognormal around their means with sigma 0.5 as in preference data, and fixed in the rows beside. Losses are held equal.
Time is the CPU time of the process. Memory is the growth of the peak resident size over a training, each figure from a
process of its own. The last line is one JSON object.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402  # a script's own folder comes first on the path
from datasets import Dataset  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from benchmarks.comparison import in_turns, number_words  # noqa: E402
from train.adapter import build_adapter  # noqa: E402
from train.trainer import HealingTrainer  # noqa: E402

VOCABULARY = 32_000
PAIRS, SIGMA, STEPS = 4, 0.5, 7
# Mean tokens of prompt and answer, and how many times faster a step has to be with lognormal lengths.
SHAPES = {(100, 60): 2.3, (256, 128): 2.0, (64, 256): 1.0}


def main() -> None:
    """Print every shape's times and peaks, then the JSON line."""
    rows = []
    for (prompt, answer), bar in SHAPES.items():
        for sigma in (SIGMA, 0.0):
            rows.append(speed(prompt, answer, sigma, bar if sigma else None))
    for prompt, answer in SHAPES:
        rows.append(memory(prompt, answer))
    print(json.dumps({"name": "dpo_step", "rows": rows, "ratio": rows[0]["ratio"]}))


def speed(prompt: int, answer: int, sigma: float, bar: float | None) -> dict[str, Any]:
    """Median seconds of a step of both, in turns."""
    ways = {
        way: partial(next, stepper(make_trainer(way, prompt, answer, sigma)))
        for way in ("shared", "trl")
    }
    losses, taken = in_turns(ways, STEPS)
    torch.testing.assert_close(
        torch.tensor(losses["shared"]), torch.tensor(losses["trl"]), rtol=0, atol=1e-4
    )
    lengths = "lognormal, sigma 0.5" if sigma else "fixed"
    shape = (
        f"Llama 384 x 8, 32k tokens, LoRA r 16, {PAIRS} pairs, prompt {prompt}, answers {answer} ({lengths}); "
        f"float32, {torch.get_num_threads()} threads"
    )
    ratio = taken["trl"] / taken["shared"]
    print(f"{shape}\n  shared {taken['shared']:.2f} s, trl {taken['trl']:.2f} s: {ratio:.2f}x")
    return {
        "shape": shape,
        "ratio": round(ratio, 3),
        "bar": bar,
        "seconds": {way: round(value, 4) for way, value in taken.items()},
        "mean_loss": round(mean(losses["shared"]), 5),
    }


def memory(prompt: int, answer: int) -> dict[str, Any]:
    """Megabytes by which a few steps of each raise the peak of a process of its own."""
    peaks = {}
    for way in ("shared", "trl"):
        command = [sys.executable, __file__, way, str(prompt), str(answer)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[way] = float(done.stdout.splitlines()[-1])
    shape = f"peak memory of 3 steps over the loaded trainer, prompt {prompt}, answers {answer}"
    print(f"{shape}: shared {peaks['shared']:.0f} MB, trl {peaks['trl']:.0f} MB")
    return {
        "shape": shape,
        "ratio": round(peaks["trl"] / peaks["shared"], 3),
        "bar": 1.0,
        "megabytes": {way: round(value, 1) for way, value in peaks.items()},
    }


def measure_peak(way: str, prompt: int, answer: int) -> None:
    """Print the megabytes of one way; runs in the process of its own."""
    trainer = make_trainer(way, prompt, answer, SIGMA)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _resident("VmRSS")
    steps = stepper(trainer)
    for _ in range(3):
        next(steps)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def make_trainer(way: str, prompt: int, answer: int, sigma: float) -> DPOTrainer:
    """A trainer on a new model; its references are computed here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
    )
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PAIRS,
        precompute_ref_log_probs=True,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        max_length=2048,
        report_to="none",
        disable_tqdm=True,
    )
    kind, options = (
        (HealingTrainer, {"share_prompts": True}) if way == "shared" else (DPOTrainer, {})
    )
    return kind(
        model=LlamaForCausalLM(config),
        args=settings,
        train_dataset=dataset(prompt, answer, sigma),
        processing_class=number_words(VOCABULARY),
        peft_config=build_adapter({"r": 16, "lora_alpha": 32}),
        **options,
    )


def stepper(trainer: DPOTrainer) -> Iterator[float]:
    """Train step by step as the trainer does, batch by batch in order; yields losses."""
    model = trainer.model
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    trainer.current_gradient_accumulation_steps = 1
    rows = list(trainer.train_dataset)
    for first in range(0, len(rows), PAIRS):
        batch = trainer.data_collator(rows[first : first + PAIRS])
        loss = trainer.training_step(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


def dataset(prompt: int, answer: int, sigma: float) -> Dataset:
    """Pairs of random words, a token each."""
    rng = random.Random(0)

    def draw(tokens: int) -> str:
        # A lognormal of this mean.
        length = max(2, round(tokens * rng.lognormvariate(-(sigma**2) / 2, sigma)))
        return "".join(f" {rng.randrange(3, VOCABULARY)}" for _ in range(length))

    return Dataset.from_list(
        [
            {"prompt": draw(prompt), "chosen": draw(answer), "rejected": draw(answer)}
            for _ in range(PAIRS * (STEPS + 1))
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
