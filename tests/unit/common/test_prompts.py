"""Prompts come out of files as they were put in, or with a message that says what is wrong.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_prompts.py
"""

import csv
import json
import re
import sys
import types

import pytest
from pydantic import ValidationError

from common.errors import InputError
from common.prompts import load_prompts
from common.recipe import PromptSource

# A line break, separators that str.splitlines would cut at, quotes, a comma, a letter with accent.
HARD = ["two\nlines", "cut\u2028here", "next\x85line", 'say "hi", please', "caf\u00e9", "plain"]


def _load(path, **settings):
    return load_prompts(PromptSource(path=str(path), **settings))


def test_a_jsonl_file_gives_its_prompts_unchanged(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in HARD]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    assert _load(path) == HARD


def test_a_csv_file_gives_its_prompts_unchanged(tmp_path):
    path = tmp_path / "p.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "prompt"], *([i, prompt] for i, prompt in enumerate(HARD))])
    assert _load(path) == HARD


def test_a_text_file_has_one_prompt_a_line_and_skips_blank_ones(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\n\n  \ntwo\nthree", encoding="utf-8")
    assert _load(path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.csv", "prompt\na\n"), ("p.jsonl", '{"prompt": "a"}\n'), ("p.txt", "a\n")],
)
def test_a_byte_order_mark_is_no_part_of_the_prompts(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert _load(path) == ["a"]


def test_another_column_can_be_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "q", "prompt": "p"}\n')
    assert _load(path, column="question") == ["q"]


@pytest.mark.parametrize(
    ("slice_", "expected"),
    [("0:2", ["a", "b"]), (":1", ["a"]), ("1:", ["b", "c", "d"]), ("-2:", ["c", "d"])],
)
def test_a_slice_is_pythons(slice_, expected, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\nd\n")
    assert _load(path, slice=slice_) == expected


def test_a_template_stands_around_every_prompt_and_braces_are_letters(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a {prompt} {x}\n\nb\n")
    template = 'Say it {sadly}: "{prompt}" {}'
    expected = ['Say it {sadly}: "a {prompt} {x}" {}', 'Say it {sadly}: "b" {}']
    assert _load(path, template=template) == expected


def test_a_template_hides_no_blank_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": " "}\n{"prompt": "a"}\n')
    assert _load(path, template="Sigh. {prompt}") == ["Sigh. a"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Sigh.", "holds {prompt} 0 times; write it exactly once"),
        ("{prompt} and {prompt}", "holds {prompt} 2 times; write it exactly once"),
        ("{prompt}", "is the prompt alone, so it has no effect"),
    ],
)
def test_a_template_without_one_place_for_the_prompt_is_refused(template, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        PromptSource(path="p.txt", template=template)


def test_a_conversation_stands_for_its_first_user_turn(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "second"},
    ]
    path.write_text(json.dumps({"prompt": turns}))
    assert _load(path) == ["first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2 is not JSON"),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl:1 is no JSON object"),
        ("p.jsonl", b'{"text": "a"}\n', r"has no column 'prompt' \(found: text\); set `column`"),
        ("p.jsonl", b'{"prompt": 3}\n', r"column 'prompt' holds int, not text"),
        ("p.jsonl", b'{"prompt": ["a", "b"]}\n', r"column 'prompt' holds list, not text"),
        ("p.jsonl", b'{"prompt": " "}\n', r"holds no prompts"),
        ("p.csv", b"prompt,other\n", r"holds no prompts"),
        ("p.txt", b"\n\n", r"holds no prompts"),
        ("p.txt", b"caf\xe9\n", r"is not UTF-8 text .* at byte 3"),
        ("p.parquet", b"x", r"ends in '\.parquet'; name a \.jsonl, \.csv or \.txt file"),
        ("p.csv", b"prompt\n" + b"x" * 200_000 + b"\n", r"is not CSV that can be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _load(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="does not exist or is no file"):
            _load(path)


def _fake_hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_data_set_is_loaded_with_its_subset_split_and_revision(monkeypatch):
    seen = []

    def load(name, subset, *, split, revision):
        seen.append((name, subset, split, revision))
        return [{"prompt": "a"}, {"prompt": "b"}]

    _fake_hub(monkeypatch, load)
    source = PromptSource(dataset="o/d", subset="s", revision="abc", slice=":1")
    assert load_prompts(source) == ["a"]
    assert seen == [("o/d", "s", "train", "abc")]


def test_a_data_set_that_cannot_be_loaded_is_an_input_error(monkeypatch):
    def load(*_args, **_kwargs):
        raise ConnectionError("no route\nand more lines")

    _fake_hub(monkeypatch, load)
    message = r"data set o/d \(train\) could not be loaded \(ConnectionError: no route\)"
    with pytest.raises(InputError, match=message):
        load_prompts(PromptSource(dataset="o/d"))


def test_an_error_without_words_is_still_told(monkeypatch):
    def load(*_args, **_kwargs):
        raise RuntimeError

    _fake_hub(monkeypatch, load)
    with pytest.raises(InputError, match="could not be loaded"):
        load_prompts(PromptSource(dataset="o/d"))
