"""Reading the residual stream of prompts: speed against a plain loop over transformers, and peak memory.

OMP_NUM_THREADS=1 python benchmarks/extract.py

The plain loop is what one writes without this project: batches of the prompts in the order they came, padded on the
left by the tokenizer, `model(**batch, output_hidden_states=True, logits_to_keep=1)` under inference_mode, the last
positions of `hidden_states[:-1]` stacked and summed in float64. A second one sorts the prompts by length first. All
three read the same prompts with the same model, dtype (float32) and batch size, in turns within one process; their
means are held equal. Time is the CPU time of the process, which neighbours on a shared machine do not lengthen as
they do wall time; with one thread on a quiet machine the two are the same. Memory is the growth of the peak resident
size, each figure from a process of its own. Needs runs/patient-model for its prompts and tokenizer (made where it is
missing). The last line is one JSON object.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from abliteration import activations, layerwise  # noqa: E402  # a script's own folder comes first on the path
from common import chat  # noqa: E402
from common.model import load_model, load_tokenizer  # noqa: E402

PATIENT = ROOT / "runs" / "patient-model"
POSITIONS = 4
BATCH_SIZE = 32
Collect = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Sequence[str]], Tensor]


def main() -> None:
    """Print speeds and peaks, then the JSON line."""
    if not PATIENT.is_dir():
        command = [sys.executable, "-m", "patient", "--output", str(PATIENT)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    tokenizer = load_tokenizer(PATIENT)
    short, mixed = patient_prompts(), mixed_prompts(64)
    system = " ".join(random.Random(1).choices(" ".join(short).split(), k=16))
    opened = [f"{system} {prompt}" for prompt in mixed]
    with tempfile.TemporaryDirectory() as folder:
        qwen2 = Path(folder)
        save_qwen2(qwen2, len(tokenizer))
        rows = [
            speed("Qwen2 (112M, 12 layers), mixed lengths", qwen2, tokenizer, mixed, 3),
            speed("Qwen2 behind a system prompt", qwen2, tokenizer, opened, 3),
            speed("patient (1M, 5 layers), its own prompts", PATIENT, tokenizer, short, 9),
            speed("patient, mixed lengths", PATIENT, tokenizer, mixed_prompts(384), 5),
            growth(qwen2),
            layered(qwen2),
        ]
    print(json.dumps({"name": "extract", "rows": rows, "ratio": rows[0]["ratio"]}))


def speed(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """Prompts per second of `collect` and of the two plain loops, in turns."""
    model = load_model(folder, dtype="float32")
    ways: dict[str, Collect] = {"collect": ours, "plain": plain, "plain_sorted": plain_sorted}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    means = {way: run(model, tokenizer, prompts[:BATCH_SIZE]) for way, run in ways.items()}
    for way in ("plain", "plain_sorted"):
        torch.testing.assert_close(means["collect"], means[way], rtol=1e-3, atol=1e-4)
    for _ in range(repeats):
        for way, run in ways.items():
            start = time.process_time()
            run(model, tokenizer, prompts)
            seconds[way].append(time.process_time() - start)
    rates = {way: len(prompts) / median(taken) for way, taken in seconds.items()}
    lengths = sorted(map(len, chat.encode(tokenizer, prompts)))
    shape = (
        f"{name}; {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, median "
        f"{lengths[len(lengths) // 2]}; batch {BATCH_SIZE}, {torch.get_num_threads()} threads"
    )
    print(shape)
    for way, rate in rates.items():
        print(f"  {way:<13} {rate:8.1f} prompts/s  collect is {rates['collect'] / rate:.2f}x")
    return {
        "shape": shape,
        "ratio": round(rates["collect"] / rates["plain"], 3),
        "bar": 1.5,
        "ratio_to_sorted": round(rates["collect"] / rates["plain_sorted"], 3),
        "seconds": {way: round(median(taken), 4) for way, taken in seconds.items()},
    }


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Tensor:
    """This project's way."""
    options = {"num_positions": POSITIONS, "batch_size": BATCH_SIZE}
    return activations.collect(model, tokenizer, prompts, **options).mean


