"""From items to verdicts: three models on the same items, compared item by item.

A *damage* is abliterated minus original, a *gain* healed minus abliterated, a *gap* healed minus
original. Each kind of comparison is one family of tests over all benchmarks, adjusted after Holm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common import statistics
from common.statistics import Difference, Floats, Integers, Interval

Role = Literal["capability", "unlocked"]
Verdict = Literal["undamaged", "recovered", "worse", "not shown"]

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Answers:
    """Values of the three models on the same items, in one order.

    Attributes:
        original: values [items].
        abliterated: values [items].
        healed: values [items].
        clusters: cluster number of each item, from 0.
    """

    original: Floats
    abliterated: Floats
    healed: Floats
    clusters: Integers


@dataclass(frozen=True)
class Comparison:
    """The three paired differences of one benchmark.

    Attributes:
        damage: abliterated minus original.
        gain: healed minus abliterated.
        gap: healed minus original.
        minimum_detectable_effect: smallest true difference of healed and original that as many
            items would show with 80 % power, from how many differ.
    """

    damage: Difference
    gain: Difference
    gap: Difference
    minimum_detectable_effect: float | None


@dataclass(frozen=True)
class AdjustedP:
    """Holm-adjusted p-values of one benchmark's comparisons."""

    damage: float
    gain: float
    gap: float


def compare(answers: Answers, *, seed: int) -> Comparison:
    """Compare the models of one benchmark pairwise."""

    def difference(first: Floats, second: Floats) -> Difference:
        return statistics.paired_difference(first, second, answers.clusters, seed=seed)

    return Comparison(
        damage=difference(answers.abliterated, answers.original),
        gain=difference(answers.healed, answers.abliterated),
        gap=difference(answers.healed, answers.original),
        minimum_detectable_effect=statistics.minimum_detectable_effect(
            answers.healed - answers.original, answers.clusters
        ),
    )


def adjust(comparisons: Sequence[Comparison]) -> list[AdjustedP]:
    """Adjust the p-values of each kind of comparison over the list of benchmarks."""
    damages = statistics.holm([comparison.damage.p for comparison in comparisons])
    gains = statistics.holm([comparison.gain.p for comparison in comparisons])
    gaps = statistics.holm([comparison.gap.p for comparison in comparisons])
    return [AdjustedP(*values) for values in zip(damages, gains, gaps, strict=True)]


def is_damaged(comparison: Comparison, adjusted: AdjustedP) -> bool:
    """Whether the edit significantly lowered a benchmark."""
    return comparison.damage.value < 0 and adjusted.damage < SIGNIFICANCE


def verdict(comparison: Comparison, adjusted: AdjustedP, *, role: Role, margin: float) -> Verdict:
    """What may be said about one benchmark.

    `worse` comes first: a significant loss is told even where it is smaller than the margin. For a
    capability the reference is the original model; for what only the edit made answerable it is the
    abliterated model, which cannot have been damaged against itself, so that such a benchmark is
    never `recovered`.

    Args:
        comparison: of the benchmark.
        adjusted: its p-values, adjusted over all benchmarks.
        role: capability or unlocked.
        margin: how much below its reference counts as not inferior.
    """
    below_abliterated = comparison.gain.value < 0 and adjusted.gain < SIGNIFICANCE
    if role == "unlocked":
        if below_abliterated:
            return "worse"
        return "undamaged" if comparison.gain.low > -margin else "not shown"
    damaged = is_damaged(comparison, adjusted)
    below_original = comparison.gap.value < 0 and adjusted.gap < SIGNIFICANCE
    if below_abliterated or (below_original and not damaged):
        return "worse"
    if comparison.gap.low > -margin:
        return "recovered" if damaged else "undamaged"
    return "not shown"


def recovery(answers: Answers, *, seed: int) -> Interval:
    """The share of a damaged benchmark's loss that came back; above 1 where healed beats original."""
    return statistics.recovery(
        answers.original,
        answers.abliterated,
        answers.healed,
        answers.clusters,
        seed=seed,
        capped=False,
    )


@dataclass(frozen=True)
class Pooled:
    """Damaged benchmarks together, every item weighted alike."""

    num_items: int
    damage: Difference
    recovery: Interval


def pool(damaged: Sequence[Answers], *, seed: int) -> Pooled | None:
    """Pool the damaged capability benchmarks; None if there are none.

    Recovery is the sum of min(healed, original) - abliterated over the sum of original -
    abliterated, item by item: what one benchmark gains beyond its original cannot pay for another's
    loss.
    """
    if not damaged:
        return None
    offsets = np.cumsum([0, *(int(answers.clusters.max()) + 1 for answers in damaged)])
    clusters = np.concatenate([answers.clusters + offsets[i] for i, answers in enumerate(damaged)])
    strata = np.repeat(np.arange(len(damaged)), [len(answers.clusters) for answers in damaged])
    original = np.concatenate([answers.original for answers in damaged])
    abliterated = np.concatenate([answers.abliterated for answers in damaged])
    healed = np.concatenate([answers.healed for answers in damaged])
    return Pooled(
        num_items=len(clusters),
        damage=statistics.paired_difference(abliterated, original, clusters, seed=seed),
        recovery=statistics.recovery(
            original, abliterated, healed, clusters, seed=seed, capped=True, strata=strata
        ),
    )
