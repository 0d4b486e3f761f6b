"""A direction found on weights in four bits is removed from the weights in full precision.

Run: make setup && .venv/bin/python -m pytest tests/end_to_end/test_four_bits.py
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.edits import load_edit
from tests.road import Launch


def test_the_source_is_edited_and_scores_as_the_quantized_model_did(
    launch: Launch, patient: Path, patient_recipe: Path, tmp_path: Path
) -> None:
    settings = ("abliteration.load_in_4bit=true", "abliteration.edit.strength=1.0")
    done = launch(
        patient_recipe, "--until", "abliteration", f"output_dir={tmp_path}", *settings, config=None
    )
    assert done.code == 0, done.err
    found = re.search(
        r"scored again: KL (\S+) from what was scored \(the edit moved (\S+),", done.err
    )
    assert found is not None, done.err
    mismatch, moved = map(float, found.groups())
    assert mismatch < 0.05 * moved
    folder = tmp_path / "patient" / "abliteration"
    edit = load_edit(folder / "edit.safetensors")
    before, after = (load_file(path / "model.safetensors") for path in (patient, folder / "model"))
    edited = {f"{name}.weight" for name in edit.removals}
    for name, weight in before.items():
        assert after[name].dtype == torch.float32
        # Quantized weights would differ everywhere.
        assert torch.equal(weight, after[name]) == (name not in edited), name
    direction = edit.vectors["direction"].float()
    written = after["model.layers.0.mlp.down_proj.weight"].T @ direction
    original = before["model.layers.0.mlp.down_proj.weight"].T @ direction
    assert written.norm() < 1e-5 * original.norm()
