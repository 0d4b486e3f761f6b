"""What is read of a checkpoint without its model is what transformers would say of it.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_stored_writers.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.architecture import ARCHITECTURES
from common.errors import InputError
from common.stored_writers import Facts, open_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_facts_are_those_of_the_configuration(family, is_old, build_model, tmp_path):
    model = build_model(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stated = json.loads(file.read_text())
    tied = stated["tie_word_embeddings"]
    if is_old and type(model.config)().tie_word_embeddings == tied:
        # Old files lack what is as the family has it by default.
        del stated["tie_word_embeddings"]
        file.write_text(json.dumps(stated))
    text = model.config.get_text_config()
    assert text.hidden_size != type(text)().hidden_size
    assert open_checkpoint(tmp_path).facts == Facts(
        model.config.model_type, text.num_hidden_layers, text.hidden_size, tied
    )


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"no readable config\.json"):
        open_checkpoint(tmp_path)


def test_an_edit_is_applied_without_waiting_for_transformers(model_folder):
    program = (
        "import sys, pathlib, common.checkpoint, abliteration.direction_file, common.stored_writers\n"
        "common.stored_writers.open_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "print({'transformers', 'accelerate', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