@torch.inference_mode()
def plain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Tensor:
    """The plain loop."""
    total = torch.zeros(())
    for start in range(0, len(prompts), BATCH_SIZE):
        texts = [chat.render(tokenizer, prompt) for prompt in prompts[start : start + BATCH_SIZE]]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        states = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states
        streams = torch.stack([state[:, -POSITIONS:] for state in states[:-1]], dim=1)
        total = total + streams.double().sum(dim=0)
    return total / len(prompts)


def plain_sorted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Tensor:
    """The plain loop over prompts sorted by length."""
    return plain(model, tokenizer, sorted(prompts, key=len))


def growth(folder: Path) -> dict[str, Any]:
    """The peak of `collect` on some prompts and on four times as many of the same lengths."""
    few, many = (peak("whole", folder, count) for count in (96, 384))
    print(f"memory of collect: {few:.1f} MB for 96 prompts, {many:.1f} MB for 384")
    return {
        "shape": "Qwen2 112M, growth of the peak over the loaded model: 96 prompts against 384",
        "ratio": round(few / many, 3),
        "bar": 0.8,
        "megabytes": {"96": round(few, 1), "384": round(many, 1)},
    }


def layered(folder: Path) -> dict[str, Any]:
    """The peak of loading and reading the whole model, and of going through it block by block."""
    whole, layer = (peak(way, folder, 96) for way in ("load", "layerwise"))
    print(f"memory with the weights: whole model {whole:.0f} MB, block by block {layer:.0f} MB")
    return {
        "shape": "Qwen2 112M (450 MB), weights included: collect (leaves the unembedding unread) against layerwise",
        "ratio": round(whole / layer, 3),
        "bar": 3.0,
        "megabytes": {"whole": round(whole, 1), "layerwise": round(layer, 1)},
    }


def peak(way: str, folder: Path, count: int) -> float:
    """Megabytes by which the peak resident size of a process of its own grows."""
    command = [sys.executable, __file__, way, str(folder), str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measure_peak(way: str, folder: Path, count: int) -> None:
    """Print the megabytes of one way; runs in the process of its own."""
    tokenizer, prompts = load_tokenizer(PATIENT), patient_prompts()[:count]
    model = load_model(folder, dtype="float32") if way == "whole" else None
    # Warm up, so that what libraries hold on their first use is not counted.
    ours(load_model(PATIENT), tokenizer, prompts[:BATCH_SIZE])
    if model is not None:
        ours(model, tokenizer, prompts[:1])  # reads the weights, which are mapped until then
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = _resident("VmRSS")
    if way == "layerwise":
        options = {"num_positions": POSITIONS, "batch_size": BATCH_SIZE}
        layerwise.collect(folder, tokenizer, [prompts], **options)
    else:
        ours(model or load_model(folder, dtype="float32"), tokenizer, prompts)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def patient_prompts() -> list[str]:
    """The prompts the patient's demo reads, all of similar length."""
    lines = [
        line
        for name in ("harmful_train", "harmless_train")
        for line in (PATIENT / "prompts" / f"{name}.jsonl").read_text().splitlines()
    ]
    return [json.loads(line)["prompt"] for line in lines]


def mixed_prompts(count: int) -> list[str]:
    """Prompts as long as instructions are: the number of words is log-normal, half are under 14."""
    generator = random.Random(0)
    words = " ".join(patient_prompts()).split()
    return [
        " ".join(
            generator.choices(words, k=min(200, max(3, round(generator.lognormvariate(2.6, 0.7)))))
        )
        for _ in range(count)
    ]


def save_qwen2(folder: Path, vocab_size: int) -> None:
    """A Qwen2 with random weights and a real vocabulary's unembedding."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=max(24_000, vocab_size),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure_peak(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
