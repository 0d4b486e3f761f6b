"""Recipes: what is accepted, and what a person reads when one is wrong.

python -m pytest tests/unit/common/test_recipe.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from common.errors import RecipeError
from common.recipe import (
    COMPONENTS,
    Recipe,
    dump,
    json_schema,
    load_recipe,
    placed,
    resolved,
)

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

SOUND = """\
name: sound
seed: 3
model: {name_or_path: some/model, dtype: float32}
abliteration:
  prompts:
    harmful: {path: harmful.jsonl}
    harmless: {dataset: some/data, column: text, slice: "0:64"}
    validation: 16
  direction: {name: difference_in_means}
  selection: {name: scores, max_kl: 0.2}
  edit: {name: orthogonalize, strength: 0.9}
train:
  preferences:
    - {name: on_policy, prompts: {path: healing.jsonl}}
    - {name: dataset, dataset: some/pairs, columns: {prompt: null}}
  anchors:
    - {to: original, prompts: {path: healing.jsonl}, weight: 2.0}
    - {to: abliterated, prompts: {path: harmful.jsonl}}
  keep_ablated: hard
  trainer: {learning_rate: 5e-7, loss_type: [sigmoid, sft]}
eval:
  margin: 0.1
  benchmarks:
    - {name: lm_eval, tasks: [addition, capitals]}
    - {name: refusal, panel: restricted, prompts: {path: test.jsonl}, harmless: false}
    - {name: divergence, panel: near, prompts: {path: test.jsonl}}
  accept:
    refusal[restricted].healed.value: {max: 0.02}
    divergence[near].healed.mean_kl: {max: 1}
release: {license: apache-2.0}
tracking: {mode: offline}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(SOUND)
    return path


