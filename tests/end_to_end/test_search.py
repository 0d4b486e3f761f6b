"""A search holds on prompts it never saw.

Run: make setup && .venv/bin/python -m pytest -m slow tests/end_to_end/test_search.py
"""

from pathlib import Path

import pytest

from tests.road import Launch
from tests.searched import search_and_compare, trials_of


@pytest.mark.slow
def test_a_search_diverges_less_than_the_best_fixed_layer_on_unseen_prompts(
    launch: Launch, patient: Path, patient_recipe: Path, tmp_path: Path
) -> None:
    points = search_and_compare(launch, patient, patient_recipe, tmp_path / "runs")
    assert points["original"].rate >= 0.95
    assert points["search"].rate <= 0.02
    assert points["search"].rate <= points["fixed"].rate
    assert points["search"].kl < points["fixed"].kl
    trials = trials_of(tmp_path / "runs")
    assert len(trials) == 96
    # The race: not everybody was measured to the end, and only finalists answered prompts.
    assert 0 < sum(trial["complete"] for trial in trials) < len(trials)
    assert (
        0
        < sum(trial["rate"] is not None for trial in trials)
        <= sum(trial["complete"] for trial in trials)
    )
