"""How often the 95 % intervals of results.json hold the truth, beside those that people would use instead.

python benchmarks/coverage.py [--draws 2000]

Paired rates: items that flip in one direction or both, every outcome weighted by its probability, so that nothing
is drawn; beside them Newcombe's hybrid interval. Means: skewed values like the divergences of answers, alone and in
clusters; beside them scipy's BCa bootstrap. Pooled recovery: three damaged benchmarks, where 2 or 5 % of the items
stay broken. The last line is one JSON object, as in every file of this folder; a coverage is no speed, so the
ratio is null.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common import statistics
from common.statistics import Interval

Floats = NDArray[np.float64]

LOW, HIGH = 0.93, 0.995
SIZES = (50, 100, 300)
# Items that flip one way and the other.
FLIPS = ((0.02, 0.0), (0.05, 0.0), (0.02, 0.02), (0.05, 0.05))
# Of the items that both models answer alike, how many are right. Only Newcombe's interval depends on it.
SHARE_RIGHT = 0.5
NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        shape: what was drawn.
        coverage: how often the interval held the truth.
        width: its mean.
        most: the highest coverage that is no fault.
        peer: coverage of what people would use instead, if there is one.
    """

    shape: str
    coverage: float
    width: float
    most: float = HIGH
    peer: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the coverage is within its bounds."""
        return LOW <= self.coverage <= self.most


def paired_rates(n: int, up: float, down: float, draws: int) -> Cell:
    """Tango's interval of a paired difference, over all outcomes; Newcombe's on draws."""
    covered = width = 0.0
    for first in range(n + 1):
        likely = stats.binom.pmf(first, n, up)
        if likely < NEGLIGIBLE:
            continue
        for second in range(n - first + 1):
            chance = float(likely * stats.binom.pmf(second, n - first, down / (1 - up)))
            if chance > NEGLIGIBLE:
                found = statistics.tango(first, second, n)
                covered += chance * _holds(found, up - down)
                width += chance * (found.high - found.low)
    return Cell(
        f"paired rates, n {n}, flips {up:.0%} and {down:.0%}",
        covered,
        width,
        most=_attainable(n, up, down),
        peer=_newcombe_coverage(n, up, down, draws),
    )


def means(n: int, per_cluster: int, kind: str, draws: int, *, peer: bool = True) -> Cell:
    """The bootstrap of a mean of skewed positive values, those of a cluster sharing a factor."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(n // per_cluster), per_cluster)
    found, others = [], []
    for draw in range(draws):
        values = _skewed(generator, kind, n // per_cluster)[clusters]
        if per_cluster > 1:
            values = values * generator.gamma(4.0, 0.25, size=len(values))
        found.append(statistics.mean_interval(values, clusters, seed=draw))
        if peer:
            by_cluster = statistics.sums_by_cluster(values, clusters) / per_cluster
            limits = stats.bootstrap(
                (by_cluster,), np.mean, method="BCa", n_resamples=999, rng=generator
            ).confidence_interval
            others.append(Interval(0.0, float(limits.low), float(limits.high)))
    name = f"mean, n {n}, {kind}" + (f", clusters of {per_cluster}" if per_cluster > 1 else "")
    return _cell(name, found, 1.0, others)


def recoveries(n: int, per_cluster: int, short: float, draws: int) -> Cell:
    """Pooled recovery where the edit broke 30 % of the items, mended 2 %, and healing left `short` broken."""
    generator = np.random.default_rng(0)
    num_clusters = n // per_cluster
    clusters = np.repeat(np.arange(num_clusters), per_cluster)
    strata = (3 * clusters) // num_clusters
    fates = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=np.float64)
    chances = [short, 0.3 - short, 0.02, 0.4, 0.28]
    found = []
    for draw in range(draws):
        shared = generator.choice(5, size=num_clusters, p=chances)[clusters]
        own = generator.choice(5, size=len(clusters), p=chances)
        follows = generator.random(len(clusters)) < (0.5 if per_cluster > 1 else 0.0)
        original, abliterated, healed = fates[np.where(follows, shared, own)].T
        damage = statistics.sums_by_cluster(original - abliterated, clusters)
        if damage.sum() > 0 and statistics.sign_flip_test(damage, seed=0) < 0.05:
            answers = (original, abliterated, healed, clusters)
            found.append(statistics.recovery(*answers, seed=draw, capped=True, strata=strata))
    name = f"pooled recovery, n {n}, {short:.0%} stay broken"
    name += f", clusters of {per_cluster}" if per_cluster > 1 else ""
    return _cell(name, found, 1 - short / 0.28)


