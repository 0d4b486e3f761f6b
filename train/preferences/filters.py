"""The one form of a preference pair, and the filters that every pair passes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.overlap import normalize
from common.refusal import is_refusal

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as chat messages.

    Attributes:
        prompt: the conversation up to a user turn.
        chosen: the better answer's text.
        rejected: the worse answer's text.
        source: where it came from.
    """

    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    source: str

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.prompt[-1][1]

    def as_row(self) -> dict[str, object]:
        """The row that trl reads: conversational prompt, chosen and rejected."""
        return {
            "prompt": [{"role": role, "content": content} for role, content in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }


def filter_pairs(
    pairs: Iterable[Pair], excluded: frozenset[str]
) -> tuple[list[Pair], dict[str, int]]:
    """Keep the pairs that teach something and nothing that must not be taught.

    A refusal in `chosen` would teach the model to refuse again; one in `rejected` alone is kept, since it pushes
    away from refusing.

    Args:
        pairs: from one source.
        excluded: normalized questions of the benchmarks: training on them would make their scores worthless.

    Returns:
        The kept pairs, and how many were dropped for which reason, and kept.
    """
    kept: list[Pair] = []
    counts: Counter[str] = Counter()
    seen: set[tuple[object, ...]] = set()
    for pair in pairs:
        reason = _reason_to_drop(pair, excluded, seen)
        counts[reason or "kept"] += 1
        if reason is None:
            kept.append(pair)
    return kept, dict(counts)


def _reason_to_drop(
    pair: Pair, excluded: frozenset[str], seen: set[tuple[object, ...]]
) -> str | None:
    if not pair.chosen.strip():
        return "chosen is empty"
    if pair.chosen.strip() == pair.rejected.strip():
        return "chosen equals rejected"
    if is_refusal(pair.chosen):
        return "chosen refuses"
    if normalize(pair.question) in excluded:
        return "in a benchmark"
    key = (pair.prompt, pair.chosen, pair.rejected)
    if key in seen:
        return "duplicate"
    seen.add(key)
    return None


def describe_counts(counts: dict[str, int]) -> str:
    """Counts in words, the kept ones first."""
    others: Sequence[str] = sorted(reason for reason in counts if reason != "kept")
    return ", ".join(
        [
            f"{counts.get('kept', 0)} kept",
            *(f"{counts[reason]} dropped: {reason}" for reason in others),
        ]
    )
