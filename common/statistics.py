"""Intervals and tests for models that answer the same items: arrays in, numbers out.

Every interval is a 95 % interval. Comparisons are paired, item by item. Items that share a fact
form a cluster; their intervals and p-values then count clusters, since answers within one are not
independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500
SIGN_FLIPS = 20_000
# With fewer clusters that say anything, resampling them covers far less than it promises (63 to 86
# % where 95 % is asked); score intervals on the effective number of items do not have this fault.
MIN_INFORMATIVE_CLUSTERS = 10
Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
TINY = 1e-9
# Two-sided 5 % level, 80 % power.
Z_POWER = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % interval and the p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def wilson(num_successes: float, num_trials: float) -> Interval:
    """Wilson's score interval of one proportion; counts may be fractional (an effective number of items).

    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209.
    """
    rate = num_successes / num_trials
    denominator = 1 + Z**2 / num_trials
    center = (rate + Z**2 / (2 * num_trials)) / denominator
    half = Z / denominator * math.sqrt(rate * (1 - rate) / num_trials + (Z / (2 * num_trials)) ** 2)
    # At 0 and 1 the bound is the rate itself; rounding must not put the rate outside its interval.
    return Interval(rate, max(0.0, min(rate, center - half)), min(1.0, max(rate, center + half)))


def tango(first_only: float, second_only: float, num_items: float) -> Interval:
    """Tango's score interval of a difference of paired proportions, first minus second.

    The differences that a score test does not reject. Unlike Newcombe's hybrid interval it depends
    on the items that differ alone, and it keeps its promise where few do and all of them in one
    direction (`benchmarks/coverage.py` compares the two).

    Args:
        first_only: items that are right in the first only, possibly fractional (an effective number).
        second_only: right in the second only.
        num_items: all items.

    Source: Tango 1998, Statistics in Medicine 17:891.
    """
    value = (first_only - second_only) / num_items

    def excess(difference: float) -> float:
        # The share of `second_only`, most likely under this difference: a quadratic's larger root.
        linear = (2 * num_items - first_only + second_only) * difference - first_only - second_only
        product = 8 * num_items * second_only * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 + product, 0.0)) - linear) / (4 * num_items)
        variance = num_items * (2 * share + difference * (1 - difference))
        deviation = num_items * (value - difference)
        return deviation**2 - Z**2 * max(variance, 0.0)

    def limit(end: float) -> float:
        # Where nothing differs the value itself is a root, too: begin beside it.
        start = value + math.copysign(TINY, end)
        return float(optimize.brentq(excess, start, end)) if abs(value - end) > 2 * TINY else end

    return Interval(value, limit(-1.0), limit(1.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a list of p-values.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def cluster_ids(labels: Sequence[str | None]) -> Integers:
    """Number the clusters of items from 0; an item without a label is a cluster of its own."""
    numbers: dict[object, int] = {}
    keys = [
        ("alone", index) if label is None else ("named", label)
        for index, label in enumerate(labels)
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def rate_interval(values: Floats, clusters: Integers, *, seed: int) -> Interval:
    """The mean of items with its interval.

    Wilson's interval for right and wrong answers of independent items; a cluster bootstrap for
    clusters and for graded values, except where too few clusters vary to be resampled: then
    Wilson's on the effective number of items.
    """
    binary = is_binary(values)
    if binary and not is_clustered(clusters):
        return wilson(float(values.sum()), len(values))
    if binary:
        num_right = int((sums_by_cluster(values, clusters) > 0).sum())
        num_wrong = int((sums_by_cluster(1 - values, clusters) > 0).sum())
        if min(num_right, num_wrong) < MIN_INFORMATIVE_CLUSTERS:
            size = len(values) / design_effect(values, clusters)
            return wilson(float(values.mean()) * size, size)
    found = mean_interval(values, clusters, seed=seed)
    return _within(found, 0.0, 1.0) if is_rate(values) else found


def paired_difference(
    first: Floats, second: Floats, clusters: Integers, *, seed: int
) -> Difference:
    """First minus second on the same items, with interval and p-value.

    Independent right and wrong answers: Tango's paired interval and the exact McNemar test.
    Clusters or graded values: a cluster bootstrap and a sign-flip test on cluster sums (which is
    McNemar's test when every cluster is one item); where fewer than `MIN_INFORMATIVE_CLUSTERS`
    clusters differ, Tango's interval on the effective number of items.

    Args:
        first: values [items].
        second: values [items], same order.
        clusters: cluster number of each item.
        seed: of the resampling.
    """
    differences = first - second
    p_value = sign_flip_test(sums_by_cluster(differences, clusters), seed=seed)
    binary = is_binary(first) and is_binary(second)
    num_differing = int((sums_by_cluster(np.abs(differences), clusters) > 0).sum())
    if binary and (not is_clustered(clusters) or num_differing < MIN_INFORMATIVE_CLUSTERS):
        scale = 1 / design_effect(differences, clusters)
        interval = tango(
            scale * float((first * (1 - second)).sum()),
            scale * float(((1 - first) * second).sum()),
            scale * len(first),
        )
    else:
        interval = mean_interval(differences, clusters, seed=seed)
        if is_rate(first) and is_rate(second):
            interval = _within(interval, -1.0, 1.0)
    return Difference(float(differences.mean()), interval.low, interval.high, p_value)


def mean_interval(values: Floats, clusters: Integers, *, seed: int) -> Interval:
    """Studentised cluster bootstrap of a mean: clusters are drawn with replacement, whole."""
    sums = sums_by_cluster(values, clusters)
    sizes = sums_by_cluster(np.ones_like(values), clusters)
    return ratio_interval(sums, sizes, seed=seed)


def recovery(
    original: Floats,
    abliterated: Floats,
    healed: Floats,
    clusters: Integers,
    *,
    seed: int,
    capped: bool,
    strata: Integers | None = None,
) -> Interval:
    """The share of the damage that healing won back, with its interval.

    A capped share from 0 to 1 has Wilson's interval on the effective number of losses, any other a
    cluster bootstrap.

    Args:
        original: values [items].
        abliterated: values [items], same order; the sum of `original - abliterated` is positive.
        healed: values [items], same order.
        clusters: cluster number of each item; a cluster lies in one stratum.
        seed: of the resampling.
        capped: count an item as no better than in the original model, so that what healing does
            better in one place cannot pay for what it does worse in another.
        strata: benchmark number of each item; every resample keeps the number of clusters of each
            benchmark.
    """
    reached = np.minimum(healed, original) if capped else healed
    won = sums_by_cluster(reached - abliterated, clusters)
    lost = sums_by_cluster(original - abliterated, clusters)
    layers = None
    if strata is not None:
        layers = np.zeros(len(won), dtype=np.int64)
        layers[clusters] = strata
    if np.array_equal(won, lost) or (capped and won.sum() >= 0):
        return _share_interval(won, lost, layers)
    return ratio_interval(won, lost, seed=seed, strata=layers)


def _share_interval(won: Floats, lost: Floats, strata: Integers | None) -> Interval:
    """Wilson's interval of a share from 0 to 1 of what clusters lost, on the effective number of losses.

    The effective number is what the linearised variance says, at most the losses themselves, and
    less where few clusters carry them.

    Source: Korn and Graubard 1998, Survey Methodology 24:193, with Wilson's interval in place of
    the exact one.
    """
    value, error = _ratio_and_error(won, lost, strata)
    size = float(lost.sum())
    if 0 < value < 1 and error > 0:
        size = min(size, value * (1 - value) / error**2)
    if int((won != lost).sum()) < MIN_INFORMATIVE_CLUSTERS:
        # Too few to show how alike the items of a cluster are: take them as one.
        size = min(size, float(lost.sum() ** 2 / np.sum(lost**2)))
    student = stats.t.ppf(0.5 + CONFIDENCE / 2, max(int((lost != 0).sum()) - 1, 1))
    size *= (Z / float(student)) ** 2
    found = wilson(value * size, size)
    return Interval(value, min(found.low, value), max(found.high, value))


def ratio_interval(
    numerators: Floats, denominators: Floats, *, seed: int, strata: Integers | None = None
) -> Interval:
    """Studentised bootstrap of a ratio of sums over clusters, on neither side narrower than Student's.

    On skewed data the percentile and BCa bootstraps miss the mean about twice as often as they say;
    the studentised one alone is still a point short where a heavy tail was not drawn.

    Args:
        numerators: one sum per cluster.
        denominators: one sum per cluster; their total is positive.
        seed: of the resampling.
        strata: stratum of each cluster; clusters are drawn within their stratum.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5 (bootstrap-t);
    the variance of the ratio is linearised, Cochran 1977, Sampling Techniques, section 6.4.
    """
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2:
        return Interval(value, value, value)
    features, groups = _by_stratum(numerators, denominators, strata)
    sizes = np.array([len(group) for group in groups])
    ratios, errors = _ratio_error(_resampled_sums(features, groups, seed), sizes)
    tails = [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2]
    low, high = np.quantile(_studentised(ratios - value, errors), tails).tolist()
    least = float(stats.t.ppf(tails[1], max(len(numerators) - len(groups), 1)))
    _, error = _ratio_and_error(numerators, denominators, strata)
    return Interval(value, value - max(high, least) * error, value - min(low, -least) * error)


def sign_flip_test(sums: Floats, *, seed: int) -> float:
    """Two-sided p-value of a symmetric distribution around 0, by flipping the signs of cluster sums.

    Exact for whole numbers, which counts of right answers are; otherwise from `SIGN_FLIPS` random
    flips.
    """
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    observed = abs(float(sums.sum()))
    if np.all(sums == np.round(sums)):
        return _exact_sign_flip_test(np.abs(sums).astype(np.int64), round(observed))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(SIGN_FLIPS, len(sums)))
    # Rounding must not make the observed sum the larger of two equal ones.
    extreme = int(np.sum(np.abs(signs @ sums) >= observed * (1 - 1e-12)))
    return (extreme + 1) / (SIGN_FLIPS + 1)


def minimum_detectable_effect(differences: Floats, clusters: Integers) -> float | None:
    """The smallest true difference that as many items would show at the 5 % level with 80 % power.

    From the variance seen; for right and wrong answers at least what the difference itself would
    bring, since models that differ by x differ on a share x of the items.

    Returns:
        The difference, or None where graded values did not differ at all, so that their variance is
        unknown.
    """
    size = len(differences) / design_effect(differences, clusters)
    by_variance = Z_POWER * math.sqrt(float(np.mean(differences**2)) / size)
    if np.all(np.isin(differences, (-1.0, 0.0, 1.0))):
        return min(1.0, max(by_variance, Z_POWER**2 / size))
    return by_variance if by_variance > 0 else None


def minimum_detectable_ratio(numerators: Floats, denominators: Floats) -> float | None:
    """The smallest true ratio of sums over clusters that as many would show, as `minimum_detectable_effect`."""
    if len(numerators) < 2:
        return None
    _, error = _ratio_and_error(numerators, denominators, None)
    return Z_POWER * error if error > 0 else None


def design_effect(values: Floats, clusters: Integers) -> float:
    """How many items of clustered data are worth one independent item, at least 1.

    Source: Kish 1965, Survey Sampling, section 5.4, with the variance of a ratio of cluster sums.
    """
    if not is_clustered(clusters):
        return 1.0
    num_items, num_clusters = len(values), int(clusters.max()) + 1
    independent = float(np.var(values, ddof=1)) / num_items
    if independent == 0.0 or num_clusters < 2:
        # Nothing varies, so nothing tells how alike the items of a cluster are: take them as one.
        return num_items / num_clusters
    residuals = sums_by_cluster(values - values.mean(), clusters)
    clustered = num_clusters / (num_clusters - 1) * float(np.sum(residuals**2)) / num_items**2
    return max(1.0, clustered / independent)


def sums_by_cluster(values: Floats, clusters: Integers) -> Floats:
    """Sum the values of each cluster."""
    sums: Floats = np.bincount(clusters, weights=values).astype(np.float64)
    return sums


def is_clustered(clusters: Integers) -> bool:
    """Whether any cluster holds more than one item."""
    return int(clusters.max()) + 1 < len(clusters)


def is_binary(values: Floats) -> bool:
    """Whether all values are 0 or 1."""
    return bool(np.all((values == 0) | (values == 1)))


def is_rate(values: Floats) -> bool:
    """Whether all values lie between 0 and 1."""
    return bool(np.all((values >= 0) & (values <= 1)))


def _within(interval: Interval, low: float, high: float) -> Interval:
    return Interval(interval.value, max(low, interval.low), min(high, interval.high))


def _exact_sign_flip_test(sizes: Integers, observed: int) -> float:
    # The distribution of a sum of independent +-size, grown one cluster at a time; index 0 stands
    # for -total.
    total = int(sizes.sum())
    chances = np.zeros(2 * total + 1)
    chances[total] = 1.0
    for size in sizes.tolist():
        grown = np.zeros_like(chances)
        grown[size:] += 0.5 * chances[: len(chances) - size]
        grown[: len(chances) - size] += 0.5 * chances[size:]
        chances = grown
    outcomes = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[outcomes >= observed].sum()))


def _by_stratum(
    numerators: Floats, denominators: Floats, strata: Integers | None
) -> tuple[Floats, list[Integers]]:
    """What ratios and their errors are made of [clusters, features], and the clusters of each stratum."""
    layers = np.zeros(len(numerators), dtype=np.int64) if strata is None else strata
    products = (numerators**2, numerators * denominators, denominators**2)
    features = np.stack([numerators, denominators, *products], axis=-1)
    return features, [np.flatnonzero(layers == layer) for layer in np.unique(layers)]


def _ratio_and_error(
    numerators: Floats, denominators: Floats, strata: Integers | None
) -> tuple[float, float]:
    features, groups = _by_stratum(numerators, denominators, strata)
    sums = np.stack([features[group].sum(axis=0)[None] for group in groups])
    ratio, error = _ratio_error(sums, np.array([len(group) for group in groups]))
    return float(ratio[0]), float(error[0])


def _resampled_sums(features: Floats, groups: Sequence[Integers], seed: int) -> Floats:
    """Sums [groups, resamples, features] of clusters drawn with replacement inside their group."""
    generator = np.random.default_rng(seed)
    sums = np.zeros((len(groups), RESAMPLES, features.shape[1]))
    for group, found in zip(groups, sums, strict=True):
        for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
            part = found[start : start + RESAMPLES_AT_ONCE]
            drawn = generator.integers(len(group), size=(len(part), len(group)), dtype=np.int64)
            drawn += len(group) * np.arange(len(part))[:, None]
            counts = np.bincount(drawn.ravel(), minlength=len(part) * len(group))
            part[:] = counts.reshape(len(part), len(group)) @ features[group]
    return sums


def _ratio_error(sums: Floats, sizes: Integers) -> tuple[Floats, Floats]:
    """Ratios and standard errors [resamples] from the sums [groups, resamples, features] of `_by_stratum`."""
    total = sums.sum(axis=0)
    bottom = _positive(total[:, 1])
    ratio = total[:, 0] / bottom
    residual = sums[..., 0] - ratio * sums[..., 1]
    squares = sums[..., 2] - 2 * ratio * sums[..., 3] + ratio**2 * sums[..., 4]
    spread = np.maximum(squares - residual**2 / sizes[:, None], 0.0)
    variance = (sizes / np.maximum(sizes - 1, 1))[:, None] * spread
    return ratio, np.sqrt(variance.sum(axis=0)) / bottom


def _studentised(deviations: Floats, errors: Floats) -> Floats:
    """Deviations in units of their standard errors; one without spread counts as the farthest seen."""
    sure = errors > TINY * max(float(errors.max()), TINY)
    found = np.zeros_like(deviations)
    found[sure] = deviations[sure] / errors[sure]
    farthest = float(np.abs(found).max())
    found[~sure] = np.sign(deviations[~sure]) * farthest
    return found


def _positive(denominators: Floats) -> Floats:
    # A resample without damage has no ratio. It counts as half an item of damage: extreme, as it
    # should, but finite.
    return np.maximum(denominators, 0.5)
