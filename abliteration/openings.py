"""How this model's refusals begin: the shortest openings that its other answers do not share.

Published tools hold hand-picked refusal tokens or phrases per family. Here they are learnt from what the unedited
model itself answers (`abliteration.baseline`).
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from abliteration.baseline import Answer
from common.errors import StageError

# No opening is longer: what differs only behind so many tokens is no way to begin.
MAX_TOKENS = 6
# An opening counts from this share of the refusals on; and so many are kept, the commonest first.
MIN_SHARE = 0.02
MAX_OPENINGS = 8
# The share of the other answers, of all of them, that may begin with it too.
MAX_OTHERS = 0.02


def refusal_openings(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    """The token sequences that refusals begin with and other answers do not.

    No opening begins with another one, so their probabilities can be added.

    Args:
        answers: of the unedited model, to harmful and harmless prompts.

    Returns:
        Commonest first.

    Raises:
        StageError: if the refusals begin as the other answers do.
    """
    refusals = [answer.tokens for answer in answers if answer.refused and answer.tokens]
    others = [answer.tokens for answer in answers if not answer.refused]
    found: Counter[tuple[int, ...]] = Counter()
    for tokens in refusals:
        opening = _distinct(tokens, others)
        if opening is not None:
            found[opening] += 1
    kept = [o for o, count in found.most_common(MAX_OPENINGS) if count >= MIN_SHARE * len(refusals)]
    if not kept:
        raise StageError(
            f"abliteration: the first {MAX_TOKENS} tokens of this model's refusals do not differ from those of its "
            "other answers, so a search has nothing to score by; write selection: {name: fixed, layer: ..., "
            "position: ...}"
        )
    return kept


def refusal_log_odds(logps: Sequence[Sequence[Tensor]]) -> Tensor:
    """log(P / (1 - P)), P the probability that an answer begins with any of the openings.

    Args:
        logps: for each prompt, for each opening, the log-probabilities of its tokens [tokens].

    Returns:
        [prompts] in float64; above 0 the model is more likely to refuse than not.
    """
    summed = torch.stack([torch.stack([part.double().sum() for part in row]) for row in logps])
    probability = summed.exp().sum(dim=-1).clamp(1e-8, 1 - 1e-8)
    return torch.log(probability) - torch.log1p(-probability)


def _distinct(tokens: Sequence[int], others: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """The shortest opening that hardly any other answer shares."""
    for length in range(1, min(MAX_TOKENS, len(tokens)) + 1):
        opening = tuple(tokens[:length])
        shared = sum(tuple(other[:length]) == opening for other in others)
        if shared <= MAX_OTHERS * len(others):
            return opening
    return None
