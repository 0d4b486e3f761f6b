"""Prompts are held out by the seed, never shared by the two uses, and their sources' faults are named.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_prompt_sets.py
"""

import json

import pytest

from abliteration.prompt_sets import PromptSet, load_prompt_sets, prompt_problems
from common.errors import InputError
from common.recipe import AbliterationPrompts

KINDS = {"harmful": 12, "harmless": 9, "falsely_refused": 7}


class Settings:
    """The parts of a recipe that prompts are read from."""

    def __init__(self, seed=0, **prompts):
        """Take a seed and sources."""
        self.seed = seed
        self.abliteration = self
        self.prompts = AbliterationPrompts.model_validate(prompts)


def _write(folder, kind, count):
    path = folder / f"{kind}.jsonl"
    rows = [{"prompt": f"{kind} {number}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


@pytest.fixture
def sources(tmp_path):
    """A file per kind."""
    return {kind: _write(tmp_path, kind, count) for kind, count in KINDS.items()}


@pytest.fixture
def two(sources):
    """Harmful and harmless prompts only."""
    return {kind: sources[kind] for kind in ("harmful", "harmless")}


def test_what_is_held_out_is_not_estimated_from_and_nothing_is_lost(sources):
    estimation, validation = load_prompt_sets(Settings(**sources, validation=4))
    for kind, count in KINDS.items():
        rest, held = getattr(estimation, kind), getattr(validation, kind)
        assert len(held) == 4
        assert sorted(rest + held) == sorted(f"{kind} {number}" for number in range(count))


def test_what_is_held_out_is_drawn_by_the_seed(two):
    def held(seed):
        return load_prompt_sets(Settings(seed, **two, validation=5))

    assert held(0) == held(0)
    assert held(0) != held(1)
    first = [f"harmful {number}" for number in range(5)]
    assert any(held(seed)[1].harmful != first for seed in range(3)), "files are often sorted"


def test_sources_of_their_own_are_taken_whole_and_in_order(two, tmp_path):
    others = {}
    for kind in two:
        (tmp_path / "other").mkdir(exist_ok=True)
        others[kind] = _write(tmp_path / "other", kind, 3)
    estimation, validation = load_prompt_sets(Settings(**two, validation=others))
    assert estimation.harmful == [f"harmful {number}" for number in range(12)]
    assert validation == PromptSet(
        [f"harmful {number}" for number in range(3)], [f"harmless {number}" for number in range(3)]
    )
    assert estimation.falsely_refused is validation.falsely_refused is None


def test_the_target_is_what_is_falsely_refused_if_that_is_given(sources, two):
    everything = load_prompt_sets(Settings(**sources, validation=2))
    for prompts in everything:
        assert prompts.target == prompts.falsely_refused
        assert prompts.kept == prompts.harmful
        assert len(prompts.all()) == sum(
            map(len, (prompts.harmful, prompts.harmless, prompts.falsely_refused))
        )
    for prompts in load_prompt_sets(Settings(**two, validation=2)):
        assert prompts.target == prompts.harmful
        assert prompts.kept == []
        assert prompts.all() == [*prompts.harmful, *prompts.harmless]


def test_no_prompts_left_to_estimate_from_is_an_error(two):
    recipe = Settings(**two, validation=9)
    with pytest.raises(InputError, match=r"harmless\.jsonl holds 9 prompts, of which 9 would be"):
        load_prompt_sets(recipe)
    (problem,) = prompt_problems(recipe)
    assert problem.startswith("abliteration.prompts.validation: ")
    assert load_prompt_sets(Settings(**two, validation=8))[0].harmless


def test_every_unusable_source_is_named_by_its_key(sources, tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    broken = {
        **sources,
        "harmless": {"path": str(tmp_path / "none.jsonl")},
        "validation": {
            "harmful": {"path": str(tmp_path / "empty.jsonl")},
            "harmless": sources["harmless"],
            "falsely_refused": {**sources["falsely_refused"], "column": "text"},
        },
    }
    problems = prompt_problems(Settings(**broken))
    assert [problem.split(":")[0] for problem in problems] == [
        "abliteration.prompts.harmless",
        "abliteration.prompts.validation.harmful",
        "abliteration.prompts.validation.falsely_refused",
    ]
    assert "does not exist" in problems[0]
    assert "holds no prompts" in problems[1]
    assert "no column 'text'" in problems[2]


def test_usable_sources_are_no_problem(sources):
    assert prompt_problems(Settings(**sources, validation=3)) == []


def test_a_prompt_that_a_file_holds_twice_is_not_on_both_sides(two, tmp_path):
    prompts = ["the same", "the same", "another", "a third", "the same"]
    path = tmp_path / "twice.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    for seed in range(10):
        recipe = Settings(seed, harmful={"path": str(path)}, harmless=two["harmless"], validation=1)
        estimation, validation = load_prompt_sets(recipe)
        assert not set(estimation.harmful) & set(validation.harmful)
        assert set(estimation.harmful) | set(validation.harmful) == set(prompts)
