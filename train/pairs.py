"""The preference pairs of a recipe: made or read, filtered, capped and weighted."""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel
from trl import DPOConfig

from common import artifacts, distributed
from common.edits import load_edit
from common.errors import StageError
from common.prompts import describe, load_prompts
from common.recipe import OnPolicy, Recipe
from train import mixture, refusal_probe
from train.damage import DamageAwareMix
from train.preferences import dataset, on_policy
from train.preferences.filters import Judge, Pair, describe_counts, fills, filter_pairs
from train.shelf import Answers, Piece, Shelf, decoded

# Answers per forward pass that only reads the residual stream.
PROBE_BATCH = 32

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What filters and losses need and the recipe does not give, in words that begin with a dotted key."""
    problems = []
    if recipe.train.filters.direction and recipe.abliteration.selection.name == "fixed":
        problems.append(
            "train.filters.direction: needs the original's answers of stage 1, which abliteration.selection fixed does "
            "not ask for; write selection: {name: scores}, or set it to false"
        )
    losses = recipe.train.trainer.get("loss_type", ["sigmoid"])
    comparing = sorted(({losses} if isinstance(losses, str) else set(map(str, losses))) - {"sft"})
    for index, source in enumerate(recipe.train.preferences):
        if comparing and not source.has_rejected:
            problems.append(
                f"train.preferences[{index}].columns.rejected: is null, and {', '.join(comparing)} compares two "
                "answers; write train.trainer.loss_type: [sft], or name the column of the worse answer"
            )
    return problems


class OwnAnswers:
    """What the models say to the prompts of an `on_policy` source: see `train.shelf`."""

    def __init__(self, source: OnPolicy, shelf: Shelf, seed: int) -> None:
        """Name the files.

        Args:
            source: prompts and sampling settings.
            shelf: where they lie.
            seed: of the samples.
        """
        self.source, self.shelf, self.seed = source, shelf, seed
        self.chosen = Answers(
            shelf,
            "original",
            load_prompts(source.prompts),
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
        )
        names = {"num_candidates", "temperature", "top_p"}
        sampling = source.model_dump(mode="json", include=names)
        # Greedy answers have no seed.
        depends = self.chosen.depends | sampling | {"seed": seed if source.temperature else None}
        self._candidates = shelf.path("candidates", "abliterated", depends, ".jsonl")
        judged = {"candidates": self._candidates.name, "max_new_tokens": source.max_new_tokens}
        self._scores = shelf.path("scores", "original", judged, ".jsonl")
        self.pieces = [
            self.chosen.piece,
            Piece(self._candidates, "abliterated", self._sample),
        ]
        if source.num_candidates > 1:
            self.pieces.append(Piece(self._scores, "original", self._score, is_last=True))

    def candidates(self) -> list[list[str]]:
        """The texts of the candidates of every prompt."""
        rows = artifacts.read_jsonl(self._candidates)
        return [decoded(self.shelf.tokenizer, row["tokens"]) for row in rows]

    def scores(self) -> list[list[float]]:
        """Their scores; a single candidate is the worst without one."""
        if self.source.num_candidates == 1:
            return [[0.0]] * len(self.chosen.prompts)
        return [row["scores"] for row in artifacts.read_jsonl(self._scores)]

    def _sample(self, model: PreTrainedModel) -> None:
        candidates = on_policy.sample(model, self.shelf.tokenizer, self.source, self.seed)
        self._write(self._candidates, "tokens", candidates)

    def _score(self, model: PreTrainedModel) -> None:
        candidates = [row["tokens"] for row in artifacts.read_jsonl(self._candidates)]
        scores = on_policy.score(model, self.shelf.tokenizer, self.source, candidates)
        self._write(self._scores, "scores", scores)

    def _write(self, path: Path, name: str, values: Sequence[object]) -> None:
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_jsonl(path, [{name: value} for value in values])


class Screen:
    """The pairs of each source, and the filters before them."""

    def __init__(
        self,
        recipe: Recipe,
        shelf: Shelf,
        ablated: Path,
        excluded: frozenset[str],
    ) -> None:
        """Take what the filters depend on.

        Args:
            recipe: its `train` section.
            shelf: of what the models say.
            ablated: folder of stage one.
            excluded: normalized questions of the benchmarks.
        """
        self.settings, self.sources = recipe.train.filters, recipe.train.preferences
        self.ablated, self.excluded, self.tokenizer = ablated, excluded, shelf.tokenizer
        self.own_answers = {
            index: OwnAnswers(source, shelf, recipe.seed)
            for index, source in enumerate(self.sources)
            if isinstance(source, OnPolicy)
        }
        self._shelf, self._max_length = shelf, _row_length(recipe)
        self._is_overlong = fills(shelf.tokenizer, self._max_length)
        self._by_source: dict[int, tuple[list[Pair], dict[str, int]]] = {}

    def pairs(self, index: int) -> tuple[list[Pair], dict[str, int], str]:
        """The pairs of a source that pass all filters, what became of the others, and the source's name."""
        kept, by_text = self._by_text(index)
        counts, source = dict(by_text), self.sources[index]
        if self.settings.direction:
            kept, judged = filter_pairs(kept, frozenset(), self.settings, judge=self._judge(index))
            swapped = counts.pop("swapped", 0) + judged.pop("swapped", 0)
            counts = {**counts, **judged} | ({"swapped": swapped} if swapped else {})
            counts["kept"] = len(kept)
        name = source.name if isinstance(source, OnPolicy) else describe(source)
        return kept, counts, f"{index}: {name}"

    def limit(self) -> refusal_probe.Limit:
        """What the filter by the direction was calibrated to."""
        return refusal_probe.Limit(**json.loads(self.path.read_text(encoding="utf-8"))["limit"])

    def make(self, model: PreTrainedModel) -> None:
        """Calibrate the filter by the direction, and score the answers that the others leave."""
        limit = refusal_probe.find_limit(model, self.tokenizer, self.ablated, PROBE_BATCH)
        edit = load_edit(self.ablated / "edit.safetensors")
        scores = [
            refusal_probe.project(model, self.tokenizer, edit, self._answered(index), PROBE_BATCH)
            for index in range(len(self.sources))
        ]
        if distributed.is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(self.path, {"limit": limit.as_data(), "scores": scores})
            logger.info(
                "train: answers above %.3g along the removed direction count as refusals (balanced accuracy %.3f on "
                "the original's %d refusals and %d other answers)",
                limit.threshold,
                limit.balanced_accuracy,
                limit.num_refused,
                limit.num_answered,
            )

    def pieces(self) -> list[Piece]:
        """The files that the models make for the pairs."""
        pieces = [piece for own in self.own_answers.values() for piece in own.pieces]
        if self.settings.direction:  # behind the scores, which decide what is rejected
            pieces.append(Piece(self.path, "original", self.make, is_last=True))
        return pieces

    @cached_property
    def path(self) -> Path:
        """Where the filter by the direction keeps its limit and scores."""
        files = [self.ablated / name for name in ("edit.safetensors", "baseline.jsonl")]
        depends = {
            "stage one": artifacts.hash_files([file for file in files if file.is_file()]),
            "filters": self.settings.model_dump(mode="json"),
            "max_length": self._max_length,
            "sources": [
                on_policy.inputs(source, self.excluded)
                if isinstance(source, OnPolicy)
                else dataset.inputs(source, self.excluded)
                for source in self.sources
            ],
            "answers": [
                piece.path.name for own in self.own_answers.values() for piece in own.pieces
            ],
        }
        return self._shelf.path("refusal-probe", "original", depends, ".json")

    def _judge(self, index: int) -> Judge:
        found = json.loads(self.path.read_text(encoding="utf-8"))["scores"][index]
        scores = dict(zip(self._answered(index), found, strict=True))
        return refusal_probe.judge(scores, self.limit())

    def _answered(self, index: int) -> list[refusal_probe.Answered]:
        """The answers to be judged: chosen, and beside them the rejected ones where they could take their place."""
        kept, _ = self._by_text(index)
        chosen = [(pair.prompt, pair.chosen) for pair in kept]
        rejected = [(pair.prompt, pair.rejected) for pair in kept if pair.rejected.strip()]
        return list(dict.fromkeys(chosen + (rejected if self.settings.swap else [])))

    def _by_text(self, index: int) -> tuple[list[Pair], dict[str, int]]:
        """What all filters but the one by the direction leave of a source."""
        if index not in self._by_source:
            found, unpaired = self._found(index)
            kept, counts = filter_pairs(
                found, self.excluded, self.settings, is_overlong=self._is_overlong
            )
            self._by_source[index] = kept, {**unpaired, **counts}
        return self._by_source[index]

    def _found(self, index: int) -> tuple[list[Pair], dict[str, int]]:
        source = self.sources[index]
        if not isinstance(source, OnPolicy):
            return dataset.load(source)
        own = self.own_answers[index]
        return on_policy.pair(
            on_policy.questions(source), own.chosen.texts(), own.candidates(), own.scores()
        )


