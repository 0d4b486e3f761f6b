"""Every architecture of the patient reaches the levels that the demo and the tests rely on.

Run: make setup && .venv/bin/python -m pytest -m slow tests/slow/test_patient_architectures.py
"""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from patient.architectures import ARCHITECTURES
from patient.build import build_patient

OTHERS = [each for each in ARCHITECTURES if each != "llama"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", OTHERS)
def test_it_reaches_the_levels_and_reloads(architecture, tmp_path):
    folder = tmp_path / "patient"
    levels = {each.name: each for each in build_patient(folder, architecture, seed=0)}
    assert levels["refusal"].value >= 0.95
    assert levels["over_refusal"].value <= 0.02
    for name in ("addition", "capitals", "kinds", "reversal", "common_howto"):
        assert levels[name].value >= 0.90, name
        assert levels[name].num_items >= 300
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
