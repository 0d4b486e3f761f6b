"""Data of the harness's tasks: local copies by name, and what is said where there is none.

Run: python -m pytest tests/unit/eval/test_task_data.py
"""

import json
import os
import shutil
from pathlib import Path

import lm_eval as harness
import pytest

from common.errors import InputError
from common.recipe import LmEval
from eval import task_index
from eval.benchmarks import lm_eval

DATA = os.environ.get("HEALING_TEST_DATA")


@pytest.fixture
def hub_folder(task_folder: Path) -> Path:
    """The task `letters` over a data set of the hub that is nowhere; its items lie in data/."""
    (task_folder / "data").mkdir()
    shutil.move(task_folder / "letters.jsonl", task_folder / "data" / "test.jsonl")
    text = (task_folder / "letters.yaml").read_text()
    head, _, rest = text.partition("dataset_path: json\n")
    rest = rest.partition("test_split")[2]
    (task_folder / "letters.yaml").write_text(
        f"{head}dataset_path: nobody/letters\ntraining_split: train\ntest_split{rest}"
    )
    return task_folder


def spec_of(folder: Path, data, **settings) -> LmEval:
    return LmEval(
        name="lm_eval", tasks=["letters"], include_path=str(folder), data=data, **settings
    )


@pytest.mark.parametrize("form", ["folder", "files"])
def test_a_local_copy_stands_in_for_the_data_set(byte_tokenizer, hub_folder, form) -> None:
    copy = str(hub_folder / "data")
    data = {"letters": copy if form == "folder" else {"test": f"{copy}/test.jsonl"}}
    if form == "folder":  # a copy holds all splits that the task reads
        shutil.copy(hub_folder / "data" / "test.jsonl", hub_folder / "data" / "train.jsonl")
    (loaded,) = lm_eval.load(spec_of(hub_folder, data), byte_tokenizer, batch_size=4)
    assert [document["question"][-2] for document in loaded.documents.values()] == [*"abcdefghij"]


def test_an_item_is_never_its_own_example(byte_tokenizer, hub_folder) -> None:
    data = {"letters": {"test": str(hub_folder / "data" / "test.jsonl")}}
    spec = spec_of(hub_folder, data, num_fewshot=8)
    (loaded,) = lm_eval.load(spec, byte_tokenizer, batch_size=4)
    for instance in loaded.task.instances:
        question = loaded.documents[instance.doc_id]["question"]
        assert instance.args[0].count(question) == 1


def test_the_fingerprint_follows_the_data_and_not_its_path(hub_folder, tmp_path) -> None:
    copy = hub_folder / "data" / "test.jsonl"
    before = lm_eval.inputs(spec_of(hub_folder, {"letters": {"test": str(copy)}}))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(copy, moved / "test.jsonl")
    spec = spec_of(hub_folder, {"letters": {"test": str(moved / "test.jsonl")}})
    assert lm_eval.inputs(spec) == before
    (moved / "test.jsonl").write_text((moved / "test.jsonl").read_text().replace("b b", "b c"))
    assert lm_eval.inputs(spec) != before


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        ({"letters": "nowhere"}, "data.letters", "nowhere is no folder"),
        ({"letters": {"test": "gone.jsonl"}}, "data.letters", "gone.jsonl does not exist"),
        ({"letters": {"test": "{folder}/letters.yaml"}}, "data.letters", "the files end in .yaml"),
        ({"letters": {"dev": "{folder}/data/test.jsonl"}}, "tasks", "give {test: FILE}"),
        ({"lettres": {"test": "{folder}/data/test.jsonl"}}, "data", "is none of the tasks"),
    ],
)
def test_data_that_fits_no_task_is_a_problem(finished, hub_folder, data, key, reason) -> None:
    filled = json.loads(json.dumps(data).replace("{folder}", str(hub_folder)))
    spec = spec_of(hub_folder, filled)
    section = finished.recipe.eval.model_copy(update={"benchmarks": (spec,), "accept": {}})
    recipe = finished.recipe.model_copy(update={"eval": section})
    problem = lm_eval.check(spec, recipe)[0]
    assert problem.startswith(f"eval.benchmarks[0].{key}: ")
    assert reason in problem


def test_a_missing_data_set_is_named_with_what_to_do(hub_folder, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        lm_eval.texts(spec_of(hub_folder, {}))
    message = str(caught.value)
    for part in (
        'the lm-eval task "letters" cannot be loaded',
        "the data set nobody/letters",
        "HF_HOME",
        "hf download --repo-type dataset nobody/letters --local-dir FOLDER",
        "data: {letters: FOLDER}",
        "include_path",
    ):
        assert part in message


def test_of_several_data_sets_all_are_named(hub_folder, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    other = (hub_folder / "letters.yaml").read_text()
    other = other.replace("task: letters", "task: others").replace("nobody/letters", "nobody/more")
    (hub_folder / "others.yaml").write_text(other)
    spec = LmEval(name="lm_eval", tasks=["letters", "others"], include_path=str(hub_folder))
    with pytest.raises(
        InputError, match="Data sets of this benchmark: nobody/letters, nobody/more"
    ):
        lm_eval.texts(spec)


def test_a_missing_package_is_named_with_the_harnesss_extra(hub_folder) -> None:
    (hub_folder / "code.py").write_text("import langdetect_that_is_not_there\n")
    path = hub_folder / "letters.yaml"
    path.write_text(path.read_text() + "process_results: !function code.judge\n")
    with pytest.raises(
        InputError, match=r'needs the package langdetect.*pip install "lm_eval\[ifeval\]"'
    ):
        lm_eval.texts(spec_of(hub_folder, {}))


@pytest.mark.skipif(
    DATA is None,
    reason="HEALING_TEST_DATA names no folder of public test data, which is never copied here",
)
def test_gsm8k_is_asked_from_its_published_file(byte_tokenizer, tmp_path) -> None:
    published = Path(str(DATA)) / "gsm8k" / "test.jsonl"
    # The harness's own file; to list all of its tasks takes seconds.
    definition = Path(harness.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    (tmp_path / "gsm8k.yaml").write_text(f"include: {definition}\ntask: gsm8k\n")
    spec = LmEval(
        name="lm_eval",
        tasks=["gsm8k"],
        include_path=str(tmp_path),
        data={"gsm8k": {"test": str(published)}},
        limit=3,
    )
    (loaded,) = lm_eval.load(spec, byte_tokenizer, batch_size=4)
    first = json.loads(published.read_text(encoding="utf-8").splitlines()[0])["question"]
    context = loaded.task.instances[0].args[0]
    assert context.count("<|user|>") == 6  # five examples, none of them the item
    assert context.count(first) == 1
    assert len(lm_eval.texts(spec)["gsm8k"]) == 3 * 3


def test_the_files_of_a_copy_are_found(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text("{}")
    (tmp_path / "README.md").write_text("")
    assert [path.name for path in task_index.data_files(str(tmp_path))] == ["README.md", "x.jsonl"]
