"""What editing a checkpoint on disk costs beside copying it: time against `cp -r`, and peak memory.

python benchmarks/stream_edit.py [--gigabytes 8] [--folder DIR] [--rounds 2]

Makes a Llama-like checkpoint of random bfloat16 in several shards, then copies it with `cp -r` and edits it with
`python -m abliteration apply` in turns, each followed by a sync. The page cache cannot be dropped without
privileges, so both read what memory happens to hold of the source; each round runs them in the other order. Peak
memory is that of the whole process of the edit, the interpreter and torch included. The folder needs three times
the size. Ratio is copy seconds over edit seconds. The last line is one JSON object.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from common.edits import Edit, Removal, save_edit  # noqa: E402

# At most 1.3 times as long as cp -r; at most three times the largest tensor and 300 MB.
BAR = 1 / 1.3
SHARD_BYTES = 2 * 10**9
VOCABULARY = 128256
POOL = 1 << 25


def main() -> None:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description="Edit a checkpoint on disk beside copying it.")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stream-edit-", dir=options.folder))
    try:
        measure(folder, options.gigabytes, options.rounds)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, gigabytes: float, rounds: int) -> None:
    """Make the checkpoint in an empty folder, measure both in turns, and print."""
    free = shutil.disk_usage(folder).free
    if free < 3 * gigabytes * 1e9:
        sys.exit(f"{folder}: {free / 1e9:.0f} GB are free, {3 * gigabytes:.0f} are needed")
    config = config_of(gigabytes * 1e9)
    largest = make_checkpoint(config, folder / "source")
    save_edit(edit_of(config), folder / "edit.safetensors")
    total = sum(file.stat().st_size for file in (folder / "source").iterdir())
    copy = ["cp", "-r", "source", "output"]
    edit = [sys.executable, "-m", "abliteration", "apply", "--model", str(folder / "source")]
    edit += ["--edit", str(folder / "edit.safetensors"), "--output", str(folder / "output")]
    seconds: dict[str, list[float]] = {"copy": [], "edit": []}
    processor: dict[str, list[float]] = {"copy": [], "edit": []}
    peak = 0
    for number in range(rounds):
        for name in ("copy", "edit") if number % 2 == 0 else ("edit", "copy"):
            where = folder if name == "copy" else ROOT
            took, used, memory = timed(copy if name == "copy" else edit, where)
            processor[name].append(used)
            seconds[name].append(took)
            peak = max(peak, memory) if name == "edit" else peak
            print(
                f"{name}  {took:7.1f} s  {total / took / 1e6:6.0f} MB/s  {used:6.1f} processor s  "
                f"{memory / 1e6:6.0f} MB",
                flush=True,
            )
            shutil.rmtree(folder / "output")
            os.sync()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    limit = 3 * largest + 300 * 10**6
    print(f"edit / copy: {medians['edit'] / medians['copy']:.2f} (bar 1.3)")
    print(
        f"peak memory {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB (bar {limit / 1e6:.0f} MB)"
    )
    row = {
        "shape": f"{total / 1e9:.1f} GB bfloat16, d_model {config.hidden_size}, {config.num_hidden_layers} blocks",
        "ratio": round(medians["copy"] / medians["edit"], 3),
        "bar": round(BAR, 3),
        "copy_seconds": seconds["copy"],
        "edit_seconds": seconds["edit"],
        "copy_processor_seconds": processor["copy"],
        "edit_processor_seconds": processor["edit"],
        "peak_bytes": peak,
        "largest_tensor_bytes": largest,
        "peak_bar_bytes": limit,
    }
    print(json.dumps({"name": "stream_edit", "rows": [row], "ratio": row["ratio"]}))


def config_of(num_bytes: float) -> LlamaConfig:
    """A Llama of about a size: wide as the 8B one, narrower where that would leave few blocks."""
    width = 4096 if num_bytes >= 5e9 else 1024
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 512,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    block = 2 * sum(torch.Size(shape).numel() for shape in shapes_of(config).values())
    layers = round((num_bytes - 4 * VOCABULARY * width) / block)
    config.num_hidden_layers = max(2, layers)
    return config


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's tensors."""
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // 4
    return {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }


def take(pool: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    """Numbers from the pool, over and over: what they are does not matter to the time."""
    taken = torch.empty(shape, dtype=pool.dtype)
    for part in taken.view(-1).split(len(pool) - start):
        part.copy_(pool[start : start + len(part)])
    return taken


def make_checkpoint(config: LlamaConfig, folder: Path) -> int:
    """Write the checkpoint; returns the bytes of its largest tensor."""
    folder.mkdir()
    config.save_pretrained(folder)
    torch.manual_seed(0)
    pool = torch.randn(POOL, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    largest = 0
    for number, tensors in enumerate(shards_of(config, pool), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        largest = max(largest, *(2 * tensor.numel() for tensor in tensors.values()))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    os.sync()
    return largest


def shards_of(config: LlamaConfig, pool: Tensor) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint, gathered to shards."""
    table = (config.vocab_size, config.hidden_size)
    tensors = {"model.embed_tokens.weight": take(pool, table, 0)}
    for index in range(config.num_hidden_layers):
        for name, shape in shapes_of(config).items():
            tensors[f"model.layers.{index}.{name}.weight"] = take(pool, shape, index)
        if sum(2 * tensor.numel() for tensor in tensors.values()) >= SHARD_BYTES:
            yield tensors
            tensors = {}
    tensors["model.norm.weight"] = take(pool, (config.hidden_size,), 0)
    yield tensors | {"lm_head.weight": take(pool, table, 1)}


def edit_of(config: LlamaConfig) -> Edit:
    """One random direction removed from every writer."""
    vector = torch.randn(config.hidden_size, dtype=torch.float64)
    names = ["model.embed_tokens"]
    for index in range(config.num_hidden_layers):
        names += [f"model.layers.{index}.self_attn.o_proj", f"model.layers.{index}.mlp.down_proj"]
    removals = dict.fromkeys(names, Removal(("direction",), (1.0,)))
    return Edit({"direction": vector / vector.norm()}, removals, {}, {}, {})


def timed(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Wall seconds of a command and the sync behind it, its processor seconds, and its peak memory in bytes."""
    began, used = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        peak = 0
        while process.poll() is None:
            # Not the usage that wait() gives: that begins with the memory of this process.
            peak = max(peak, high_water(process.pid))
            time.sleep(0.05)
        os.sync()
        took = time.perf_counter() - began
        assert process.stderr is not None
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return took, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used, peak


def high_water(process: int) -> int:
    """The peak memory of a process so far, in bytes; 0 if it has just ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
