"""A streaming edit that is killed goes on where it was, and ends with the same bytes.

Run: make setup && .venv/bin/python -m pytest tests/end_to_end/test_kill_apply.py
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from common.edits import Edit, Removal, save_edit

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, WIDTH = 4, 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One file of 0.4 GB whose last tensors are edited too, and an edit of it."""
    folder = tmp_path_factory.mktemp("kill")
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=8 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        vocab_size=1000,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder / "source")
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (1000, WIDTH)}
    for block in range(BLOCKS):
        shapes[f"model.layers.{block}.mlp.down_proj"] = (WIDTH, 8 * WIDTH)
        shapes[f"model.layers.{block}.mlp.up_proj"] = (8 * WIDTH, WIDTH)
        shapes[f"model.layers.{block}.self_attn.o_proj"] = (WIDTH, WIDTH)
    save_file(
        {
            f"{name}.weight": torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        },
        folder / "source" / "model.safetensors",
    )
    vector = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    names = [name for name in shapes if "up_proj" not in name]
    removals = dict.fromkeys(names, Removal(("direction",), (1.0,)))
    edit = Edit({"direction": vector / vector.norm()}, removals, {}, {}, {})
    save_edit(edit, folder / "edit.safetensors")
    return folder


def _command(folder, output):
    command = [sys.executable, "-m", "abliteration", "apply", "--model", str(folder / "source")]
    return [*command, "--edit", str(folder / "edit.safetensors"), "--output", str(output)]


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _tensors_done(journal):
    if not journal.is_file():
        return []
    lines = [
        json.loads(line)
        for line in journal.read_text().splitlines(keepends=True)
        if line[-1] == "\n"
    ]
    return [line["step"] for line in lines if "step" in line]


def test_killed_with_9_and_run_again_the_edit_ends_with_the_same_bytes(checkpoint, tmp_path):
    subprocess.run(_command(checkpoint, tmp_path / "whole"), cwd=ROOT, check=True)
    output, partial = tmp_path / "output", tmp_path / ".output.partial"
    with subprocess.Popen(_command(checkpoint, output), cwd=ROOT) as process:
        # Stopped as soon as two tensors are written, so that the blow falls in the middle of the work.
        while len(_tensors_done(partial / "journal.jsonl")) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    done = _tensors_done(partial / "journal.jsonl")
    assert 2 <= len(done) < 2 * BLOCKS + 1
    size = (partial / "model" / "model.safetensors").stat().st_size
    assert 0 < size < (checkpoint / "source" / "model.safetensors").stat().st_size
    first = (partial / "model" / "model.safetensors").stat().st_ino
    subprocess.run(_command(checkpoint, output), cwd=ROOT, check=True)
    assert (output / "model.safetensors").stat().st_ino == first, "the work was thrown away"
    assert _bytes(output) == _bytes(tmp_path / "whole")
    assert not partial.exists()
