"""The intervals cover what they promise: a quick part of benchmarks/coverage.py.

Run: python -m pytest tests/unit/common/test_coverage.py
"""

import numpy as np
import pytest

from benchmarks import coverage
from common import statistics
from common.statistics import Interval


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of 1,000 resamples is known well enough to be averaged over hundreds of draws."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


@pytest.mark.parametrize(("up", "down"), coverage.FLIPS)
@pytest.mark.parametrize("n", [50, 100])
def test_paired_rates_are_covered_where_few_items_flip(n: int, up: float, down: float) -> None:
    cell = coverage.paired_rates(n, up, down, draws=1)
    assert cell.holds, cell


def test_newcombes_interval_would_not_do() -> None:
    assert coverage.paired_rates(100, 0.02, 0.0, draws=2000).peer < 0.91


@pytest.mark.parametrize(("n", "per_cluster"), [(50, 1), (100, 2)])
def test_skewed_means_are_covered_and_by_bca_less(n: int, per_cluster: int) -> None:
    draws = 250
    cell = coverage.means(n, per_cluster, "lognormal", draws)
    # Three standard errors of a simulation this small below the bar; the slow tier draws more.
    assert cell.coverage >= coverage.LOW - 3 * (0.07 * 0.93 / draws) ** 0.5
    assert cell.coverage <= coverage.HIGH
    assert cell.peer < cell.coverage


@pytest.mark.parametrize("short", [0.02, 0.05])
def test_pooled_recovery_is_covered(short: float) -> None:
    cell = coverage.recoveries(100, 1, short, draws=1000)
    assert cell.coverage >= coverage.LOW - 3 * (0.07 * 0.93 / 1000) ** 0.5
    assert cell.coverage <= coverage.HIGH


def test_an_interval_that_is_too_narrow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(numerators: np.ndarray, denominators: np.ndarray, **_: object) -> Interval:
        value, error = statistics._ratio_and_error(numerators, denominators, None)
        return Interval(value, value - 1.5 * error, value + 1.5 * error)

    monkeypatch.setattr(statistics, "ratio_interval", narrow)
    assert not coverage.means(50, 1, "gamma", 250, peer=False).holds


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8:
        # Newcombe's square-and-add interval (method 10) of two trials (Cavo et al. 2012, Bentur et
        # al. 2009).
        ((59, 6, 16, 80), (-0.0621, -0.1186, -0.0046)),
        ((1, 1, 7, 12), (-0.286, -0.507, -0.026)),
    ],
)
def test_the_peers_interval_gives_the_published_limits(
    table: tuple[int, int, int, int], expected: tuple[float, float, float]
) -> None:
    found = coverage.newcombe_paired(*table)
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=6e-4)