def table(draws: int, *, peer: bool = True) -> Iterator[Cell]:
    """All cells; means without their slow peer where it is not asked for."""
    for n in SIZES:
        for up, down in FLIPS:
            yield paired_rates(n, up, down, 4000)
    for kind in ("lognormal", "gamma"):
        for n in SIZES:
            for per_cluster in (1, 2):
                yield means(n, per_cluster, kind, draws, peer=peer)
    for n in SIZES:
        for per_cluster in (1, 2):
            for short in (0.02, 0.05):
                yield recoveries(n, per_cluster, short, draws)


def newcombe_paired(both: float, first_only: float, second_only: float, neither: float) -> Interval:
    """Newcombe's hybrid score interval of a difference of paired proportions, first minus second.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10.
    """
    total = both + first_only + second_only + neither
    first = statistics.wilson(both + first_only, total)
    second = statistics.wilson(both + second_only, total)
    margins = (both + first_only, second_only + neither, both + second_only, first_only + neither)
    cross = both * neither - first_only * second_only
    corrected = max(cross - total / 2, 0.0) if cross > 0 else cross
    phi = corrected / math.sqrt(math.prod(margins)) if min(margins) > 0 else 0.0

    def side(one: float, other: float) -> float:
        return math.sqrt((one - other) ** 2 + 2 * (1 - phi) * one * other)

    value = (first_only - second_only) / total
    down = side(first.value - first.low, second.high - second.value)
    up = side(first.high - first.value, second.value - second.low)
    return Interval(value, value - down, value + up)


def _attainable(n: int, up: float, down: float) -> float:
    """The bar, or where flips are rarer than any test can tell, how often they are that rare.

    An interval that agrees with the exact test cannot leave the truth out while 5 flips in one direction (p = .063)
    may be none.
    """
    return max(HIGH, float(stats.binom.cdf(5, n, up))) if down == 0 else HIGH


def _newcombe_coverage(n: int, up: float, down: float, draws: int) -> float:
    alike = 1 - up - down
    chances = [alike * SHARE_RIGHT, up, down, alike * (1 - SHARE_RIGHT)]
    drawn = np.random.default_rng(0).multinomial(n, chances, size=draws)
    interval = functools.cache(newcombe_paired)
    return float(np.mean([_holds(interval(*map(float, one)), up - down) for one in drawn.tolist()]))


def _skewed(generator: np.random.Generator, kind: str, size: int) -> Floats:
    """Values of mean 1: as the divergences of answers are, most are small and a few many times the mean."""
    if kind == "lognormal":
        return generator.lognormal(-0.5, 1.0, size)
    return generator.gamma(0.5, 2.0, size)


def _holds(interval: Interval, truth: float) -> bool:
    # Rounding must not decide where a limit is the truth itself.
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


def _cell(
    shape: str, found: list[Interval], truth: float, others: list[Interval] | None = None
) -> Cell:
    return Cell(
        shape,
        float(np.mean([_holds(one, truth) for one in found])),
        float(np.mean([one.high - one.low for one in found])),
        peer=float(np.mean([_holds(one, truth) for one in others])) if others else None,
    )


def main() -> None:
    """Print a table of coverages, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000, help="simulated evaluations per line")
    rows = []
    print(f"{'':<58} coverage   width   peer")
    for cell in table(parser.parse_args().draws):
        peer = "" if cell.peer is None else f"{cell.peer:.3f}"
        mark = "" if cell.holds else "  outside"
        print(
            f"{cell.shape:<58} {cell.coverage:8.4f} {cell.width:7.3f}  {peer:>5}{mark}", flush=True
        )
        rows.append(
            {
                "shape": cell.shape,
                "ratio": None,
                "bar": [LOW, round(cell.most, 4)],
                "coverage": round(cell.coverage, 4),
                "width": round(cell.width, 4),
                "peer": cell.peer,
            }
        )
    print(json.dumps({"name": "coverage", "rows": rows, "ratio": None}))


if __name__ == "__main__":
    main()