def problems_of(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


def line_of(text, part):
    return next(n for n, line in enumerate(text.splitlines(), 1) if part in line)


def test_a_sound_recipe_loads_with_its_values_and_the_defaults(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.seed == 3
    assert recipe.abliteration.edit.strength == 0.9
    assert recipe.abliteration.selection.min_refusals == 8
    assert recipe.abliteration.prompts.harmless.split == "train"
    assert recipe.abliteration.prompts.harmful.split is None
    assert recipe.train.anchors[0].weight == 2.0
    assert recipe.train.anchors[1].top_k == 64
    assert recipe.train.anchors[1].residual is None
    assert recipe.train.adapter == {"r": 16, "lora_alpha": 32}
    assert recipe.train.trainer["learning_rate"] == 5e-7
    assert recipe.eval.accept["refusal[restricted].healed.value"].max == 0.02
    assert recipe.output_dir == "runs"
    assert recipe.tracking.mode == "offline"


def test_a_recipe_cannot_be_changed(recipe_file):
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.abliteration.edit.strength = 2.0


# Each case: what is replaced in SOUND, by what, the words that mark the line (None: the
# replacement), the dotted key, and what the message must say.
BROKEN = [
    # Names, with the nearest one.
    (
        "name: orthogonalize",
        "name: ortogonalize",
        "abliteration.edit.name",
        [
            '"ortogonalize" is not an edit; did you mean "orthogonalize"?',
            "(known: add, biprojected, column_norm, orthogonalize, projected, row_norm)",
        ],
    ),
    ("name: orthogonalize", "nme: orthogonalize", "abliteration.edit.name", ["is missing"]),
    ("name: orthogonalize", "name: [a]", "abliteration.edit.name", ["is a list", "text belongs"]),
    ("name: orthogonalize", "name: no", "abliteration.edit.name", ["no without quotes", '"no"']),
    (
        "edit: {name: orthogonalize, strength: 0.9}",
        "edit: orthogonalize",
        "abliteration.edit",
        ["not a mapping", "{name: ...}"],
    ),
    (
        "name: difference_in_means",
        "name: diff_in_means",
        "abliteration.direction.name",
        ["is not a direction", 'did you mean "difference_in_means"?'],
    ),
    (
        "name: scores",
        "name: score",
        "abliteration.selection.name",
        ["is not a selection", "scores", "fixed"],
    ),
    (
        "name: on_policy",
        "name: onpolicy",
        "train.preferences[0].name",
        ["is not a preference source", 'did you mean "on_policy"?'],
    ),
    (
        "name: lm_eval",
        "name: lmeval",
        "eval.benchmarks[0].name",
        ["is not a benchmark", 'did you mean "lm_eval"?'],
    ),
    (
        "harmless: false}",
        "harmless: false, judge: {name: endpont}}",
        "eval.benchmarks[1].judge.name",
        ["is not a judge", 'did you mean "endpoint"? (known: endpoint, model, nli)'],
    ),
    (
        "harmless: false}",
        "harmless: false, judge: nli}",
        "eval.benchmarks[1].judge",
        ["is not a mapping; write {name: ...} with a judge (known: endpoint, model, nli)"],
    ),
    ("{to: original", "{to: orignal", "train.anchors[0].to", ['did you mean "original"?']),
    ("dtype: float32", "dtype: fp32", "model.dtype", ["not possible", "float32"]),
    # Keys, with the nearest one.
    ("seed: 3", "sed: 3", "sed", ['"sed" is not a key here; did you mean "seed"?']),
    ("strength: 0.9", "strenght: 0.9", "abliteration.edit.strenght", ['mean "strength"?']),
    ("weight: 2.0", "wieght: 2.0", "train.anchors[0].wieght", ['mean "weight"?']),
    ("column: text", "colum: text", "abliteration.prompts.harmless.colum", ['mean "column"?']),
    ("{max: 0.02}", "{maximum: 1}", None, ['"maximum" is not a key here', "known: max, min"]),
    ("tracking:", "merging: {}\ntracking:", "merging", ['"merging" is not a key here']),
    (
        "max_kl: 0.2",
        "layer: 2",
        "abliteration.selection.layer",
        ["is a key of fixed, not of scores; delete it"],
    ),
    (
        "{name: scores, max_kl: 0.2}",
        "{name: fixed, layer: 1, position: -1, max_kl: 0.2}",
        "abliteration.selection.max_kl",
        ["is a key of scores and search, not of fixed"],
    ),
    (
        "{name: scores, max_kl: 0.2}",
        "{name: fixed, position: -1}",
        "abliteration.selection.layer",
        ["is missing", "Index of the block"],
    ),
    ("name: sound\n", "", "name", ["is missing", "Name of the run"]),
    ("name_or_path: some/model, ", "", "model.name_or_path", ["is missing"]),
    # YAML's own readings.
    (
        "keep_ablated: hard",
        "keep_ablated: no",
        "train.keep_ablated",
        ["no without quotes is a boolean in YAML", "in quotes", "none, soft, hard"],
    ),
    ("mode: offline", "mode: off", "tracking.mode", ["off without quotes is a boolean"]),
    (
        "license: apache-2.0}",
        "language: [en, no]}",
        "release.language[1]",
        ["no without quotes is a boolean in YAML", 'write "no"'],
    ),
    ("name: sound", "name: 12", "name", ["12 without quotes is a number in YAML", 'write "12"']),
    ("harmless: false", 'harmless: "false"', None, ["is text", "without quotes"]),
    ("harmless: false", "harmless: 0", None, ["0 is a number, but true or false belongs"]),
    ("seed: 3", "seed: true", "seed", ["true is a boolean, but a whole number belongs here"]),
    ("seed: 3", "seed: 1.5", "seed", ["1.5 is a number, but a whole number belongs here"]),
    ("seed: 3", "seed: 1e3", "seed", ["1e3 is not a whole number; write 1000"]),
    ("seed: 3", "seed: '3'", "seed", ['"3" is text', "without quotes"]),
    ("seed: 3", "seed:", "seed", ["is empty, but a whole number belongs here"]),
    ("seed: 3", "seed: 007", "seed", ['"007" is text']),
    ("strength: 0.9", "strength: yes", "abliteration.edit.strength", ["yes is a boolean"]),
    ("strength: 0.9", "strength: abc", "abliteration.edit.strength", ['"abc" is text']),
    ("strength: 0.9", "strength: .nan", "abliteration.edit.strength", ["not a usable number"]),
    ("strength: 0.9", "strength: .inf", "abliteration.edit.strength", ["not a usable number"]),
    ("strength: 0.9", "strength: 1e999", "abliteration.edit.strength", ["not a usable number"]),
    (
        "learning_rate: 5e-7",
        "loss_weights: [1, .nan]",
        "train.trainer.loss_weights[1]",
        ["not a usable number"],
    ),
    ("seed: 3", "seed: 3\nyes: 3", None, ["the key yes is not a word; put it in quotes"]),
    ("seed: 3", "seed: 3\n7: 3", None, ["the key 7 is not a word"]),
    ("seed: 3", "seed: 3\n? [a]\n: 3", None, ["a list or mapping is not a word"]),
    ("seed: 3", "seed: 3\nname: again", "name", ["stands twice, first in line 1; delete one"]),
    (
        "strength: 0.9",
        "strength: 0.9, strength: 0.8",
        "abliteration.edit.strength",
        ["stands twice"],
    ),
    ("seed: 3", "seed: !!python/name:os.system 3", "seed", ["tag", "not supported"]),
    ("seed: 3", "seed: !!int three", "seed", ["'three' is not a int"]),
    ("seed: 3", "seed: &a [*a]", "seed[0]", ["contains itself"]),
    ("tracking:", "<<: {seed: 1}\ntracking:", None, ["`<<` merges are not supported"]),
    # Wrong kinds of things.
    ("model: {", "model: [{", None, ["not valid YAML"]),
    (
        "model: {name_or_path: some/model, dtype: float32}",
        "model: some/model",
        "model",
        ['"some/model" is text, but a mapping of keys belongs here'],
    ),
    ("tasks: [addition, capitals]", "tasks: addition", None, ["is text, but a list belongs"]),
    ("tasks: [addition, capitals]", "tasks: [1]", None, ["1 without quotes is a number in YAML"]),
    ("release: {license: apache-2.0}", "release:", "release", ["is empty"]),
    ("trainer: {learning_rate: 5e-7, loss_type: [sigmoid, sft]}", "trainer: 3", None, ["number"]),
    # Limits.
    ("strength: 0.9", "strength: 0", "abliteration.edit.strength", ["must be greater than 0"]),
    ("seed: 3", "seed: -1", "seed", ["is -1, but must be 0 or more"]),
    ("validation: 16", "validation: 0", "abliteration.prompts.validation", ["must be 1 or more"]),
    ("max_kl: 0.2", "skip_last_layers: 1", None, ["must be less than 1"]),
    (
        "{name: scores, max_kl: 0.2}",
        "{name: fixed, layer: 1, position: 0}",
        "abliteration.selection.position",
        ["must be less than 0"],
    ),
    ("margin: 0.1", "margin: 5", "eval.margin", ["must be less than 1"]),
    ("name: sound", "name: ../x", "name", ["not usable as a name"]),
    ("name: sound", "name: .hidden", "name", ["not usable as a name"]),
    ("name: sound", "name: " + "a" * 101, "name", ["longer than 100 characters"]),
    ("panel: near", "panel: 'a[b]'", "eval.benchmarks[2].panel", ["not usable as a name"]),
    ("tasks: [addition, capitals]", "tasks: []", "eval.benchmarks[0].tasks", ["is empty"]),
    ("name_or_path: some/model", 'name_or_path: ""', "model.name_or_path", ["is empty"]),
    # Settings without effect.
    ("weight: 2.0", "weight: 0", "train.anchors[0].weight", ["no effect; delete the anchor"]),
    ("weight: 2.0", "weight: -2", "train.anchors[0].weight", ["must be greater than 0"]),
    (
        "weight: 2.0",
        "weight: 2.0, residual: {weight: 0}",
        "train.anchors[0].residual.weight",
        ["no effect; delete residual"],
    ),
    (
        "weight: 2.0",
        "weight: 2.0, residual: {sise: 8}",
        "train.anchors[0].residual.sise",
        ['mean "size"?'],
    ),
    (
        "{path: harmful.jsonl}\n    harmless",
        "{path: harmful.jsonl, split: train}\n    harmless",
        "abliteration.prompts.harmful.split",
        ["has no effect on a local file"],
    ),
    (
        "{path: harmful.jsonl}\n    harmless",
        "{path: harmful.jsonl, revision: main}\n    harmless",
        "abliteration.prompts.harmful.revision",
        ["has no effect on a local file"],
    ),
    (
        "{path: harmful.jsonl}\n    harmless",
        "{path: harmful.txt, column: text}\n    harmless",
        "abliteration.prompts.harmful.column",
        ["has no effect on a text file"],
    ),
    (
        "{path: harmful.jsonl}\n    harmless",
        "{path: a.jsonl, dataset: b}\n    harmless",
        "abliteration.prompts.harmful.dataset",
        ["keep one of the two"],
    ),
    (
        "{path: harmful.jsonl}\n    harmless",
        "{column: text}\n    harmless",
        "abliteration.prompts.harmful",
        ["give path (a local file) or dataset"],
    ),
    (
        '{dataset: some/data, column: text, slice: "0:64"}',
        "{path: harmful.jsonl}",
        "abliteration.prompts.harmless",
        ["is the same as harmful"],
    ),
    ('"0:64"', '"0-64"', None, ["is not a slice"]),
    ('"0:64"', '"0:64:2"', None, ["is not a slice"]),
    ('"0:64"', '":"', None, ["selects every row"]),
    ('"0:64"', '"5:5"', None, ["selects no row"]),
    ('"0:64"', "64", None, ["64 without quotes is a number"]),
    ("{prompt: null}", "{prompt: chosen}", None, ["names one column twice"]),
    (
        "[addition, capitals]",
        "[addition, addition]",
        "eval.benchmarks[0].tasks[1]",
        ['"addition" is there already'],
    ),
    (
        "name: divergence, panel: near,",
        "name: refusal, panel: restricted, harmless: true,",
        "eval.benchmarks[2].panel",
        ['"restricted" is there already'],
    ),
    (
        "{name: scores, max_kl: 0.2}",
        "{name: search, edits: [projected, orthogonalize, projected]}",
        "abliteration.selection.edits[2]",
        ['"projected" is there already; delete one'],
    ),
    (
        "{license: apache-2.0}",
        "{license: apache-2.0, gguf: [f16, f16]}",
        "release.gguf[1]",
        ['"f16" is there already; delete one'],
    ),
    ("{max: 0.02}", "{}", "eval.accept.refusal[restricted].healed.value", ["neither min nor max"]),
    ("{max: 0.02}", "{min: 1, max: 0}", None, ["so nothing passes"]),
    ("{max: 0.02}", "{max: low}", None, ['"low" is text, but a number belongs here']),
    (
        "license: apache-2.0",
        "license: mit, license_name: x",
        "release.license_name",
        ["has no effect beside license mit"],
    ),
    (
        "seed: 3",
        "seed: 3\nprocesses: 3",
        "train.global_batch_size",
        ["32 pairs cannot be shared by 3 processes", "multiple of 3"],
    ),
    # Gates.
    (
        "refusal[restricted].healed.value",
        "refusal[restrictd].healed.value",
        "eval.accept.refusal[restrictd].healed.value",
        ['"restrictd" is not a refusal panel', 'did you mean "restricted"?'],
    ),
    (
        "refusal[restricted].healed",
        "refusal[near].healed",
        None,
        ['"near" is not a refusal panel of this recipe'],
    ),
    ("refusal[restricted].healed", "refusal[restricted].heald", None, ['mean "healed"?']),
    ("refusal[restricted].healed", "refusal.healed", None, ["a list; write refusal[name].field"]),
    (
        "[restricted].healed.value",
        "[restricted].classes.healed.partial",
        None,
        ['"partial" is not a field of healed', 'mean "partial_refusal"?'],
    ),
    (
        "[restricted].healed.value",
        "[restricted].classes.degenerate",
        None,
        ['"degenerate" is not a field of classes', "known: abliterated, healed, original"],
    ),
    (
        "[restricted].healed.value",
        "[restricted].classes.healed",
        None,
        ["add one of: compliance, degenerate, full_refusal, partial_refusal"],
    ),
    (
        "[restricted].healed.value",
        "[restricted].calibrated.healed.value",
        "eval.accept.refusal[restricted].calibrated.healed.value",
        ["eval.labels is null", "fill in the labels.csv"],
    ),
    ("refusal[restricted].healed", "pooled[a].damage", None, ["not a list; write pooled.field"]),
    ("refusal[restricted].healed", "refusals[a].healed", None, ['mean "refusal"?']),
    ("[restricted].healed.value", "[restricted].healed", None, ["is not a number; add one of"]),
    ("[restricted].healed.value", "[restricted].n.value", None, ["is one number"]),
    ("[restricted].healed.value", "[restricted].healed.valu", None, ['mean "value"?']),
    ("refusal[restricted].healed.value", "refusal", None, ["is not a field of results.json"]),
    ("refusal[restricted].healed.value", '"a b[.c"', None, ["is not a field of results.json"]),
]


@pytest.mark.parametrize(
    ("old", "new", "key", "fragments"), BROKEN, ids=[f"{b[2] or 'any'}:{b[1][:24]}" for b in BROKEN]
)
def test_a_broken_recipe_says_where_and_what_and_what_to_do(recipe_file, old, new, key, fragments):
    assert SOUND.count(old) >= 1, "the case replaces nothing"
    recipe_file.write_text(SOUND.replace(old, new, 1))
    problems = problems_of(recipe_file)
    text = "\n".join(problems)
    hit = [p for p in problems if all(fragment in p for fragment in fragments)]
    assert hit, text
    assert hit[0].startswith(f"{recipe_file}:"), text
    if key:
        assert f": {key}: " in hit[0], text
    assert text.isascii()
    for trace_of_pydantic in ("Input should", "validation error", "[key]", "=scores", "pydantic"):
        assert trace_of_pydantic not in text


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("strength: 0.9", "strength: abc", "abliteration.edit.strength"),
        ("weight: 2.0", "weight: 0", "train.anchors[0].weight"),
        ("name: divergence", "name: divergense", "eval.benchmarks[2].name"),
        ("divergence[near].healed.mean_kl", "divergence[far].healed.mean_kl", "eval.accept."),
        ("mode: offline", "mode: offlin", "tracking.mode"),
    ],
)
def test_a_problem_carries_the_line_it_stands_in(recipe_file, old, new, fragment):
    recipe_file.write_text(SOUND.replace(old, new, 1))
    [problem] = problems_of(recipe_file)
    assert problem.startswith(f"{recipe_file}:{line_of(SOUND, old)}: {fragment}")


