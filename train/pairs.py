"""The preference pairs of a recipe: made or read, filtered, capped and weighted."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from common import artifacts, distributed
from common.edits import load_edit
from common.errors import StageError
from common.generation import generate
from common.prompts import describe, load_prompts
from common.recipe import OnPolicy, Recipe
from train import mixture, refusal_probe
from train.preferences import dataset, on_policy
from train.preferences.filters import Judge, Pair, describe_counts, fills, filter_pairs

# Answers per forward pass that only reads the residual stream.
PROBE_BATCH = 32

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What the filters need and stage one does not give, in words that begin with a dotted key."""
    if recipe.train.filters.direction and recipe.abliteration.selection.name == "fixed":
        return [
            "train.filters.direction: needs the original's answers of stage 1, which abliteration.selection fixed does "
            "not ask for; write selection: {name: scores}, or set it to false"
        ]
    return []


class AnswerFiles:
    """Where the answers of a source lie that the models make."""

    def __init__(self, work: Path, index: int) -> None:
        """Name the files of source number `index`."""
        self.chosen = work / f"answers-{index}.jsonl"
        self.candidates = work / f"candidates-{index}.jsonl"
        self.scores = work / f"scores-{index}.jsonl"

    def read_candidates(self) -> list[list[str]]:
        """The texts of the candidates of every prompt."""
        return [row["answers"] for row in artifacts.read_jsonl(self.candidates)]

    def read_scores(self, source: OnPolicy) -> list[list[float]]:
        """Their scores; a single candidate is the worst without one."""
        if source.num_candidates == 1:
            return [[0.0] for _ in artifacts.read_jsonl(self.candidates)]
        return [row["scores"] for row in artifacts.read_jsonl(self.scores)]


def answers_maker(
    source: OnPolicy, tokenizer: PreTrainedTokenizerBase, files: AnswerFiles
) -> Callable[[PreTrainedModel], None]:
    """Write the original's greedy answers."""

    def make(model: PreTrainedModel) -> None:
        ids = generate(
            model,
            tokenizer,
            load_prompts(source.prompts),
            max_new_tokens=source.max_new_tokens,
            batch_size=source.batch_size,
            description="answers of the original model",
        )
        if distributed.is_main():
            rows = [{"answer": text} for text in _texts(tokenizer, ids)]
            artifacts.write_jsonl(files.chosen, rows)

    return make


def candidates_maker(
    source: OnPolicy, tokenizer: PreTrainedTokenizerBase, files: AnswerFiles, seed: int
) -> Callable[[PreTrainedModel], None]:
    """Write the samples of the abliterated model."""

    def make(model: PreTrainedModel) -> None:
        candidates = on_policy.sample(model, tokenizer, source, seed)
        if distributed.is_main():
            rows = [{"answers": _texts(tokenizer, ids), "tokens": ids} for ids in candidates]
            artifacts.write_jsonl(files.candidates, rows)

    return make


def scores_maker(
    source: OnPolicy, tokenizer: PreTrainedTokenizerBase, files: AnswerFiles
) -> Callable[[PreTrainedModel], None]:
    """Write how likely the original finds them."""

    def make(model: PreTrainedModel) -> None:
        candidates = [row["tokens"] for row in artifacts.read_jsonl(files.candidates)]
        scores = on_policy.score(model, tokenizer, source, candidates)
        if distributed.is_main():
            artifacts.write_jsonl(files.scores, [{"scores": row} for row in scores])

    return make


def _texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]


class Screen:
    """The pairs of each source, and the filters before them."""

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        ablated: Path,
        excluded: frozenset[str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Take what the filters depend on.

        Args:
            recipe: its `train` section.
            work: folder of the pieces.
            ablated: folder of stage one.
            excluded: normalized questions of the benchmarks.
            tokenizer: of all models.
        """
        self.settings, self.sources = recipe.train.filters, recipe.train.preferences
        self.work, self.ablated, self.excluded = work, ablated, excluded
        self.tokenizer = tokenizer
        self.path = work / "refusal-probe.json"
        self._is_overlong = fills(tokenizer, _row_length(recipe))
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
            artifacts.write_json(self.path, {"limit": limit.as_data(), "scores": scores})
            logger.info(
                "train: answers above %.3g along the removed direction count as refusals (balanced accuracy %.3f on "
                "the original's %d refusals and %d other answers)",
                limit.threshold,
                limit.balanced_accuracy,
                limit.num_refused,
                limit.num_answered,
            )

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
            return dataset.load(source), {}
        files = AnswerFiles(self.work, index)
        chosen = [row["answer"] for row in artifacts.read_jsonl(files.chosen)]
        scores = files.read_scores(source)
        return on_policy.pair(on_policy.questions(source), chosen, files.read_candidates(), scores)


def _row_length(recipe: Recipe) -> int | None:
    """The tokens of a row, behind which trl reads nothing; None where it cuts at the front, or not at all."""
    trainer, default = recipe.train.trainer, DPOConfig.__dataclass_fields__
    length = trainer.get("max_length", default["max_length"].default)
    mode = trainer.get("truncation_mode", default["truncation_mode"].default)
    return int(length) if length is not None and mode == "keep_start" else None


def mix(recipe: Recipe, screen: Screen) -> tuple[list[Pair], dict[str, dict[str, int]]]:
    """The pairs of all sources, filtered, capped and weighted."""
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
    drawn = mixture.draw(groups, weights, recipe.seed)
    for count, group in zip(counts.values(), drawn, strict=True):
        if len(set(weights)) > 1:
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
