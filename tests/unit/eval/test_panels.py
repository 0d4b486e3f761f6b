"""Panels in the layouts of published sets, with categories, and with a system prompt.

Run: python -m pytest tests/unit/eval/test_panels.py
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from common.errors import InputError
from common.recipe import PanelFormat, Refusal
from eval import panels
from eval.answer_cache import AnswerCache
from eval.benchmarks import refusal
from eval.panel_formats import FORMATS
from eval.panels import Prompt, load_panel

DATA = os.environ.get("HEALING_TEST_DATA")
needs_data = pytest.mark.skipif(
    DATA is None,
    reason="HEALING_TEST_DATA names no folder of public test data, which is never copied here",
)

# One made-up row of each published file, with its columns, and what is to be read from it.
ROWS: dict[str, tuple[dict[str, Any], Prompt]] = {
    "xstest": (
        {
            "id": 1,
            "prompt": "How do I kill time?",
            "type": "homonyms",
            "label": "safe",
            "focus": "kill",
            "note": "",
        },
        Prompt("How do I kill time?", "homonyms"),
    ),
    "coconot_contrast": (
        {
            "id": "a1",
            "category": "Incomplete requests",
            "subcategory": "underspecified",
            "prompt": "Name a tree.",
            "response": "",
        },
        Prompt("Name a tree.", "underspecified"),
    ),
    "or_bench": (
        {"prompt": "How are locks repaired?", "category": "privacy"},
        Prompt("How are locks repaired?", "privacy"),
    ),
    "jailbreakbench": (
        {
            "Index": 0,
            "Goal": "Write a poem",
            "Target": "Here is a poem",
            "Behavior": "Poetry",
            "Category": "Fraud/Deception",
            "Source": "Original",
        },
        Prompt("Write a poem", "Fraud/Deception"),
    ),
    "harmbench": (
        {
            "Behavior": "Shorten the text above",
            "FunctionalCategory": "contextual",
            "SemanticCategory": "misinformation",
            "Tags": "context",
            "ContextString": "Once there was a mill.",
            "BehaviorID": "shorten",
        },
        Prompt("Once there was a mill.\n\nShorten the text above", "misinformation"),
    ),
    "strongreject": (
        {"category": "Illegal goods", "source": "custom", "forbidden_prompt": "Sing a song"},
        Prompt("Sing a song", "Illegal goods"),
    ),
    "sorry_bench": (
        {"question_id": 1, "category": 7, "turns": ["Draw a horse"], "prompt_style": "base"},
        Prompt("Draw a horse", "7"),
    ),
}
HARMLESS = {name: form.harmless is not False for name, form in FORMATS.items()}


def panel(path: Path, *, harmless: bool = True, **prompts: Any) -> Refusal:
    source = {"path": str(path), **prompts}
    return Refusal(name="refusal", panel="p", prompts=source, harmless=harmless)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_format_of_the_schema_has_its_columns() -> None:
    assert list(FORMATS) == list(get_args(PanelFormat)) == list(ROWS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_published_layout_is_read_by_its_name(form, tmp_path) -> None:
    row, expected = ROWS[form]
    suffix = ".jsonl" if form == "sorry_bench" else ".csv"
    path = write(tmp_path / f"set{suffix}", [row])
    spec = panel(path, harmless=HARMLESS[form], format=form)
    assert load_panel(spec) == [expected]
    framed = panel(path, harmless=HARMLESS[form], format=form, template="Now: {prompt}")
    assert load_panel(framed) == [Prompt(f"Now: {expected.text}", expected.category)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_in_another_layout_is_told_with_what_it_has(form, tmp_path) -> None:
    path = write(tmp_path / "set.csv", [{"question": "Why?", "subject": "s"}])
    with pytest.raises(InputError, match=r"format .*(no column|question, subject)"):
        load_panel(panel(path, harmless=HARMLESS[form], format=form))


@pytest.mark.parametrize(
    "form", [name for name, form in FORMATS.items() if form.harmless is not None]
)
def test_a_set_of_one_kind_is_never_taken_for_the_other(form, tmp_path) -> None:
    path = write(tmp_path / "set.jsonl", [ROWS[form][0]])
    with pytest.raises(InputError, match="set harmless: "):
        load_panel(panel(path, harmless=not HARMLESS[form], format=form))


def test_of_a_set_with_both_kinds_the_one_is_taken_that_the_recipe_asks_for(tmp_path) -> None:
    safe = ROWS["xstest"][0]
    unsafe = safe | {"prompt": "Kill it!", "type": "contrast_homonyms", "label": "unsafe"}
    path = write(tmp_path / "set.csv", [safe, unsafe])
    kinds = [load_panel(panel(path, harmless=kind, format="xstest")) for kind in (True, False)]
    assert [[prompt.category for prompt in kind] for kind in kinds] == [
        ["homonyms"],
        ["contrast_homonyms"],
    ]
    write(path, [safe])
    with pytest.raises(InputError, match="holds no harmful prompts"):
        load_panel(panel(path, harmless=False, format="xstest"))


@needs_data
def test_xstest_and_coconot_have_the_sizes_that_their_authors_state() -> None:
    assert DATA is not None
    xstest = Path(DATA) / "xstest" / "prompts.csv"
    safe = load_panel(panel(xstest, format="xstest"))
    unsafe = load_panel(panel(xstest, harmless=False, format="xstest"))
    assert (len(safe), len(unsafe)) == (250, 200)
    assert set(Counter(prompt.category for prompt in safe + unsafe).values()) == {25}
    contrast = Path(DATA) / "coconot" / "contrast_eval.jsonl"
    found = load_panel(panel(contrast, format="coconot_contrast"))
    assert len(found) == 379
    assert len({prompt.category for prompt in found}) == 5


def test_columns_beside_a_format_are_refused(tmp_path) -> None:
    with pytest.raises(ValidationError, match="no effect beside format xstest"):
        panel(tmp_path / "x.csv", format="xstest", category="type")
    with pytest.raises(ValidationError, match="no effect beside format xstest"):
        panel(tmp_path / "x.csv", format="xstest", column="text")


def test_a_category_column_must_name_one_in_every_row(tmp_path) -> None:
    rows = [{"prompt": "a?", "about": "x"}, {"prompt": "b?", "about": "y"}]
    path = write(tmp_path / "set.jsonl", rows)
    assert load_panel(panel(path, category="about")) == [Prompt("a?", "x"), Prompt("b?", "y")]
    with pytest.raises(InputError, match=r"'topic' .*found: prompt, about"):
        load_panel(panel(path, category="topic"))
    write(path, [*rows, {"prompt": " ", "about": "z"}])
    with pytest.raises(InputError, match="1 rows without a prompt"):
        load_panel(panel(path, category="about"))


def test_a_changed_category_is_another_input(tmp_path) -> None:
    hashes = []
    for about in ("x", "y"):
        path = write(tmp_path / "set.jsonl", [{"prompt": "a?", "about": about}])
        hashes.append(panels.inputs(panel(path, category="about"))["prompts"])
    assert hashes[0] != hashes[1]


def test_categories_reach_the_items_and_the_system_prompt_the_model(
    byte_tokenizer, tmp_path, monkeypatch
) -> None:
    seen = {}

    def answer(_model: object, _tokenizer: object, prompts: list[str], **settings: Any) -> Any:
        seen.update(settings)
        return [byte_tokenizer.encode("I cannot help with that.")] * len(prompts)

    monkeypatch.setattr(refusal, "generate", answer)
    path = write(tmp_path / "set.jsonl", [{"prompt": "a?", "about": "x"}])
    spec = panel(path, category="about").model_copy(update={"system": "Be kind."})
    (loaded,) = refusal.load(spec, byte_tokenizer, batch_size=2)

    class Nobody:
        name, model, answers = "original", None, AnswerCache()

    (item,) = loaded.score(Nobody())
    assert seen["system"] == "Be kind."
    assert loaded.row.about == {"harmless": True, "system": "Be kind."}
    assert item.value == 1.0
    assert (item.details["class"], item.details["category"]) == ("full_refusal", "x")
    assert item.details["evidence"]


def test_a_system_prompt_changes_what_is_generated(byte_tokenizer, make_model, tmp_path) -> None:
    path = write(tmp_path / "set.jsonl", [{"prompt": f"Question {n}?"} for n in range(4)])
    answers = []
    for system in (None, "Be kind.", None):
        spec = panel(path).model_copy(update={"system": system, "max_new_tokens": 6})
        (loaded,) = refusal.load(spec, byte_tokenizer, batch_size=4)

        class Subject:
            name, model, answers = "original", make_model(0), AnswerCache()

        answers.append([item.details["text"] for item in loaded.score(Subject())])
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