def test_a_missing_key_is_reported_at_the_line_of_its_section(recipe_file):
    recipe_file.write_text(SOUND.replace("{name: refusal, panel: restricted, ", "{name: refusal, "))
    [problem] = problems_of(recipe_file)
    line = line_of(SOUND, "name: refusal")
    assert problem.startswith(f"{recipe_file}:{line}: eval.benchmarks[1].panel: is missing")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(recipe_file):
    text = SOUND
    for old, new in (
        ("seed: 3", "seed: true"),
        ("strength: 0.9", "strenth: 0.9"),
        ("weight: 2.0", "weight: 0"),
        ("harmless: false", "harmless: 3"),
        ("mode: offline", "mode: off"),
    ):
        text = text.replace(old, new)
    recipe_file.write_text(text + "name: twice\n")
    problems = problems_of(recipe_file, ["eval.margin=7"])
    assert len(problems) == 7
    lines = [int(problem.split(":")[1]) for problem in problems[:-1]]
    assert lines == sorted(lines)
    assert problems[-1].startswith("override eval.margin=7: eval.margin: is 7")


def test_without_preferences_there_is_nothing_to_train(recipe_file):
    problems = problems_of(recipe_file, ["train.preferences=[]"])
    assert "has no preferences" in problems[0]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", ":1: the top level is not a mapping"),
        (b"text\n", ":1: the top level is not a mapping"),
        (b"name: a\n\tseed: 1\n", ":2: not valid YAML"),
        (b"name: a\nmodel: {a: 1\n", "not valid YAML"),
        (b"name: 'a\n", "not valid YAML"),
        (b"name: a\n---\nname: b\n", ":2: not valid YAML"),
        (b"name: *unknown\n", ":1: not valid YAML"),
        (b"name: a\nseed: \x01\n", ":2: not valid YAML"),
        (b"name: \xff\xfe\n", "is not UTF-8"),
        (b"[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clean_message(tmp_path, content, fragment):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    [problem] = problems_of(path)
    assert problem.startswith(str(path))
    assert fragment in problem
    assert "\n" not in problem


def test_a_tab_is_answered_with_spaces(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: a\nmodel:\n\tname_or_path: b\n")
    [problem] = problems_of(path)
    assert "indent with spaces, not tabs" in problem


def test_a_missing_file_lists_its_neighbours(recipe_file):
    [problem] = problems_of(recipe_file.with_name("y.yaml"))
    assert "there is no such file" in problem
    assert "x.yaml" in problem


def test_a_folder_is_not_a_recipe(tmp_path):
    [problem] = problems_of(tmp_path)
    assert "is a folder" in problem


def test_an_unreadable_file_is_one_clean_message(recipe_file):
    recipe_file.chmod(0)
    if os.access(recipe_file, os.R_OK):
        # The superuser's rights are not taken away by a file's mode: there is no such file to try.
        pytest.skip("this user reads everything")
    [problem] = problems_of(recipe_file)
    assert "cannot be read" in problem


def test_a_byte_order_mark_does_not_matter(recipe_file):
    sound = load_recipe(recipe_file)
    recipe_file.write_bytes(b"\xef\xbb\xbf" + SOUND.encode())
    assert load_recipe(recipe_file) == sound


@pytest.mark.parametrize("written", ["5e-7", "5E-7", "5.0e-7", "0.0000005", "+5e-07"])
def test_every_way_to_write_a_small_number_is_that_number(recipe_file, written):
    recipe_file.write_text(
        SOUND.replace("5e-7", written).replace("max_kl: 0.2", f"max_kl: {written}")
    )
    recipe = load_recipe(recipe_file)
    assert recipe.train.trainer["learning_rate"] == pytest.approx(5e-7, rel=1e-12)
    assert recipe.abliteration.selection.max_kl == pytest.approx(5e-7, rel=1e-12)


@pytest.mark.parametrize("written", ["10:20", "1:30", '"10:20"'])
def test_a_slice_needs_no_quotes_though_yaml_knows_base_60(recipe_file, written):
    recipe_file.write_text(SOUND.replace('"0:64"', written))
    assert load_recipe(recipe_file).abliteration.prompts.harmless.slice == written.strip('"')


def test_a_date_is_a_name(recipe_file):
    recipe_file.write_text(SOUND.replace("name: sound", "name: 2026-01-31"))
    assert load_recipe(recipe_file).name == "2026-01-31"


@pytest.mark.parametrize("text", [":128", "64:", "-50:", "3:-3", "-9:-3"])
def test_slices_are_pythons(recipe_file, text):
    recipe = load_recipe(recipe_file, [f'abliteration.prompts.harmless.slice="{text}"'])
    assert recipe.abliteration.prompts.harmless.slice == text


def test_validation_prompts_can_have_sources_of_their_own(recipe_file):
    value = "{harmful: {path: a.jsonl}, harmless: {path: b.jsonl}}"
    recipe = load_recipe(recipe_file, [f"abliteration.prompts.validation={value}"])
    assert recipe.abliteration.prompts.validation.harmless.path == "b.jsonl"


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("abliteration.edit.strength=0.5", lambda r: r.abliteration.edit.strength == 0.5),
        ("abliteration.edit.strength=5e-1", lambda r: r.abliteration.edit.strength == 0.5),
        ("train.anchors.0.weight=2.5", lambda r: r.train.anchors[0].weight == 2.5),
        ("train.anchors[1].weight=2.5", lambda r: r.train.anchors[1].weight == 2.5),
        ("train.trainer.max_steps=7", lambda r: r.train.trainer["max_steps"] == 7),
        ("train.trainer.beta=0.3", lambda r: r.train.trainer["learning_rate"] == 5e-7),
        ("train.adapter=null", lambda r: r.train.adapter is None),
        ("train.adapter.r=8", lambda r: r.train.adapter == {"r": 8, "lora_alpha": 32}),
        ("tracking.entity=me", lambda r: r.tracking.entity == "me"),
        ("release.language=[en, de]", lambda r: r.release.language == ("en", "de")),
        ("model.revision=", lambda r: r.model.revision is None),
        ("output_dir=a=b", lambda r: r.output_dir == "a=b"),
        (
            "abliteration.selection={name: fixed, layer: 3, position: -2}",
            lambda r: r.abliteration.selection.layer == 3,
        ),
        (
            "eval.accept.pooled.recovery.value.min=0.8",
            lambda r: r.eval.accept["pooled.recovery.value"].min == 0.8,
        ),
        (
            "eval.accept.refusal[restricted].healed.value.max=0.5",
            lambda r: r.eval.accept["refusal[restricted].healed.value"].max == 0.5,
        ),
        ("eval.accept={}", lambda r: r.eval.accept == {}),
    ],
)
def test_an_override_replaces_or_adds_one_value(recipe_file, override, read):
    assert read(load_recipe(recipe_file, [override]))


