"""What the two teachers contribute before training: preference pairs and anchor rows.

Each piece is a file on the shelf (`train.shelf`), made once by the model it needs; after a kill, and in the next
training, the pieces that are there are kept. One model is in memory at a time: first the original, then the abliterated
one; and the original once more, where it is to judge what the abliterated one made.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from transformers import PreTrainedModel

from common import distributed
from common.edits import Edit, load_edit
from common.errors import StageError
from common.model import load_model, resolve
from common.questions import load_questions
from common.recipe import Anchor, Recipe
from common.refusal import is_refusal
from train import pairs
from train.anchors import Lessons, TeacherRow
from train.damage import DamageAwareMix
from train.launch import with_whole_models
from train.preferences.filters import Pair
from train.shelf import TEACHERS, Answers, Piece, Shelf, Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """Everything training reads.

    Attributes:
        pairs: of all sources, filtered.
        anchors: the rows of each anchor, in the recipe's order.
        refused: of each anchor, how many prompts were left out because its teacher refuses them.
        lessons: where they come from.
        counts: per source, how many pairs were kept or dropped for which reason.
        domains: how many pairs there are of each domain, where sources name any.
        refusal_limit: what the filter by the direction was calibrated to, where it is on.
    """

    pairs: list[Pair]
    anchors: list[list[TeacherRow]]
    refused: list[int]
    lessons: list[Lessons]
    counts: dict[str, dict[str, int]]
    domains: dict[str, int]
    refusal_limit: dict[str, float] | None = None


def prepare(
    recipe: Recipe,
    shelf: Shelf,
    upstream: Mapping[str, Path],
    excluded: frozenset[str],
    more: Sequence[Piece] = (),
    by_damage: DamageAwareMix | None = None,
) -> Material:
    """Make what is missing, and read everything.

    Args:
        recipe: its `train` section.
        shelf: of what the models say.
        upstream: the folder of stage one.
        excluded: normalized questions of the benchmarks.
        more: files that the models make as well, for others to read.
        by_damage: draws pairs and anchors, where the recipe has `train.mix`.

    Raises:
        StageError: if the filters leave no pair, or an anchor no prompt.
    """
    screen = pairs.Screen(recipe, shelf, upstream["abliteration"], excluded)
    edit = load_edit(upstream["abliteration"] / "edit.safetensors")
    lessons = [_lessons(anchor, shelf, edit) for anchor in recipe.train.anchors]
    pieces = [*screen.pieces(), *(piece for own in lessons for piece in own.pieces), *more]
    pieces += by_damage.pieces if by_damage is not None else []
    _make_missing(pieces, recipe, upstream)
    found, counts = pairs.mix(recipe, screen, by_damage)
    taught = [
        _taught(index, anchor, own, by_damage)
        for index, (anchor, own) in enumerate(zip(recipe.train.anchors, lessons, strict=True))
    ]
    anchors, refused = [rows for rows, _ in taught], [number for _, number in taught]
    domains = Counter(pair.domain for pair in found if pair.domain is not None)
    limit = screen.limit().as_data() if recipe.train.filters.direction else None
    by_domain = dict(sorted(domains.items()))
    return Material(found, anchors, refused, lessons, counts, by_domain, limit)


def _lessons(anchor: Anchor, shelf: Shelf, edit: Edit) -> Lessons:
    questions, term = load_questions(anchor.prompts), anchor.residual
    return Lessons(
        Answers(
            shelf,
            anchor.to,
            [question.prompt for question in questions],
            max_new_tokens=anchor.max_new_tokens,
            # Scoring needs logits of whole answers: smaller batches than generation.
            batch_size=4 * anchor.batch_size,
        ),
        anchor.top_k,
        *(() if term is None else (term.size, edit)),
    )


def _taught(
    index: int, anchor: Anchor, own: Lessons, by_damage: DamageAwareMix | None
) -> tuple[list[TeacherRow], int]:
    """An anchor's rows, and how many prompts its teacher refuses and are left out: they would teach refusal again."""
    rows, domains = own.rows(), [question.domain for question in load_questions(anchor.prompts)]
    kept = [
        place
        for place, text in enumerate(own.answers.texts())
        if not (anchor.drop_refusals and is_refusal(text))
    ]
    if not kept:
        raise StageError(
            f"train.anchors[{index}]: the {anchor.to} model refuses all {len(rows)} prompts, so nothing is left to "
            "hold; name prompts that it answers, or set drop_refusals to false where its refusals are to stay"
        )
    num_refused = len(rows) - len(kept)
    rows, domains = [rows[place] for place in kept], [domains[place] for place in kept]
    if by_damage is not None and anchor.prompts.domain is not None:
        (rows,) = by_damage.draw(f"anchor {index}", [rows], [domains], [1.0])
    return rows, num_refused


def _make_missing(pieces: Sequence[Piece], recipe: Recipe, upstream: Mapping[str, Path]) -> None:
    """Load each model whose pieces are not all there, and let it make those; a piece that two ask for once."""
    by_path: dict[Path, Piece] = {}
    for piece in pieces:
        by_path.setdefault(piece.path, piece)
    missing = distributed.broadcast([not path.exists() for path in by_path])
    due = [piece for piece, is_due in zip(by_path.values(), missing, strict=True) if is_due]
    if due:
        with_whole_models(recipe, partial(_make, due, recipe, upstream))


def _make(due: Sequence[Piece], recipe: Recipe, upstream: Mapping[str, Path]) -> None:
    for is_last, teacher in product((False, True), TEACHERS):
        own = [piece for piece in due if (piece.is_last, piece.teacher) == (is_last, teacher)]
        if own:
            _make_by(_load_teacher(recipe, teacher, upstream), own)


def _make_by(model: PreTrainedModel, pieces: Sequence[Piece]) -> None:
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
