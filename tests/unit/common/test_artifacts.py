"""Finished work: content hashes, files that are whole or absent, the store and its locks.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_artifacts.py
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import artifacts
from common.artifacts import Store, whole
from common.errors import InputError, StageError

ROOT = Path(__file__).resolve().parents[3]

HOLD = """
import sys, time
from pathlib import Path
from common.artifacts import Store
with Store(Path(sys.argv[1])).locked("x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock x of the store in tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_hashes_are_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.hash_text("abc") == known
    assert artifacts.hash_file(path) == known


def test_the_hash_of_a_file_covers_more_than_its_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "BLOCK_BYTES", 4)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"abcdefgh-x")
    other.write_bytes(b"abcdefgh-y")
    assert artifacts.hash_file(one) != artifacts.hash_file(other)
    assert artifacts.hash_file(one) == artifacts.hash_text("abcdefgh-x")


def test_the_hash_of_files_sees_names_and_contents_and_nothing_else(tmp_path):
    def make(folder, files):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return [tmp_path / folder / name for name in files]

    base = make("a", {"x": "1", "y": "2"})
    assert artifacts.hash_files(make("b", {"y": "2", "x": "1"})) == artifacts.hash_files(base)
    assert artifacts.hash_files(make("c", {"x": "1", "z": "2"})) != artifacts.hash_files(base)
    assert artifacts.hash_files(make("d", {"x": "1", "y": "3"})) != artifacts.hash_files(base)
    assert artifacts.hash_files(make("e", {"x": "2", "y": "1"})) != artifacts.hash_files(base)
    assert artifacts.hash_files(base[:1]) != artifacts.hash_files(base)


def test_a_fingerprint_ignores_the_order_of_keys(tmp_path):
    store = Store(tmp_path)
    one = store.entry("train", 1, {"a": 1, "b": {"c": 2, "d": [1, 2]}})
    other = store.entry("train", 1, {"b": {"d": [1, 2], "c": 2}, "a": 1})
    assert one == other
    assert one.folder == tmp_path / ".store" / "train" / one.fingerprint[:24]


@pytest.mark.parametrize(
    ("stage", "version", "inputs"),
    [
        ("eval", 1, {"a": 1, "b": [1, 2]}),
        ("train", 2, {"a": 1, "b": [1, 2]}),
        ("train", 1, {"a": 2, "b": [1, 2]}),
        ("train", 1, {"a": "1", "b": [1, 2]}),
        ("train", 1, {"a": 1, "b": [2, 1]}),
        ("train", 1, {"a": 1, "b": [1, 2], "c": None}),
        ("train", 1, {"a": 1}),
    ],
)
def test_a_fingerprint_changes_with_anything_it_is_made_of(stage, version, inputs, tmp_path):
    base = Store(tmp_path).entry("train", 1, {"a": 1, "b": [1, 2]})
    assert Store(tmp_path).entry(stage, version, inputs).fingerprint != base.fingerprint


def test_a_fingerprint_does_not_depend_on_where_the_store_lies(tmp_path):
    inputs = {"a": 1}
    here, there = Store(tmp_path / "a"), Store(tmp_path / "b")
    assert here.entry("x", 1, inputs).fingerprint == there.entry("x", 1, inputs).fingerprint


def test_an_entry_is_complete_when_its_manifest_is_there_and_not_before(tmp_path):
    store = Store(tmp_path)
    entry = store.entry("train", 1, {})
    assert not entry.complete
    entry.folder.mkdir(parents=True)
    (entry.folder / "model.bin").write_text("half")
    assert not entry.complete
    store.finish(entry, seconds=1.234, about={"seed": 3})
    assert entry.complete
    expected = {"stage": "train", "fingerprint": entry.fingerprint, "seconds": 1.23, "seed": 3}
    assert entry.manifest() == expected