def test_an_override_of_an_absent_component_keeps_the_default_one(recipe_file):
    recipe_file.write_text(SOUND.replace("  edit: {name: orthogonalize, strength: 0.9}\n", ""))
    recipe = load_recipe(recipe_file, ["abliteration.edit.strength=0.25"])
    assert (recipe.abliteration.edit.name, recipe.abliteration.edit.strength) == (
        "orthogonalize",
        0.25,
    )


@pytest.mark.parametrize(
    ("overrides", "start", "fragments"),
    [
        (["nonsense"], "override nonsense: ", ["is not of the form key=value"]),
        (["=3"], "override =3: ", ["is not of the form key=value"]),
        (["a..b=3"], "override a..b=3: ", ["is not of the form key=value"]),
        (
            ["abliteration.edit.strength=abc"],
            "override abliteration.edit.strength=abc: abliteration.edit.strength: ",
            ['"abc" is text, but a number belongs here'],
        ),
        (
            ["abliteration.edit.strenght=2"],
            "override abliteration.edit.strenght=2: abliteration.edit.strenght: ",
            ['did you mean "strength"?'],
        ),
        (["abliteratoin.edit.strength=2"], None, ['did you mean "abliteration"?']),
        (["train.anchors.7.weight=2"], None, ["train.anchors has 2 entries", "none of them is 7"]),
        (["train.anchors.first.weight=2"], None, ["train.anchors has 2 entries"]),
        (["name.x=2"], None, ["name is a single value"]),
        (["seed=["], "override seed=[: seed: ", ["the value is not YAML"]),
        (["tracking.mode=off"], None, ["off without quotes is a boolean in YAML"]),
        (["seed=1", "seed=2"], "override seed=2: seed: ", ["overridden twice"]),
        (
            ["abliteration.selection={name: fixed, layer: 1}"],
            "override abliteration.selection={name: fixed, layer: 1}: ",
            ["abliteration.selection.position: is missing"],
        ),
        (
            ["abliteration.selection={name: fixed, layer: 1, layer: 2, position: -1}"],
            None,
            ["stands twice"],
        ),
    ],
)
def test_a_wrong_override_is_reported_as_one(recipe_file, overrides, start, fragments):
    problems = problems_of(recipe_file, overrides)
    hit = [p for p in problems if all(fragment in p for fragment in fragments)]
    assert hit, problems
    assert hit[0].startswith(start or f"override {overrides[-1]}: ")


