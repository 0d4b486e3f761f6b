"""The parts of the items: disjoint, complete, the same everywhere, and no fact in two of them.

Run: make setup && .venv/bin/python -m pytest tests/unit/eval/test_parts.py
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import StageError
from eval.items import Row
from eval.parts import SHARES, has_items, part_of, restrict

PARTS = tuple(SHARES)
PANEL, TASK, TEXT = (
    Row("refusal", "restricted"),
    Row("benchmarks", "task"),
    Row("cross_entropy", "text"),
)
TEXTS = [f"What is the colour of object number {index}?" for index in range(2000)]


@dataclass(frozen=True)
class Panel:
    """A panel as the benchmarks load it."""

    prompts: list[str]
    row: Row = PANEL


@dataclass(frozen=True)
class Task:
    """A task as lm_eval's benchmark loads it."""

    documents: dict[int, dict[str, Any]]
    task: Any
    row: Row = TASK


@dataclass(frozen=True)
class Documents:
    """Plain text as its benchmark loads it."""

    documents: list[list[int]]
    tokenizer: Any
    row: Row = TEXT


def make_task(documents):
    instances = [
        SimpleNamespace(doc_id=number, idx=option) for number in documents for option in (0, 1)
    ]
    task = SimpleNamespace(_instances=instances, doc_to_text=lambda doc: doc["question"])
    # As the harness has it: a property over the list.
    return Task(documents, _Harness(task))


class _Harness:
    def __init__(self, inner):
        """Take over."""
        self._instances, self.doc_to_text = inner._instances, inner.doc_to_text

    @property
    def instances(self):
        return self._instances


def test_every_item_is_in_one_part_and_their_sizes_are_as_planned():
    counts = dict.fromkeys(PARTS, 0)
    for text in TEXTS:
        counts[part_of(text)] += 1
    for part, share in SHARES.items():
        assert abs(counts[part] / len(TEXTS) - share / 100) < 0.04
    assert sum(SHARES.values()) == 100


def test_letter_case_and_spacing_do_not_move_an_item():
    assert all(part_of(text) == part_of(f"  {text.upper()} ") for text in TEXTS[:200])


def test_the_parts_of_a_panel_share_nothing_and_lose_nothing():
    found = [set(restrict(Panel(TEXTS), part).prompts) for part in PARTS]
    assert sum(map(len, found)) == len(TEXTS)
    assert set.union(*found) == set(TEXTS)


def test_a_prompt_in_two_panels_is_in_the_same_part_of_both():
    one, other = Panel(TEXTS[:300]), Panel(TEXTS[200:500][::-1])
    for part in PARTS:
        mine, theirs = (set(restrict(panel, part).prompts) for panel in (one, other))
        assert mine & set(TEXTS[200:300]) == theirs & set(TEXTS[200:300])


def test_the_parts_of_a_task_share_no_fact_and_keep_whole_items():
    documents = {n: {"question": TEXTS[n], "cluster": f"fact {n // 3}"} for n in range(300)}
    facts = []
    for part in PARTS:
        loaded = restrict(make_task(documents), part)
        facts.append({document["cluster"] for document in loaded.documents.values()})
        assert {i.doc_id for i in loaded.task.instances} == set(loaded.documents)
        assert len(loaded.task.instances) == 2 * len(loaded.documents)
    assert sum(map(len, facts)) == 100
    assert len(set.union(*facts)) == 100


def test_the_parts_of_plain_text_share_no_document():
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    documents = [[number, number + 1] for number in range(200)]
    loaded = Documents(documents, tokenizer)
    found = [restrict(loaded, part).documents for part in PARTS]
    assert sorted(ids for part in found for ids in part) == documents
    assert all(found)


def test_a_part_without_items_is_told():
    lonely = next(text for text in TEXTS if part_of(text) == "search")
    with pytest.raises(StageError, match="none of the items"):
        restrict(Panel([lonely]), "test")
    assert has_items([lonely], "search")
    assert not has_items([lonely], "test")


def test_a_benchmark_that_has_no_items_to_choose_from_is_told():
    strange = SimpleNamespace(row=SimpleNamespace(kind="benchmarks", name="strange"))
    with pytest.raises(StageError, match="cannot be measured in parts"):
        restrict(strange, "search")
