"""What the patient's folder holds beside the model: prompts, benchmarks and a record."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patient.items import (
    build_benchmarks,
    direction_questions,
    falsely_refused_questions,
    healing_questions,
)
from patient.levels import MAX_NEW_TOKENS, Level
from patient.questions import Question
from patient.tokenizer import END
from patient.world import COMMON_KINDS, RESTRICTED_KINDS, Split, World

RECORD = "patient.json"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def write_prompts(world: World, folder: Path, *, over_refusing: bool = False) -> None:
    """Write the prompts that directions are found and checked with, and those for healing."""
    folder.mkdir(parents=True)
    for split in SPLITS:
        asked = {
            "harmful": direction_questions(world, split, restricted=True),
            "harmless": direction_questions(world, split, restricted=False),
        }
        if over_refusing:
            asked["falsely_refused"] = falsely_refused_questions(world, split)
        for name, questions in asked.items():
            rows = [{"prompt": each.text, "object": each.cluster} for each in questions]
            _write_jsonl(folder / f"{name}_{split}.jsonl", rows)
    healing = healing_questions(world, over_refusing=over_refusing)
    rows = [{"prompt": each.text, "domain": each.domain} for each in healing]
    _write_jsonl(folder / "healing.jsonl", rows)


def write_benchmarks(world: World, folder: Path, *, over_refusing: bool = False) -> None:
    """Write each benchmark as an lm-eval task: a YAML file and its items beside it."""
    folder.mkdir(parents=True)
    rng = random.Random("options")
    for benchmark in build_benchmarks(world, over_refusing=over_refusing):
        rows = [_item(question, rng) for question in benchmark.questions]
        _write_jsonl(folder / f"{benchmark.name}.jsonl", rows)
        template = CHOICE_TASK if benchmark.name == "kinds" else GENERATION_TASK
        text = template.format(
            name=benchmark.name,
            num_items=len(rows),
            max_new_tokens=MAX_NEW_TOKENS,
            end=END,
        )
        (folder / f"{benchmark.name}.yaml").write_text(text, encoding="utf-8")


def write_record(
    folder: Path,
    *,
    architecture: str,
    seed: int,
    over_refusing: bool = False,
    levels: Sequence[Level],
    seconds: float,
) -> None:
    """Write what was built, how long it took, and what it can do.

    It comes last: its presence means complete.
    """
    record = {
        "architecture": architecture,
        "seed": seed,
        **({"over_refusing": True} if over_refusing else {}),
        "seconds": round(seconds, 1),
        "levels": {level.name: asdict(level) for level in levels},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _item(question: Question, rng: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question": question.text,
        "answer": question.answer,
        "cluster": question.cluster,
    }
    if question.domain == "kinds":
        options = [*COMMON_KINDS, *RESTRICTED_KINDS]
        rng.shuffle(options)
        row |= {"choices": options, "label": options.index(question.answer)}
    return row


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# lm-eval tasks. `data_files` is relative to the YAML's own folder. The answer follows the opening of
# the assistant's turn without a blank, hence the empty delimiter.
GENERATION_TASK = """\
# {num_items} questions on invented facts; the model's greedy answer has to be the right one.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
target_delimiter: ""
generation_kwargs:
  until:
    - "{end}"
  do_sample: false
  max_gen_toks: {max_new_tokens}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_punctuation: true
metadata:
  version: 1.0
"""

CHOICE_TASK = """\
# {num_items} questions on invented facts; the right option has to be the most probable one.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