def test_a_manifest_that_cannot_be_written_leaves_the_entry_incomplete(tmp_path):
    store = Store(tmp_path)
    entry = store.entry("train", 1, {})
    entry.folder.mkdir(parents=True)
    with pytest.raises(TypeError):
        store.finish(entry, seconds=1, about={"bad": object()})
    assert not entry.complete
    assert list(entry.folder.iterdir()) == []


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"b": 1, "a": "\u00e9"})
    assert path.read_text() == '{\n "a": "\\u00e9",\n "b": 1\n}\n'

    def killed(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        artifacts.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 1, "a": "\u00e9"}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"n": 0, "text": "x" * 100_000})
    stop, bad = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                bad.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        artifacts.write_json(path, {"n": number, "text": "x" * 100_000})
    stop.set()
    reader.join()
    assert not bad
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_jsonl_comes_back_as_it_was_written(tmp_path):
    rows = [{"a": 'two\nlines, "q"'}, {"b": [1, None, 0.5]}, {"c": "\u2028\u00e9"}]
    artifacts.write_jsonl(tmp_path / "a.jsonl", rows)
    assert artifacts.read_jsonl(tmp_path / "a.jsonl") == rows
    artifacts.write_jsonl(tmp_path / "a.jsonl", [])
    assert artifacts.read_jsonl(tmp_path / "a.jsonl") == []


def test_a_link_leads_from_the_run_folder_into_the_store(tmp_path):
    store, run_folder = Store(tmp_path / "runs"), tmp_path / "runs" / "mine"
    run_folder.mkdir(parents=True)
    entries = [store.entry("train", 1, {"n": n}) for n in (1, 2)]
    for entry in entries:
        entry.folder.mkdir(parents=True)
        store.finish(entry, seconds=0, about={})
        store.link(entry, run_folder)
        store.link(entry, run_folder)  # twice is as good as once
        assert (run_folder / "train").resolve() == entry.folder.resolve()
        assert not os.path.isabs(os.readlink(run_folder / "train"))
    # Moved as a whole, the links still hold.
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "mine" / "train" / "manifest.json").is_file()
    assert [path.name for path in (tmp_path / "moved" / "mine").iterdir()] == ["train"]


def test_what_a_killed_process_left_beside_a_link_is_no_obstacle(tmp_path):
    store = Store(tmp_path)
    entry = store.entry("train", 1, {})
    entry.folder.mkdir(parents=True)
    with whole(tmp_path / "train") as beside:
        beside.symlink_to("nowhere")
    beside.symlink_to("nowhere")
    store.link(entry, tmp_path)
    assert (tmp_path / "train").resolve() == entry.folder.resolve()


def test_a_folder_of_the_user_is_not_replaced_by_a_link(tmp_path):
    store = Store(tmp_path)
    entry = store.entry("train", 1, {})
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine").write_text("precious")
    with pytest.raises(InputError, match="is not a link of this program"):
        store.link(entry, tmp_path)
    assert (tmp_path / "train" / "mine").read_text() == "precious"


def test_a_lock_excludes_another_process_and_names_itself(holder, tmp_path):
    with (
        pytest.raises(InputError, match=r"another process is at work on x .*x\.lock"),
        Store(tmp_path).locked("x"),
    ):
        pass
    with Store(tmp_path).locked("y"):
        pass


def test_a_lock_is_free_once_its_owner_was_killed(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Store(tmp_path).locked("x"):
        pass


def test_a_lock_is_free_after_its_block_even_after_an_error(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyError), store.locked("x"):
        raise KeyError
    with store.locked("x"), pytest.raises(InputError), store.locked("x"):
        pass
    with store.locked("x"):
        pass


def test_the_remembered_hash_of_files_is_the_real_one(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text(file.name)
    store = Store(tmp_path)
    store.root.mkdir()
    real = artifacts.hash_files(files)
    assert store.hash_of_files(files) == real
    read = []
    monkeypatch.setattr(artifacts, "hash_file", lambda path: read.append(path) or "changed")
    assert store.hash_of_files(files) == real
    assert read == []
    files[0].write_text("other")
    assert store.hash_of_files(files) != real
    assert read == [files[0]]


def test_too_little_disk_is_told_before_anything_is_written(tmp_path):
    artifacts.require_disk(tmp_path / "not" / "there", 1, "the model")
    with pytest.raises(StageError, match=r"the model needs .* GiB below .*where .* GiB are free"):
        artifacts.require_disk(tmp_path / "not" / "there", 2**62, "the model")
