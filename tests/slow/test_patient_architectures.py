"""Every architecture of the patient reaches the levels that the tests rely on, and a search removes its refusals.

Run: make setup && .venv/bin/python -m pytest -m slow tests/slow/test_patient_architectures.py
"""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from patient.architectures import ARCHITECTURES
from patient.build import build_patient
from tests.road import ROOT
from tests.searched import search_and_compare

OTHERS = [each for each in ARCHITECTURES if each != "llama"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", OTHERS)
def test_it_reaches_the_levels_and_a_search_beats_the_best_fixed_layer(
    architecture, launch, tmp_path
):
    folder = tmp_path / "patient"
    levels = {each.name: each for each in build_patient(folder, architecture, seed=0)}
    assert levels["refusal"].value >= 0.95
    assert levels["over_refusal"].value <= 0.02
    for name in ("addition", "capitals", "kinds", "reversal", "common_howto"):
        assert levels[name].value >= 0.90, name
        assert levels[name].num_items >= 300
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size

    recipe = tmp_path / "patient.yaml"
    text = (ROOT / "recipes" / "patient.yaml").read_text(encoding="utf-8")
    recipe.write_text(text.replace("runs/patient-model", str(folder)), encoding="utf-8")
    points = search_and_compare(launch, folder, recipe, tmp_path / "runs")
    assert points["original"].rate >= 0.95
    # Both were chosen to refuse at most so many validation prompts; which refuses less within that is chance.
    assert points["search"].rate <= 0.02
    assert points["search"].kl < points["fixed"].kl
