"""What the two teachers contribute before training: preference pairs and anchor rows.

Each piece is a file below the stage's work folder, made once by the model it needs; after a kill the pieces that
are there are kept. One model is in memory at a time: first the original, then the abliterated one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, distributed
from common.errors import StageError
from common.generation import generate
from common.model import load_model, load_tokenizer, resolve
from common.prompts import load_prompts
from common.recipe import Anchor, OnPolicy, Recipe
from train.anchors import TeacherRow, load_rows, save_rows, teach
from train.preferences import dataset, on_policy
from train.preferences.filters import Pair, describe_counts, filter_pairs

Teacher = Literal["original", "abliterated"]
TEACHERS: tuple[Teacher, ...] = ("original", "abliterated")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """Everything training reads.

    Attributes:
        pairs: of all sources, filtered.
        anchors: the rows of each anchor, in the recipe's order.
        counts: per source, how many pairs were kept or dropped for which reason.
    """

    pairs: list[Pair]
    anchors: list[list[TeacherRow]]
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Piece:
    """A file that one of the models makes.

    Attributes:
        path: where it lies.
        teacher: the model that makes it.
        make: writes it on the main process; called on every process.
    """

    path: Path
    teacher: Teacher
    make: Callable[[PreTrainedModel], None]


def prepare(
    recipe: Recipe, work: Path, upstream: Mapping[str, Path], excluded: frozenset[str]
) -> Material:
    """Make what is missing, and read everything.

    Args:
        recipe: its `train` section.
        work: folder for the pieces.
        upstream: the folder of stage one.
        excluded: normalized questions of the benchmarks.

    Raises:
        StageError: if the filters leave no pair.
    """
    tokenizer = load_tokenizer(upstream["abliteration"] / "model")
    pieces = _pieces(recipe, work, tokenizer)
    missing = distributed.broadcast(
        [piece.path.name for piece in pieces if not piece.path.exists()]
    )
    for teacher in TEACHERS:
        due = [piece for piece in pieces if piece.teacher == teacher and piece.path.name in missing]
        if due:
            _make(due, _load_teacher(recipe, teacher, upstream))
    pairs, counts = _read_pairs(recipe, work, excluded)
    anchors = [
        load_rows(work / f"anchor-{index}.safetensors")
        for index in range(len(recipe.train.anchors))
    ]
    return Material(pairs, anchors, counts)


def _make(pieces: Sequence[Piece], model: PreTrainedModel) -> None:
    for piece in pieces:
        piece.make(model)
        distributed.barrier()


def _load_teacher(
    recipe: Recipe, teacher: Teacher, upstream: Mapping[str, Path]
) -> PreTrainedModel:
    if teacher == "abliterated":
        return load_model(upstream["abliteration"] / "model", dtype=recipe.model.dtype)
    return load_model(
        resolve(recipe.model.name_or_path, recipe.model.revision), dtype=recipe.model.dtype
    )


def _pieces(recipe: Recipe, work: Path, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    pieces = []
    for index, source in enumerate(recipe.train.preferences):
        if isinstance(source, OnPolicy):
            for teacher in TEACHERS:
                path = _answers_path(work, teacher, index)
                pieces.append(
                    Piece(path, teacher, _answers_maker(recipe, source, tokenizer, path, teacher))
                )
    for index, anchor in enumerate(recipe.train.anchors):
        path = work / f"anchor-{index}.safetensors"
        pieces.append(Piece(path, anchor.to, _anchor_maker(anchor, tokenizer, path)))
    return pieces


def _answers_path(work: Path, teacher: Teacher, index: int) -> Path:
    return work / f"answers-{teacher}-{index}.jsonl"


def _answers_maker(
    recipe: Recipe,
    source: OnPolicy,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    teacher: Teacher,
) -> Callable[[PreTrainedModel], None]:
    def make(model: PreTrainedModel) -> None:
        prompts = load_prompts(source.prompts)
        ids = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
            temperature=0.0 if teacher == "original" else source.temperature,
            seed=recipe.seed,
            description=f"answers of the {teacher} model",
        )
        answers = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in ids]
        if distributed.is_main():
            artifacts.write_jsonl(path, [{"answer": answer} for answer in answers])

    return make


def _anchor_maker(
    anchor: Anchor, tokenizer: PreTrainedTokenizerBase, path: Path
) -> Callable[[PreTrainedModel], None]:
    def make(model: PreTrainedModel) -> None:
        # Scoring needs logits of whole answers: smaller batches than generation.
        rows = teach(
            model, tokenizer, load_prompts(anchor.prompts), anchor, batch_size=4 * anchor.batch_size
        )
        if distributed.is_main():
            save_rows(rows, path)

    return make


def _read_pairs(
    recipe: Recipe, work: Path, excluded: frozenset[str]
) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    pairs: list[Pair] = []
    counts: dict[str, dict[str, int]] = {}
    for index, source in enumerate(recipe.train.preferences):
        if isinstance(source, OnPolicy):
            chosen, rejected = (
                [row["answer"] for row in artifacts.read_jsonl(_answers_path(work, teacher, index))]
                for teacher in TEACHERS
            )
            found = on_policy.pair(load_prompts(source.prompts), chosen, rejected)
        else:
            found = dataset.load(source)
        kept, count = filter_pairs(found, excluded)
        pairs += kept
        name = f"{index}: {found[0].source}"
        counts[name] = count
        logger.info("train: pairs of source %s: %s", name, describe_counts(count))
    if not pairs:
        raise StageError(
            "train: the filters left no preference pair ("
            + "; ".join(f"{name}: {describe_counts(count)}" for name, count in counts.items())
            + "); give prompts on which the edit changes the answer, or other data"
        )
    return pairs, counts
