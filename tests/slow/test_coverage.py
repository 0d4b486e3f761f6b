"""The intervals cover what they promise, in every cell of benchmarks/coverage.py.

Run: python -m pytest -m slow tests/slow/test_coverage.py
"""

import pytest

from benchmarks import coverage
from common import statistics

pytestmark = pytest.mark.slow
DRAWS = 1000
# Two standard errors of a coverage of 93 % from so many draws.
NOISE = 2 * (0.07 * 0.93 / DRAWS) ** 0.5


def test_every_interval_covers_between_93_and_99_5_per_cent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    missed = [
        cell
        for cell in coverage.table(DRAWS, peer=False)
        if not coverage.LOW - NOISE <= cell.coverage <= cell.most
    ]
    assert missed == []
