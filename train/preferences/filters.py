"""The one form of a preference pair, and the filters that every pair passes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.overlap import normalize
from common.recipe import Filters
from common.refusal import is_refusal

Message = dict[str, str]
Turns = tuple[tuple[str, str], ...]

# Counts that are no part of the sum over all pairs: of the kept ones, how many were exchanged, and how often
# they are drawn.
OF_KEPT = ("swapped", "drawn")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as chat messages.

    Attributes:
        prompt: the conversation up to a user turn.
        chosen: the better answer's text.
        rejected: the worse answer's text.
        source: where it came from.
        domain: a tag, for counts and weights.
    """

    prompt: Turns
    chosen: str
    rejected: str
    source: str
    domain: str | None = None

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.prompt[-1][1]

    def as_row(self) -> dict[str, object]:
        """The row that trl reads: conversational prompt, chosen and rejected; trl leaves the domain aside."""
        return {
            "prompt": messages(self.prompt),
            "chosen": messages([("assistant", self.chosen)]),
            "rejected": messages([("assistant", self.rejected)]),
            "domain": self.domain
            or "",  # never null: a column's type must not change within the file
        }


def messages(turns: Iterable[tuple[str, str]]) -> list[Message]:
    """Turns in the form that chat templates read."""
    return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True)
class Judge:
    """Who says whether an answer refuses.

    Attributes:
        reason: to drop a pair whose chosen answer does, as it is counted.
        refuses: of a prompt and an answer to it.
    """

    reason: str
    refuses: Callable[[Turns, str], bool]


BY_WORDS = Judge("chosen refuses", lambda _prompt, answer: is_refusal(answer))


def filter_pairs(
    pairs: Iterable[Pair],
    excluded: frozenset[str],
    settings: Filters | None = None,
    *,
    is_overlong: Callable[[Pair], bool] = lambda _pair: False,
    judge: Judge | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Keep the pairs that teach something and nothing that must not be taught.

    A refusal in `chosen` would teach the model to refuse again; one in `rejected` alone is kept, since it pushes
    away from refusing.

    Args:
        pairs: from one source.
        excluded: normalized questions of the benchmarks: training on them would make their scores worthless.
        settings: which filters are on; the recipe's defaults if not given.
        is_overlong: of a pair, see `fills`.
        judge: of refusals; by their words, unless the settings leave that out.

    Returns:
        The kept pairs, and how many were dropped for which reason, and kept; of the kept ones, how many have
        their answers exchanged.
    """
    settings = settings or Filters()
    judge = judge or (BY_WORDS if settings.refusals else None)
    kept: list[Pair] = []
    counts: Counter[str] = Counter()
    seen: set[Pair] = set()
    for found in pairs:
        pair = _swapped(found, judge) if settings.swap and judge is not None else found
        reason = next(_reasons_to_drop(pair, excluded, settings, is_overlong, judge), None)
        if reason is None and settings.duplicates:
            key = replace(pair, source="", domain=None)
            reason = "duplicate" if key in seen else None
            seen.add(key)
        counts[reason or "kept"] += 1
        if reason is None:
            kept.append(pair)
            counts["swapped"] += pair is not found
    return kept, dict(+counts)  # without what was never counted


def _swapped(pair: Pair, judge: Judge) -> Pair:
    """The pair with its answers exchanged, where that leaves a compliant answer over a refusal."""
    complies = bool(pair.rejected.strip()) and not is_refusal(pair.rejected)
    if complies and judge.refuses(pair.prompt, pair.chosen):
        # If the judge calls both refusals, the pair is dropped all the same.
        return replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    return pair


def _reasons_to_drop(
    pair: Pair,
    excluded: frozenset[str],
    settings: Filters,
    is_overlong: Callable[[Pair], bool],
    judge: Judge | None,
) -> Iterator[str]:
    if not pair.chosen.strip():
        yield "chosen is empty"
    if settings.identical and pair.chosen.strip() == pair.rejected.strip():
        yield "chosen equals rejected"
    if judge is not None and judge.refuses(pair.prompt, pair.chosen):
        yield judge.reason
    if normalize(pair.question) in excluded:
        yield "in a benchmark"
    if is_overlong(pair):
        yield "prompt fills max_length"


def fills(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Callable[[Pair], bool]:
    """Whether the prompt of a pair alone fills a row, so that nothing of the answers would be read.

    Trl drops such pairs without a word. As there, a prompt ends where its tokens and those of prompt and answer
    part, which can be before its own end.

    Args:
        tokenizer: with a chat template.
        max_length: tokens of a row; None for no limit.
    """

    def ids(turns: Turns, *, opening: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            messages(turns), tokenize=True, return_dict=True, add_generation_prompt=opening
        )
        found: list[int] = encoded["input_ids"]
        return found

    def is_overlong(pair: Pair) -> bool:
        if max_length is None:
            return False
        prompt = ids(pair.prompt, opening=True)
        if len(prompt) < max_length:
            return False
        rows = [
            ids((*pair.prompt, ("assistant", answer)), opening=False)
            for answer in (pair.chosen, pair.rejected)
        ]
        return all(row[:max_length] == prompt[:max_length] for row in rows)

    return is_overlong


def describe_counts(counts: Mapping[str, int]) -> str:
    """Counts in words, the kept ones first."""
    of_kept = [f"{counts[name]} {name}" for name in OF_KEPT if name in counts]
    kept = f"{counts.get('kept', 0)} kept" + (f" ({', '.join(of_kept)})" if of_kept else "")
    dropped = sorted(set(counts) - {"kept", *OF_KEPT})
    return ", ".join([kept, *(f"{counts[reason]} dropped: {reason}" for reason in dropped)])
