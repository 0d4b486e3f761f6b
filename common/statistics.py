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
from scipy import stats

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


def newcombe_paired(both: float, first_only: float, second_only: float, neither: float) -> Interval:
    """Newcombe's hybrid score interval of a difference of paired proportions, first minus second.

    Args:
        both: items that are right in both, possibly fractional.
        first_only: right in the first only.
        second_only: right in the second only.
        neither: right in none.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10.
    """
    total = both + first_only + second_only + neither
    first = wilson(both + first_only, total)
    second = wilson(both + second_only, total)
    margins = (both + first_only, second_only + neither, both + second_only, first_only + neither)
    phi = 0.0
    if min(margins) > 0:
        cross = both * neither - first_only * second_only
        corrected = max(cross - total / 2, 0.0) if cross > 0 else cross
        phi = corrected / math.sqrt(math.prod(margins))
    down_first, up_first = first.value - first.low, first.high - first.value
    down_second, up_second = second.value - second.low, second.high - second.value
    value = (first_only - second_only) / total
    # (a - b)^2 + 2 (1 - phi) a b is never negative, which a^2 - 2 phi a b + b^2 can be after
    # rounding.
    down = math.sqrt((down_first - up_second) ** 2 + 2 * (1 - phi) * down_first * up_second)
    up = math.sqrt((up_first - down_second) ** 2 + 2 * (1 - phi) * up_first * down_second)
    return Interval(value, max(-1.0, value - down), min(1.0, value + up))


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided McNemar p-value: a sign test on the items that differ."""
    num_differing = first_only + second_only
    if num_differing == 0:
        return 1.0
    return float(stats.binomtest(first_only, num_differing, 0.5).pvalue)


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
    return mean_interval(values, clusters, seed=seed)


def paired_difference(
    first: Floats, second: Floats, clusters: Integers, *, seed: int
) -> Difference:
    """First minus second on the same items, with interval and p-value.

    Independent right and wrong answers: Newcombe's paired interval and the exact McNemar test.
    Clusters or graded values: a cluster bootstrap and a sign-flip test on cluster sums (which is
    McNemar's test when every cluster is one item); where fewer than `MIN_INFORMATIVE_CLUSTERS`
    clusters differ, Newcombe's interval on the effective number of items.

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
        interval = newcombe_paired(
            scale * float((first * second).sum()),
            scale * float((first * (1 - second)).sum()),
            scale * float(((1 - first) * second).sum()),
            scale * float(((1 - first) * (1 - second)).sum()),
        )
    else:
        interval = mean_interval(differences, clusters, seed=seed)
    return Difference(float(differences.mean()), interval.low, interval.high, p_value)


def mean_interval(values: Floats, clusters: Integers, *, seed: int) -> Interval:
    """BCa cluster bootstrap of a mean: clusters are drawn with replacement, whole."""
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
    """The share of the damage that healing won back, with a cluster bootstrap interval.

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
    short = sums_by_cluster(np.abs(original - reached), clusters)
    if not short.any():
        # Nothing to resample: all of the damage came back. How sure that is depends on how many
        # clusters had any.
        surely = wilson(float((lost > 0).sum()), float((lost > 0).sum()))
        return Interval(1.0, surely.low, 1.0)
    layers = None
    if strata is not None:
        layers = np.zeros(len(won), dtype=np.int64)
        layers[clusters] = strata
    return ratio_interval(won, lost, seed=seed, strata=layers)


def ratio_interval(
    numerators: Floats, denominators: Floats, *, seed: int, strata: Integers | None = None
) -> Interval:
    """BCa bootstrap of a ratio of sums over clusters.

    Args:
        numerators: one sum per cluster.
        denominators: one sum per cluster; their total is positive.
        seed: of the resampling.
        strata: stratum of each cluster; clusters are drawn within their stratum.

    Source: Efron 1987, J. Am. Stat. Assoc. 82:171 (BCa).
    """
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2:
        return Interval(value, value, value)
    resampled = _resampled_ratios(numerators, denominators, seed, strata)
    below = (np.sum(resampled < value) + 0.5 * np.sum(resampled == value)) / len(resampled)
    bias = stats.norm.ppf(np.clip(below, 1 / len(resampled), 1 - 1 / len(resampled)))
    without_one = (numerators.sum() - numerators) / _positive(denominators.sum() - denominators)
    deviations = without_one.mean() - without_one
    spread = float(np.sum(deviations**2))
    acceleration = float(np.sum(deviations**3)) / (6 * spread**1.5) if spread > 0 else 0.0
    z = np.array([-Z, Z])
    levels = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(resampled, levels)
    return Interval(value, min(float(low), value), max(float(high), value))


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


def _resampled_ratios(
    numerators: Floats, denominators: Floats, seed: int, strata: Integers | None
) -> Floats:
    generator = np.random.default_rng(seed)
    layers = np.zeros(len(numerators), dtype=np.int64) if strata is None else strata
    top = np.zeros(RESAMPLES)
    bottom = np.zeros(RESAMPLES)
    for layer in np.unique(layers):
        inside = np.flatnonzero(layers == layer)
        for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
            part = slice(start, min(start + RESAMPLES_AT_ONCE, RESAMPLES))
            shape = (part.stop - part.start, len(inside))
            drawn = inside[generator.integers(len(inside), size=shape, dtype=np.int32)]
            top[part] += numerators[drawn].sum(axis=1)
            bottom[part] += denominators[drawn].sum(axis=1)
    ratios: Floats = top / _positive(bottom)
    return ratios


def _positive(denominators: Floats) -> Floats:
    # A resample without damage has no ratio. It counts as half an item of damage: extreme, as it
    # should, but finite.
    return np.maximum(denominators, 0.5)