def _row_length(recipe: Recipe) -> int | None:
    """The tokens of a row, behind which trl reads nothing; None where it cuts at the front, or not at all."""
    trainer, default = recipe.train.trainer, DPOConfig.__dataclass_fields__
    length = trainer.get("max_length", default["max_length"].default)
    mode = trainer.get("truncation_mode", default["truncation_mode"].default)
    return int(length) if length is not None and mode == "keep_start" else None


def mix(
    recipe: Recipe, screen: Screen, by_damage: DamageAwareMix | None = None
) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """The pairs of all sources, filtered, capped and weighted: by source, and by damage where that is asked for."""
    groups: list[list[Pair]] = []
    counts: dict[str, dict[str, int]] = {}
    for index, source in enumerate(recipe.train.preferences):
        kept, count, name = screen.pairs(index)
        group = mixture.cap(kept, source.cap, f"{recipe.seed} cap {index}")
        if len(group) < len(kept):
            count |= {"kept": len(group), "above the cap": len(kept) - len(group)}
        groups.append(group)
        counts[name] = count
    weights = [source.weight for source in recipe.train.preferences]
    if by_damage is None:
        drawn = mixture.draw(groups, weights, recipe.seed)
    else:
        domains = [[pair.domain for pair in group] for group in groups]
        drawn = by_damage.draw("pairs", groups, domains, weights)
    for count, group in zip(counts.values(), drawn, strict=True):
        if len(set(weights)) > 1 or by_damage is not None:
            count["drawn"] = len(group)
    if distributed.is_main():
        for name, count in counts.items():
            logger.info("train: pairs of source %s: %s", name, describe_counts(count))
    if not any(drawn):
        raise StageError(
            "train: the filters left no preference pair ("
            + "; ".join(f"{name}: {describe_counts(count)}" for name, count in counts.items())
            + "); give prompts on which the edit changes the answer, or other data"
        )
    return [pair for group in drawn for pair in group], counts
