"""Several runs in one table: every value with its interval, gaps as dashes, unequal items said.

Run: python -m pytest tests/unit/eval/test_runs_table.py
"""

import copy

import pytest

from common import artifacts
from common.errors import InputError
from eval import runs_table
from eval.__main__ import main
from eval.table import interval
from tests.releasing import read, write_evaluation


@pytest.fixture
def results(tmp_path):
    (tmp_path / "made").mkdir()
    write_evaluation(tmp_path / "made")
    return read(tmp_path / "made")


def cell(blocks, name: str, label: str, column: int) -> str:
    (block,) = [block for block in blocks if block.name == name]
    (line,) = [line for line in block.cells if line[0] == label]
    return line[1 + column]


def test_every_run_has_a_column_with_its_own_values(results) -> None:
    other = copy.deepcopy(results)
    other["benchmarks"][0]["healed"] = {"value": 0.5, "low": 0.25, "high": 0.75}
    blocks = runs_table.blocks({"a": results, "b": other})
    assert blocks[0].heads == ("", "a", "b")
    expected = interval(results["benchmarks"][0]["healed"])
    assert cell(blocks, "benchmarks", "letters, healed", 0) == expected
    assert cell(blocks, "benchmarks", "letters, healed", 1) == "0.500 [0.250, 0.750]"
    assert cell(blocks, "refusal", "restricted, n", 1) == "20"
    recovery = interval(results["pooled"]["recovery"], 2)
    assert cell(blocks, "pooled", "recovery", 0) == recovery


def test_what_a_run_has_not_measured_is_a_dash(results) -> None:
    other = copy.deepcopy(results)
    other["refusal"] = []
    blocks = runs_table.blocks({"a": other, "b": results})
    assert cell(blocks, "refusal", "restricted, healed", 0) == "-"
    assert cell(blocks, "refusal", "restricted, healed", 1) != "-"


def test_equal_items_need_no_remark(results) -> None:
    assert runs_table.remarks({"a": results}) == []
    (note,) = runs_table.remarks({"a": results, "b": copy.deepcopy(results)})
    assert "not paired" in note


@pytest.mark.parametrize(
    ("kind", "change", "shown"),
    [
        ("benchmarks", {"n": 41}, "a: 40; b: 41"),
        ("benchmarks", {"answer_logp": {"original": -0.7}}, "n = 40 in each"),
        ("refusal", {"original": {"value": 0.1, "low": 0.0, "high": 0.2}}, "n = 20 in each"),
    ],
)
def test_unequal_items_are_said(kind, change, shown, results) -> None:
    other = copy.deepcopy(results)
    other[kind][0] |= change
    found = runs_table.remarks({"a": results, "b": other})
    assert len(found) == 2
    assert f"{kind}, {other[kind][0]['name']}: not the same items" in found[0]
    assert shown in found[0]


def test_folders_of_runs_evaluations_and_files_are_read_alike(results, tmp_path, capsys) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "eval").mkdir(parents=True)
        artifacts.write_json(tmp_path / name / "eval" / "results.json", results)
    paths = [tmp_path / "one", tmp_path / "two" / "eval", tmp_path / "two/eval/results.json"]
    assert all(runs_table.read(path) == results for path in paths)
    assert main(["compare", *map(str, paths[:2])]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["one", "two"]
    assert main(["compare", str(paths[0]), str(paths[1]), "--markdown"]) == 0
    assert "|  | one | two |" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_their_paths(results, tmp_path, capsys) -> None:
    paths = [tmp_path / where / "run" for where in ("here", "there")]
    for path in paths:
        path.mkdir(parents=True)
        artifacts.write_json(path / "results.json", results)
    assert main(["compare", *map(str, paths), "--markdown"]) == 0
    assert f"| {paths[0]} | {paths[1]} |" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema_version": 1}'])
def test_what_is_no_results_file_is_told(content, tmp_path, capsys) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json"):
        runs_table.read(tmp_path)
    assert main(["compare", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
