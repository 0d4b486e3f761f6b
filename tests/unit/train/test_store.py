"""The store pruned: never what a run, a trial or a process needs; and the commands that show it and a study.

Run: make setup && .venv/bin/python -m pytest tests/unit/train/test_store.py
"""

import json

import pytest

from common.artifacts import STAGES, BusyError, Store
from tests import studying
from train import __main__ as commands
from train import run, store

STUDY = {"parameters": {"train.trainer.beta": {"choices": [0.1, 0.2, 9]}}}


@pytest.fixture
def place(tmp_path):
    return Store(tmp_path / "runs")


def make(place, stage, number, *, whole=True):
    """A stage in the store."""
    entry = place.entry(stage, 1, {"number": number})
    entry.folder.mkdir(parents=True)
    (entry.folder / "data").write_bytes(b"x" * 1000)
    if whole:
        place.finish(entry, seconds=1.0, about={})
    return entry


def folder_of(place, name):
    folder = place.output_dir / name
    folder.mkdir(parents=True)
    return folder


def test_what_nothing_uses_is_told_and_removed_only_when_asked(place):
    used, unused = make(place, "train", 1), make(place, "train", 2)
    place.link(used, folder_of(place, "one"))
    assert [kept.entry for kept in store.prune(place, remove=False)] == [unused]
    assert unused.complete
    assert [kept.entry for kept in store.prune(place, remove=True)] == [unused]
    assert not unused.folder.exists()
    assert used.complete
    assert store.prune(place, remove=True) == []


def test_what_trials_link_to_or_have_planned_stays(place):
    linked, planned = make(place, "train", 1), make(place, "train", 2, whole=False)
    place.link(linked, folder_of(place, "study/trials/0"))
    (folder_of(place, "study/trials/1") / STAGES).write_text(
        json.dumps({"train": planned.fingerprint})
    )
    assert store.prune(place, remove=True) == []
    users = {kept.entry.folder: kept.users for kept in store.entries(place)}
    assert users == {linked.folder: ["study/trials/0"], planned.folder: ["study/trials/1"]}


def test_what_a_process_is_making_stays(place):
    entry = make(place, "train", 1, whole=False)
    with place.locked(f"train-{entry.fingerprint[:24]}"):
        assert store.prune(place, remove=True) == []
        assert entry.folder.exists()
    assert len(store.prune(place, remove=True)) == 1


def test_what_is_planned_between_the_look_and_the_removal_stays(place, monkeypatch):
    entry = make(place, "train", 1)
    folder = folder_of(place, "late")
    locked = place.locked

    def plan_first(name, **more):
        (folder / STAGES).write_text(json.dumps({"train": entry.fingerprint}))
        return locked(name, **more)

    monkeypatch.setattr(place, "locked", plan_first)
    assert store.prune(place, remove=True) == []
    assert entry.complete


def test_what_is_shared_is_sized_and_left_alone(place):
    make(place, "train", 1)
    references = place.root / "references" / "abc"
    references.mkdir(parents=True)
    (references / "rows").write_bytes(b"x" * 500)
    assert store.shared(place) == {"references": 500}
    store.prune(place, remove=True)
    assert (references / "rows").exists()


def test_a_lock_is_refused_or_awaited(place):
    with place.locked("name"), pytest.raises(BusyError, match="another process is at work"):  # noqa: SIM117
        with place.locked("name"):
            pass
    with place.locked("name", wait=True):
        pass


@pytest.fixture
def studied(tmp_path, monkeypatch, capsys):
    """A finished study."""
    monkeypatch.setattr(run, "_stages", studying.pretended)
    monkeypatch.setattr(run, "_report", lambda _plan, _stage: None)
    recipe = studying.write_recipe(tmp_path, STUDY)
    assert run.main([str(recipe)]) == 0
    capsys.readouterr()
    return tmp_path / "runs"


def test_pruning_after_a_study_leaves_all_that_its_trials_show(studied, capsys):
    assert commands.main(["store", "--output-dir", str(studied)]) == 0
    listed = capsys.readouterr().out
    assert "used by nothing" in listed  # the training that broke
    assert "trying/trials/0" in listed
    assert commands.main(["store", "prune", "--output-dir", str(studied)]) == 0
    assert "1 stages" in capsys.readouterr().out
    assert commands.main(["store", "prune", "--yes", "--output-dir", str(studied)]) == 0
    assert "removed 1 stages" in capsys.readouterr().out
    for stage in ("abliteration", "train", "eval"):
        for link in studied.rglob(f"trying/**/{stage}"):
            assert link.exists(), link


def test_a_study_is_shown_with_its_trials_and_its_best(studied, capsys):
    assert commands.main(["study", "trying", "--output-dir", str(studied)]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 trials begun or queued (2 complete, 1 failed)" in shown
    assert "trial 0: pooled.recovery.value 0.9500  (beta=0.1)" in shown
    assert "done; best: trial 0" in shown


def test_a_study_under_way_is_shown_with_the_time_left_and_how_to_go_on(studied, capsys):
    (studied / "trying" / "study.json").unlink()
    assert commands.main(["study", "trying", "--output-dir", str(studied)]) == 0
    shown = capsys.readouterr().out
    assert "left at this pace" in shown
    assert "to go on, or to help: train/run.py" in shown


def test_what_is_shown_as_the_way_to_go_on_goes_on(studied):
    assert run.main([str(studied / "trying" / "recipe.yaml")]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["study", "nothing"], "there is no study (studies there: trying)"),
        (["store", "--yes"], "--yes has no effect on list"),
    ],
)
def test_a_wrong_command_is_told(studied, capsys, arguments, text):
    assert commands.main([*arguments, "--output-dir", str(studied)]) == 2
    assert text in capsys.readouterr().err


def test_a_folder_without_a_store_is_told(tmp_path, capsys):
    assert commands.main(["store", "--output-dir", str(tmp_path)]) == 2
    assert "there is no store" in capsys.readouterr().err
