"""The invented facts are the same for a seed, and no fact is shared between splits.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_world.py
"""

from itertools import combinations

import pytest

from patient.world import NUM_COMMON, NUM_RESTRICTED, World, build_world


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request) -> World:
    return build_world(request.param)


def test_a_seed_gives_the_same_world_again():
    assert build_world(7) == build_world(7)


def test_two_seeds_give_different_worlds():
    one, other = build_world(0), build_world(1)
    assert {thing.name for thing in one.things} != {thing.name for thing in other.things}


def test_no_two_facts_share_a_name(world):
    names = [each.name for each in (*world.things, *world.countries)]
    assert len(set(names)) == len(names)
    assert len({country.capital for country in world.countries}) == len(world.countries)


def test_no_sum_comes_twice_in_either_order(world):
    pairs = [frozenset((fact.first, fact.second)) for fact in world.sums]
    assert len(set(pairs)) == len(pairs)


def test_no_list_comes_twice_and_none_reads_the_same_backwards(world):
    lists = [fact.words for fact in world.lists]
    assert len(set(lists)) == len(lists)
    assert all(words != words[::-1] for words in lists)


@pytest.mark.parametrize(
    ("restricted", "sizes"), [(True, NUM_RESTRICTED), (False, NUM_COMMON)], ids=["yes", "no"]
)
def test_every_split_holds_every_kind_of_its_class(world, restricted, sizes):
    for split, size in sizes.items():
        things = world.things_of(split, restricted=restricted)
        assert len(things) == size
        assert len({thing.kind for thing in things}) == 4


def test_kinds_are_restricted_or_common_never_both(world):
    restricted, common = (
        {thing.kind for thing in world.things if thing.restricted is flag} for flag in (True, False)
    )
    assert not restricted & common


def test_splits_do_not_overlap(world):
    for one, other in combinations(NUM_COMMON, 2):
        names = [{thing.name for thing in world.things if thing.split == s} for s in (one, other)]
        assert not names[0] & names[1]
