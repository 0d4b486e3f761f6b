"""The mix of preference pairs: how often those of each group are drawn."""

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from common.statistics import Floats

Item = TypeVar("Item")


def cap(items: Sequence[Item], most: int | None, seed: str) -> list[Item]:
    """At most so many items, drawn without replacement, in their order."""
    if most is None or len(items) <= most:
        return list(items)
    places = random.Random(seed).sample(range(len(items)), most)  # no secret
    return [items[place] for place in sorted(places)]


def num_drawn(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many items of each group are drawn, so that an item is drawn as often as its group's weight says.

    Group i gets N * w_i n_i / sum_j(w_j n_j) of the N items in all: rounded down, and what is missing to N goes to
    the largest fractions, first come first served. Equal weights draw every item once.

    Args:
        sizes: items of each group.
        weights: of one item of each group, 0 or above; only their ratios matter.
    """
    total = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    if not total:
        return [0] * len(sizes)
    scale = sum(sizes) / total
    # Rounded, so that 2.9999999999999996 is the 3 that it stands for.
    shares = [round(scale * weight * size, 9) for weight, size in zip(weights, sizes, strict=True)]
    counts = [int(share) for share in shares]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - shares[i])
    for index in by_fraction[: sum(sizes) - sum(counts)]:
        counts[index] += 1
    return counts


def draw(groups: Sequence[Sequence[Item]], weights: Sequence[float], seed: int) -> list[list[Item]]:
    """Repeat and leave out items, so that their frequencies stand in the ratio of their groups' weights.

    A group of n items of which k are drawn gives every item k // n times, and k % n of them, drawn with the seed,
    once more. Items keep their order, and copies stand side by side; training shuffles them.

    Args:
        groups: the items, e.g. the pairs of each source or domain.
        weights: one per group, 0 or above.
        seed: of the draw; a group's draw depends on its own place and sizes alone.

    Returns:
        What is drawn of each group: as many items in all as there are.
    """
    counts = num_drawn([len(group) for group in groups], weights)
    drawn = []
    for place, (group, count) in enumerate(zip(groups, counts, strict=True)):
        whole, rest = divmod(count, len(group)) if group else (0, 0)
        once_more = set(
            random.Random(f"{seed} mix {place}").sample(range(len(group)), rest)
        )  # no secret
        drawn.append(
            [item for index, item in enumerate(group) for _ in range(whole + (index in once_more))]
        )
    return drawn


def shares(
    damages: Sequence[float], sizes: Sequence[float], floor: float, cap: float
) -> list[float]:
    """What part of the mix each domain gets, after the damage to be healed in it.

    Every domain gets the floor; what is left is dealt out in proportion to the damage, to none beyond the cap; and
    what the damaged ones may not have goes to the others in proportion to their sizes. No damage lowers a share: a
    domain that has more than the cap as it comes may keep that (pairs of two models' answers differ where the damage
    is, and are of the damaged domain already).

    Args:
        damages: of each domain, 0 or above, at least one above 0.
        sizes: how much there is of each, above 0.
        floor: least share of a domain.
        cap: largest share that a domain is raised to.

    Returns:
        One share per domain; their sum is 1.
    """
    weighed = np.array(sizes, dtype=np.float64)
    caps = np.maximum(weighed / weighed.sum(), max(cap, 1 / len(sizes)))
    found = np.full(len(sizes), min(floor, 1 / len(sizes)))
    for proportions in (np.array(damages, dtype=np.float64), weighed):
        found = _deal_out(found, proportions, caps)
    return [float(share) for share in found]


def _deal_out(given: Floats, proportions: Floats, caps: Floats) -> Floats:
    """Deal what is missing to 1 out in proportion, to none beyond its cap, as far as that goes."""
    takers = (given < caps) & (proportions > 0)
    while takers.any() and (left := 1 - given.sum()) > 1e-12:
        parts = np.where(takers, proportions, 0.0)
        given = np.minimum(given + left * parts / parts.sum(), caps)
        takers &= given < caps
    return given