def test_the_resolved_recipe_is_plain_data_with_every_default(recipe_file):
    plain = resolved(load_recipe(recipe_file))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["abliteration"]["batch_size"] == 32
    assert plain["release"]["language"] == ["en"]
    assert plain["eval"]["accept"]["divergence[near].healed.mean_kl"] == {"min": None, "max": 1.0}


@pytest.mark.parametrize(
    "override",
    [
        "name=sound",
        "train.trainer={learning_rate: 5.0e-7, note: '5e-7', flag: 'no', empty: '', clock: '1:20'}",
        "train.trainer={nested: {a: [1, 2.5, null, true], b: 'x: y'}, big: 1e22, date: 2026-01-31}",
        "train.adapter=null",
        "model.name_or_path='caf\u00e9 #1'",
        "abliteration.selection={name: fixed, layer: 3, position: -2}",
        "abliteration.prompts.validation={harmful: {path: a.txt}, harmless: {dataset: b/c}}",
    ],
)
def test_a_dumped_recipe_loads_to_an_equal_one(recipe_file, tmp_path, override):
    recipe = load_recipe(recipe_file, [override])
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert dump(load_recipe(again)) == dump(recipe)
    # Tools with plain PyYAML must read the same.
    assert yaml.safe_load(dump(recipe)) == resolved(recipe)


