"""Verdicts: every rule on planted answers, so that a changed rule fails.

Run: python -m pytest tests/unit/eval/test_comparison.py
"""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from common import statistics
from common.statistics import Difference
from eval import comparison
from eval.comparison import AdjustedP, Answers, Comparison, Role, Verdict


def answers(*groups: tuple[int, int, int, int]) -> Answers:
    """Items by (count, original, abliterated, healed), every one its own cluster."""
    rows = np.array([group[1:] for group in groups for _ in range(group[0])], dtype=float)
    return Answers(rows[:, 0], rows[:, 1], rows[:, 2], np.arange(len(rows)))


def judge(one: Answers, *, role: Role = "capability", margin: float = 0.05) -> Verdict:
    compared = comparison.compare(one, seed=0)
    (adjusted,) = comparison.adjust([compared])
    return comparison.verdict(compared, adjusted, role=role, margin=margin)


BASE = ((150, 1, 1, 1), (50, 0, 0, 0))
CASES: Sequence[tuple[str, Answers, Role, Verdict]] = [
    ("nothing changed", answers(*BASE), "capability", "undamaged"),
    ("all came back", answers(*BASE, (100, 1, 0, 1)), "capability", "recovered"),
    (
        "most came back, but not surely enough",
        answers(*BASE, (80, 1, 0, 1), (20, 1, 0, 0)),
        "capability",
        "not shown",
    ),
    ("none came back", answers(*BASE, (100, 1, 0, 0)), "capability", "not shown"),
    ("damaged and then worse", answers(*BASE, (60, 1, 0, 0), (20, 1, 1, 0)), "capability", "worse"),
    ("undamaged and then worse", answers(*BASE, (30, 1, 1, 0)), "capability", "worse"),
    # 8 of 208 lost by healing alone: significant (p = .008), yet the interval reaches beyond
    # neither -.08.
    ("worse is told inside the margin too", answers(*BASE, (8, 1, 1, 0)), "capability", "worse"),
    # 15 lost by the edit, 4 of them kept lost: below the original, but above the abliterated model.
    (
        "below the original is no fault of healing",
        answers(*BASE, (15, 1, 0, 1), (8, 1, 0, 0)),
        "capability",
        "not shown",
    ),
    ("a gain over the original", answers(*BASE, (60, 0, 0, 1)), "capability", "undamaged"),
    (
        "the edit helped and healing kept it",
        answers(*BASE, (60, 0, 1, 1)),
        "capability",
        "undamaged",
    ),
    ("the edit helped and healing lost it", answers(*BASE, (60, 0, 1, 0)), "capability", "worse"),
    ("unlocked and kept", answers((150, 0, 1, 1), (50, 0, 0, 0)), "unlocked", "undamaged"),
    ("unlocked and lost", answers((100, 0, 1, 1), (50, 0, 1, 0)), "unlocked", "worse"),
    (
        "unlocked, and too few items to say",
        answers((8, 0, 1, 1), (2, 0, 1, 0)),
        "unlocked",
        "not shown",
    ),
    # Against the original this would be worse than nothing; against the abliterated model nothing
    # is lost.
    (
        "unlocked at the price of the original's answers",
        answers((60, 1, 0, 0), (140, 1, 1, 1)),
        "unlocked",
        "undamaged",
    ),
]


@pytest.mark.parametrize(
    ("one", "role", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_verdict_says_what_the_items_show(one: Answers, role: Role, expected: Verdict) -> None:
    assert judge(one, role=role) == expected


def test_not_inferior_means_the_lower_bound_against_the_margin() -> None:
    one = answers((280, 1, 1, 1), (100, 1, 0, 1), (10, 1, 0, 0))
    gap = comparison.compare(one, seed=0).gap
    assert judge(one, margin=-gap.low + 0.001) == "recovered"
    assert judge(one, margin=-gap.low - 0.001) == "not shown"
    assert gap.value == pytest.approx(-10 / 390)


def test_worse_needs_significance_after_adjustment_and_the_right_sign() -> None:
    level = Difference(-0.02, -0.03, 0.01, 0.03)
    compared = Comparison(damage=level, gain=level, gap=level, minimum_detectable_effect=None)

    def of(damage: float, gain: float, gap: float) -> Verdict:
        return comparison.verdict(
            compared, AdjustedP(damage, gain, gap), role="capability", margin=0.05
        )

    assert of(0.9, 0.04, 0.9) == "worse"
    assert of(0.9, 0.9, 0.04) == "worse"
    assert of(0.9, 0.9, 0.9) == "undamaged"
    assert (
        of(0.04, 0.9, 0.04) == "recovered"
    )  # below the original, but not by more than the edit did
    assert of(0.04, 0.04, 0.9) == "worse"
    up = Difference(0.02, -0.01, 0.03, 0.03)
    compared = Comparison(damage=up, gain=up, gap=up, minimum_detectable_effect=None)
    assert of(0.04, 0.04, 0.04) == "undamaged"


def test_differences_have_the_signs_they_are_named_for() -> None:
    one = comparison.compare(answers((6, 1, 1, 1), (3, 1, 0, 0), (1, 1, 0, 1)), seed=0)
    assert one.damage.value == pytest.approx(-0.4)
    assert one.gain.value == pytest.approx(0.1)
    assert one.gap.value == pytest.approx(-0.3)
    assert one.damage.p == pytest.approx(stats.binomtest(0, 4).pvalue)


def test_many_benchmarks_make_one_chance_finding_insignificant() -> None:
    by_chance = answers(*BASE, (8, 1, 1, 0), (1, 1, 0, 1))
    compared = [comparison.compare(one, seed=0) for one in (by_chance, *[answers(*BASE)] * 9)]
    alone, among_ten = comparison.adjust(compared[:1])[0], comparison.adjust(compared)[0]
    assert alone.gap < 0.05 < among_ten.gap
    assert among_ten.gap == pytest.approx(10 * compared[0].gap.p)


def test_a_benchmarks_recovery_may_exceed_one_and_the_pools_may_not() -> None:
    beyond = answers((40, 1, 1, 1), (40, 1, 0, 1), (20, 0, 0, 1))
    short = answers((40, 1, 1, 1), (40, 1, 0, 0), (20, 0, 0, 0))
    assert comparison.recovery(beyond, seed=0).value == pytest.approx(60 / 40)
    pooled = comparison.pool([beyond, short], seed=0)
    assert pooled is not None
    assert pooled.num_items == 200
    assert pooled.recovery.value == pytest.approx(40 / 80)
    assert pooled.damage.value == pytest.approx(-80 / 200)
    assert comparison.pool([], seed=0) is None


def test_pooled_benchmarks_keep_their_clusters_apart() -> None:
    rows = np.ones(10)
    one = Answers(rows, np.zeros(10), rows, np.repeat(np.arange(5), 2))
    pooled = comparison.pool([one, one], seed=0)
    assert pooled is not None
    size = 10 * (statistics.Z / stats.t.ppf(0.975, 9)) ** 2  # ten clusters of two items
    assert pooled.recovery.low == pytest.approx(statistics.wilson(size, size).low)
    assert pooled.damage.p == pytest.approx(2 / 2**10)
