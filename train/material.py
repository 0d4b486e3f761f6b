"""What the two teachers contribute before training: preference pairs and anchor rows.

Each piece is a file below the stage's work folder, made once by the model it needs; after a kill the pieces that
are there are kept. One model is in memory at a time: first the original, then the abliterated one; and the original
once more, where it is to judge what the abliterated one made.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import distributed
from common.model import load_model, load_tokenizer, resolve
from common.prompts import load_prompts
from common.recipe import Anchor, OnPolicy, Recipe
from train import pairs
from train.anchors import TeacherRow, load_rows, save_rows, teach
from train.preferences.filters import Pair

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
        domains: how many pairs there are of each domain, where sources name any.
        refusal_limit: what the filter by the direction was calibrated to, where it is on.
    """

    pairs: list[Pair]
    anchors: list[list[TeacherRow]]
    counts: dict[str, dict[str, int]]
    domains: dict[str, int]
    refusal_limit: dict[str, float] | None = None


@dataclass(frozen=True)
class Piece:
    """A file that one of the models makes.

    Attributes:
        path: where it lies.
        teacher: the model that makes it.
        make: writes it on the main process; called on every process.
        is_last: made when all others are there, which it reads.
    """

    path: Path
    teacher: Teacher
    make: Callable[[PreTrainedModel], None]
    is_last: bool = False


def prepare(
    recipe: Recipe,
    work: Path,
    upstream: Mapping[str, Path],
    excluded: frozenset[str],
    more: Sequence[Piece] = (),
) -> Material:
    """Make what is missing, and read everything.

    Args:
        recipe: its `train` section.
        work: folder for the pieces.
        upstream: the folder of stage one.
        excluded: normalized questions of the benchmarks.
        more: files that the models make as well, for others to read.

    Raises:
        StageError: if the filters leave no pair.
    """
    tokenizer = load_tokenizer(upstream["abliteration"] / "model")
    screen = pairs.Screen(recipe, work, upstream["abliteration"], excluded, tokenizer)
    pieces = [*_pieces(recipe, work, tokenizer, screen), *more]
    missing = distributed.broadcast(
        [piece.path.name for piece in pieces if not piece.path.exists()]
    )
    for is_last, teacher in product((False, True), TEACHERS):
        due = [
            piece
            for piece in pieces
            if piece.teacher == teacher and piece.is_last == is_last and piece.path.name in missing
        ]
        if due:
            _make(due, _load_teacher(recipe, teacher, upstream))
    found, counts = pairs.mix(recipe, screen)
    anchors = [
        load_rows(work / f"anchor-{index}.safetensors")
        for index in range(len(recipe.train.anchors))
    ]
    domains = Counter(pair.domain for pair in found if pair.domain is not None)
    limit = screen.limit().as_data() if recipe.train.filters.direction else None
    return Material(found, anchors, counts, dict(sorted(domains.items())), limit)


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


def _pieces(
    recipe: Recipe, work: Path, tokenizer: PreTrainedTokenizerBase, screen: pairs.Screen
) -> list[Piece]:
    pieces = []
    for index, source in enumerate(recipe.train.preferences):
        if isinstance(source, OnPolicy):
            files = pairs.AnswerFiles(work, index)
            pieces += [
                Piece(files.chosen, "original", pairs.answers_maker(source, tokenizer, files)),
                Piece(
                    files.candidates,
                    "abliterated",
                    pairs.candidates_maker(source, tokenizer, files, recipe.seed),
                ),
            ]
            if source.num_candidates > 1:
                make = pairs.scores_maker(source, tokenizer, files)
                pieces.append(Piece(files.scores, "original", make, is_last=True))
    for index, anchor in enumerate(recipe.train.anchors):
        path = work / f"anchor-{index}.safetensors"
        pieces.append(Piece(path, anchor.to, _anchor_maker(anchor, tokenizer, path)))
    if recipe.train.filters.direction:  # behind the scores, which decide what is rejected
        pieces.append(Piece(screen.path, "original", screen.make, is_last=True))
    return pieces


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
