"""Scores in the form the hub's leaderboards read, for tasks whose data set is registered there as a benchmark.

Source: https://huggingface.co/docs/hub/eval-results. A score is entered under such a name only where the task asks the
very items of the benchmark, all of them, as its name says; everything else stands in the card's model-index alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from common import artifacts

FOLDER = ".eval_results"


@dataclass(frozen=True)
class Board:
    """A registered benchmark.

    Attributes:
        dataset: its data set on the hub.
        task: its task there.
        num_items: how many items a whole run has.
    """

    dataset: str
    task: str
    num_items: int


# By the name of the task in lm-eval.
BOARDS = {
    "gsm8k": Board("openai/gsm8k", "gsm8k", 1319),
    "gsm8k_cot": Board("openai/gsm8k", "gsm8k", 1319),
    "mmlu_pro": Board("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032),
    "leaderboard_mmlu_pro": Board("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032),
    "gpqa_diamond_zeroshot": Board("Idavidrein/gpqa", "gpqa_diamond", 198),
    "gpqa_diamond_n_shot": Board("Idavidrein/gpqa", "gpqa_diamond", 198),
    "gpqa_diamond_cot_zeroshot": Board("Idavidrein/gpqa", "gpqa_diamond", 198),
    "leaderboard_gpqa_diamond": Board("Idavidrein/gpqa", "gpqa_diamond", 198),
}


def write_leaderboards(results: Mapping[str, Any], folder: Path) -> None:
    """Write one file per registered benchmark that was measured whole; no folder where there is none."""
    for row in results["benchmarks"]:
        board = BOARDS.get(row["name"])
        if board is None or row["n"] != board.num_items:
            continue
        (folder / FOLDER).mkdir(exist_ok=True)
        entries = eval_result_entries_to_yaml([_entry(board, row)])
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
        artifacts.write_text(folder / FOLDER / f"{row['name']}.yaml", text)


def _entry(board: Board, row: Mapping[str, Any]) -> EvalResultEntry:
    healed = row["healed"]
    low, high = (100 * healed[key] for key in ("low", "high"))
    shots = "" if row.get("num_fewshot") is None else f"{row['num_fewshot']}-shot, "
    return EvalResultEntry(
        dataset_id=board.dataset,
        task_id=board.task,
        value=round(100 * healed["value"], 2),
        notes=f"lm-eval {row['name']} ({row['metric']}), {shots}n = {row['n']}, 95 % interval "
        f"[{low:.2f}, {high:.2f}], chat template, greedy",
    )
