"""Intervals and tests against published values, scipy and brute force.

Run: python -m pytest tests/unit/common/test_statistics.py
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from common import statistics


def alone(size: int) -> np.ndarray:
    return np.arange(size)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 100), (3, 100), (50, 100), (313, 313), (1, 1)]
)
def test_wilson_agrees_with_scipy(successes: int, trials: int) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    found = statistics.wilson(successes, trials)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_wilson_gives_the_published_limits() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81 of 263, 15 of 148, 0 of
    # 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), limits in published.items():
        found = statistics.wilson(successes, trials)
        assert (found.low, found.high) == pytest.approx(limits, abs=5e-5)


def test_tangos_interval_gives_the_published_limits() -> None:
    # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850, section 8 (airways before
    # and after a transplantation, Bentur et al. 2009): Tango's asymptotic score interval.
    found = statistics.tango(1, 7, 21)
    assert (found.value, found.low, found.high) == pytest.approx((-0.286, -0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize(
    ("first_only", "second_only", "num_items"),
    [(1, 7, 21), (6, 16, 161), (0, 0, 40), (4, 0, 50), (3, 2, 5), (5, 0, 5)],
)
def test_tangos_interval_holds_the_differences_that_a_score_test_does_not_reject(
    first_only: int, second_only: int, num_items: int
) -> None:
    def log_likelihood(share: np.ndarray, difference: float) -> np.ndarray:
        terms = (
            (first_only, share + difference),
            (second_only, share),
            (num_items - first_only - second_only, 1 - 2 * share - difference),
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            return sum(np.where(count > 0, count * np.log(p), 0.0) for count, p in terms)

    def statistic(difference: float) -> float:
        """The score test's, its nuisance parameter found by search instead of the quadratic's root."""
        lowest, highest = max(0.0, -difference), (1 - difference) / 2
        grid = np.linspace(lowest, highest, 200_001)
        share = grid[np.nanargmax(log_likelihood(grid, difference))]
        variance = num_items * (2 * share + difference - difference**2)
        return (first_only - second_only - num_items * difference) / math.sqrt(variance)

    found = statistics.tango(first_only, second_only, num_items)
    if found.low > -1:
        assert statistic(found.low) == pytest.approx(statistics.Z, abs=2e-3)
    if found.high < 1:
        assert statistic(found.high) == pytest.approx(-statistics.Z, abs=2e-3)


def test_tangos_interval_turns_around_with_the_order_of_the_models() -> None:
    forward, backward = statistics.tango(6, 16, 161), statistics.tango(16, 6, 161)
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))


def test_models_that_agree_on_every_item_still_have_an_interval() -> None:
    few, many = statistics.tango(0, 0, 20), statistics.tango(0, 0, 300)
    assert few.low < many.low < 0 < many.high < few.high
    # What no flip among n items leaves possible is what Wilson's interval says of 0 of n.
    assert many.high == pytest.approx(statistics.wilson(0, 300).high)


@pytest.mark.parametrize(("first_only", "second_only"), [(0, 0), (1, 0), (0, 6), (3, 9), (10, 10)])
def test_the_sign_flip_test_is_mcnemars_when_every_item_stands_alone(
    first_only: int, second_only: int
) -> None:
    total = first_only + second_only
    extreme = [k for k in range(total + 1) if abs(2 * k - total) >= abs(first_only - second_only)]
    expected = sum(math.comb(total, k) for k in extreme) / 2**total
    sums = np.array([1.0] * first_only + [-1.0] * second_only + [0.0] * 88)
    assert statistics.sign_flip_test(sums, seed=0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "sums", [[3, -1, 2, 2], [5, 1, 1], [1, -1], [2, 4, 4, 3, -2, 1, 6], [0, 0]]
)
def test_the_sign_flip_test_counts_all_flips_of_whole_numbers(sums: list[int]) -> None:
    values = [value for value in sums if value]
    flips = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(values))
    ]
    expected = sum(abs(flip) >= abs(sum(values)) for flip in flips) / len(flips)
    assert statistics.sign_flip_test(np.array(sums, dtype=float), seed=0) == pytest.approx(expected)


def test_the_sign_flip_test_of_graded_values_is_near_the_count_of_all_flips() -> None:
    values = np.array([0.9, 0.4, -0.3, 1.7, 0.2, 0.8, -0.1, 0.6])
    flips = np.array(list(itertools.product((-1, 1), repeat=len(values)))) @ values
    expected = float(np.mean(np.abs(flips) >= values.sum() - 1e-12))
    # 20,000 random flips: three standard errors of a proportion.
    assert statistics.sign_flip_test(values, seed=1) == pytest.approx(expected, abs=0.006)
    assert statistics.sign_flip_test(values, seed=1) == statistics.sign_flip_test(values, seed=1)


def test_holm_steps_down_and_keeps_the_order() -> None:
    # The example of R's p.adjust: 0.01, 0.02, 0.03, 0.04 under "holm" are 0.04, 0.06, 0.06, 0.06.
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_bootstrap_of_a_mean_is_studentised_by_hand() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    found = statistics.mean_interval(values, alone(40), seed=0)
    generator = np.random.default_rng(1)
    drawn = values[generator.integers(40, size=(40_000, 40))]
    t = (drawn.mean(axis=1) - values.mean()) / (drawn.std(axis=1, ddof=1) / math.sqrt(40))
    error = values.std(ddof=1) / math.sqrt(40)
    student = stats.t.ppf(0.975, 39)
    low, high = np.quantile(t, [0.025, 0.975])
    expected = (
        values.mean() - max(high, student) * error,
        values.mean() - min(low, -student) * error,
    )
    # Two Monte-Carlo runs: their limits differ by a few hundredths of the width.
    width = expected[1] - expected[0]
    assert (found.low, found.high) == pytest.approx(expected, abs=0.05 * width)
    assert max(high, student) == student  # the side away from the tail is Student's
    assert low < -student
    assert found == statistics.mean_interval(values, alone(40), seed=0)
    assert found != statistics.mean_interval(values, alone(40), seed=1)


def test_the_error_of_a_ratio_is_that_of_all_resamples() -> None:
    # Four clusters have 256 resamples; the linearised error is near their spread.
    generator = np.random.default_rng(4)
    sizes = generator.integers(3, 6, size=4).astype(float)
    sums = sizes * generator.uniform(0.8, 1.2, size=4)
    drawn = np.array(list(itertools.product(range(4), repeat=4)))
    spread = (sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)).std()
    _, error = statistics._ratio_and_error(sums, sizes, None)
    assert error == pytest.approx(spread * math.sqrt(4 / 3), rel=0.05)


def test_items_repeated_in_clusters_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=60)
    repeated, clusters = np.repeat(values, 5), np.repeat(alone(60), 5)
    one, five = (
        statistics.mean_interval(values, alone(60), seed=0),
        statistics.mean_interval(repeated, clusters, seed=0),
    )
    assert (one.low, one.high) == pytest.approx((five.low, five.high))
    assert statistics.design_effect(repeated, clusters) == pytest.approx(5, rel=0.02)


def test_repeating_every_item_leaves_the_p_value_alone() -> None:
    first, second = (
        np.array([1.0] * 20 + [0.0] * 5),
        np.array([1.0] * 8 + [0.0] * 12 + [1.0] * 2 + [0.0] * 3),
    )
    single = statistics.paired_difference(first, second, alone(25), seed=0)
    tripled = statistics.paired_difference(
        np.repeat(first, 3), np.repeat(second, 3), np.repeat(alone(25), 3), seed=0
    )
    assert tripled.p == pytest.approx(single.p)
    assert single.p == pytest.approx(stats.binomtest(12, 14).pvalue)
    assert tripled.high - tripled.low == pytest.approx(single.high - single.low, rel=0.25)


def test_many_differing_clusters_are_resampled_and_few_are_not() -> None:
    generator = np.random.default_rng(2)
    clusters = np.repeat(alone(60), 5)
    first = generator.integers(0, 2, size=300).astype(float)
    second = generator.integers(0, 2, size=300).astype(float)
    found = statistics.paired_difference(first, second, clusters, seed=3)
    resampled = statistics.mean_interval(first - second, clusters, seed=3)
    assert (found.low, found.high) == (resampled.low, resampled.high)
    rate = statistics.rate_interval(first, clusters, seed=3)
    assert rate == statistics.mean_interval(first, clusters, seed=3)
    nearly = np.ones(300)
    nearly[:5] = 0.0
    found = statistics.paired_difference(np.ones(300), nearly, clusters, seed=3)
    assert found.low < 0.0 < 5 / 300 < found.high
    assert found.p == 1.0  # one cluster cannot tell


def test_clusters_that_never_differ_leave_as_much_doubt_as_their_number() -> None:
    right = np.ones(300)
    few = statistics.paired_difference(right, right, np.repeat(alone(10), 30), seed=0)
    many = statistics.paired_difference(right, right, alone(300), seed=0)
    by_hand = statistics.tango(0, 0, 10)
    assert (few.low, few.high) == pytest.approx((by_hand.low, by_hand.high))
    assert few.low < many.low < 0
    assert statistics.rate_interval(right, np.repeat(alone(10), 30), seed=0).low == pytest.approx(
        statistics.wilson(10, 10).low
    )


def test_labels_become_clusters_and_items_without_one_stand_alone() -> None:
    assert statistics.cluster_ids(["a", None, "a", None, "b"]).tolist() == [0, 1, 0, 2, 3]


@pytest.mark.parametrize(
    ("discordance", "effect", "num_items"),
    [(0.04, 0.008, 4900), (0.08, 0.02, 1560), (0.04, 0.05, 124)],
)
def test_the_minimum_detectable_effect_gives_the_known_sample_sizes(
    discordance: float, effect: float, num_items: int
) -> None:
    differing = round(discordance * num_items)
    differences = np.zeros(num_items)
    differences[:differing] = [1 if index % 2 else -1 for index in range(differing)]
    expected = max(effect, statistics.Z_POWER**2 / num_items)
    assert statistics.minimum_detectable_effect(differences, alone(num_items)) == pytest.approx(
        expected, rel=0.03
    )


def test_the_minimum_detectable_effect_has_the_power_it_claims() -> None:
    num_items, discordance = 400, 0.1
    differences = np.array([1.0, -1.0] * 20 + [0.0] * 360)
    effect = statistics.minimum_detectable_effect(differences, alone(num_items))
    assert effect is not None
    generator = np.random.default_rng(0)
    up, down = (discordance + effect) / 2, (discordance - effect) / 2
    draws = generator.multinomial(num_items, [up, down, 1 - up - down], size=400)
    power = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in draws])
    # Exact McNemar is conservative, so it finds a little less than the normal approximation
    # promises.
    assert 0.68 <= power <= 0.86


def test_models_that_agree_everywhere_do_not_claim_to_detect_everything() -> None:
    assert statistics.minimum_detectable_effect(np.zeros(300), alone(300)) == pytest.approx(
        0.0262, abs=1e-3
    )
    assert statistics.minimum_detectable_effect(
        np.zeros(300), np.repeat(alone(30), 10)
    ) == pytest.approx(0.262, abs=1e-2)
    assert statistics.minimum_detectable_effect(np.zeros(5), alone(5)) == 1.0
    assert (
        statistics.minimum_detectable_effect(np.array([0.25, 0.25, -0.5, 0.0]), alone(4))
        is not None
    )


def test_recovery_is_the_ratio_of_sums() -> None:
    generator = np.random.default_rng(3)
    original = (generator.random(400) < 0.9).astype(float)
    abliterated = original * (generator.random(400) < 0.6)
    healed = np.where(generator.random(400) < 0.8, original, abliterated)
    healed[:30] = 1.0  # some that the original gets wrong
    capped = statistics.recovery(original, abliterated, healed, alone(400), seed=0, capped=True)
    uncapped = statistics.recovery(original, abliterated, healed, alone(400), seed=0, capped=False)
    lost = (original - abliterated).sum()
    assert capped.value == pytest.approx((np.minimum(healed, original) - abliterated).sum() / lost)
    assert uncapped.value == pytest.approx((healed - abliterated).sum() / lost)
    assert capped.value < uncapped.value
    assert capped.low < capped.value < capped.high <= 1.0


def test_a_full_recovery_is_only_as_sure_as_the_damage_was_large() -> None:
    original, abliterated = np.ones(100), np.array([0.0] * 20 + [1.0] * 80)
    found = statistics.recovery(original, abliterated, original, alone(100), seed=0, capped=True)
    # Wilson's interval of 20 of 20, widened as Student's is wider than the normal's on 20 clusters.
    size = 20 * (statistics.Z / stats.t.ppf(0.975, 19)) ** 2
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(size / (size + statistics.Z**2))


def test_a_share_that_stays_broken_has_wilsons_interval() -> None:
    original, abliterated = np.ones(400), np.array([0.0] * 200 + [1.0] * 200)
    healed = np.array([0.0] * 30 + [1.0] * 370)
    found = statistics.recovery(original, abliterated, healed, alone(400), seed=0, capped=True)
    expected = statistics.wilson(170, 200)
    assert found.value == 0.85
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=2e-3)


def test_recovery_counts_clusters_not_items() -> None:
    generator = np.random.default_rng(5)
    original, abliterated = np.ones(60), (generator.random(60) < 0.4).astype(float)
    healed = np.maximum(abliterated, generator.random(60) < 0.7)
    single = statistics.recovery(original, abliterated, healed, alone(60), seed=0, capped=True)
    repeated = [np.repeat(values, 4) for values in (original, abliterated, healed)]
    clustered = statistics.recovery(*repeated, np.repeat(alone(60), 4), seed=0, capped=True)
    as_items = statistics.recovery(*repeated, alone(240), seed=0, capped=True)
    assert clustered == single
    assert as_items.high - as_items.low < 0.6 * (clustered.high - clustered.low)


def test_strata_keep_the_share_of_each_benchmark() -> None:
    # One benchmark is all recovered, the other not at all: only the mix of the two could vary.
    won, lost = np.repeat([1.0, 0.0], 50), np.ones(100)
    mixed = statistics.ratio_interval(won, lost, seed=0)
    kept = statistics.ratio_interval(won, lost, seed=0, strata=np.repeat([0, 1], 50))
    assert (kept.low, kept.value, kept.high) == (0.5, 0.5, 0.5)
    assert mixed.low < 0.45


def test_clusters_that_all_share_one_value_have_no_width_and_no_fault() -> None:
    found = statistics.mean_interval(np.full(30, 0.25), alone(30), seed=0)
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)
    one = np.zeros(30)
    one[3] = 1.0  # most resamples hold none of it and have no spread
    found = statistics.mean_interval(one, alone(30), seed=0)
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)


def test_the_cluster_interval_covers_where_the_item_interval_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(1)
    clusters = np.repeat(alone(60), 5)
    covered = {"clusters": 0, "items": 0}
    for _ in range(150):
        shift = generator.choice([-1.0, 0.0, 1.0], size=60, p=[0.1, 0.7, 0.2])
        first, second = np.repeat(shift > 0, 5).astype(float), np.repeat(shift < 0, 5).astype(float)
        for name, groups in (("clusters", clusters), ("items", alone(300))):
            found = statistics.paired_difference(first, second, groups, seed=0)
            covered[name] += found.low <= 0.1 <= found.high
    assert covered["clusters"] / 150 >= 0.90
    assert covered["items"] / 150 <= 0.80