def test_problems_of_the_stages_get_their_file_and_line(recipe_file):
    problems = placed(
        ["train.trainer.loss_type: x", "train.adapter.r: y"], recipe_file, ["train.adapter.r=3"]
    )
    line = line_of(SOUND, "loss_type")
    assert problems == [
        f"{recipe_file}:{line}: train.trainer.loss_type: x",
        "override train.adapter.r=3: train.adapter.r: y",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_fits_the_schema_for_editors(path):
    recipe = load_recipe(path)
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(text))
    jsonschema.Draft202012Validator(json_schema()).validate(resolved(recipe))


def test_recipes_are_shipped():
    assert {"patient", "daredevil-8b"} <= {path.stem for path in RECIPES}


def test_the_schema_file_is_what_the_code_says():
    written = (ROOT / "recipes" / "schema.json").read_text()
    assert json.loads(written) == json_schema(), "run python -m common.recipe > recipes/schema.json"


def test_the_schema_describes_every_key_and_allows_no_other():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, section in {**schema["$defs"], "Recipe": schema}.items():
        # Beside its name a sampler or pruner takes Optuna's own arguments, checked against Optuna.
        assert section["additionalProperties"] is (name in ("Sampler", "Pruner")), name
        for key, value in section["properties"].items():
            target = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert value.get("description") or target.get("description"), f"{name}.{key}"


def test_the_schema_refuses_what_the_recipe_refuses(recipe_file):
    recipe_file.write_text(SOUND.replace("strength: 0.9", "strenght: 0.9"))
    problems_of(recipe_file)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(recipe_file.read_text()), json_schema())


def test_components_are_named_as_their_models_say():
    for kind, models in COMPONENTS.items():
        for name, model in models.items():
            schema = model.model_json_schema()
            assert schema["properties"]["name"]["const"] == name, kind


def test_a_recipe_can_be_checked_as_data(recipe_file):
    recipe = load_recipe(recipe_file)
    assert Recipe.model_validate(resolved(recipe)) == recipe


def test_a_recipe_is_checked_without_any_heavy_library(recipe_file):
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "accelerate", "wandb", "numpy"]
    code = (
        "import sys; from pathlib import Path; from common.recipe import load_recipe;"
        f"load_recipe(Path({str(recipe_file)!r}));"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
