"""What the unedited model answers, and the opening tokens of its own refusals.

Published tools hold hand-picked refusal tokens per family. Here they are learnt from the model: the tokens its
refusals begin with and its other answers do not.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import StageError
from common.generation import generate
from common.refusal import is_refusal

ANSWER_TOKENS = 48
# A token counts as an opening of refusals from this share of them on...
MIN_SHARE = 0.02
# ...and if it opens refusals at least this many times as often as other answers.
MIN_RATIO = 4.0


@dataclass(frozen=True)
class Answer:
    """One answer of the unedited model.

    Attributes:
        prompt: the user's turn.
        answer: the opening of the answer, as text.
        harmful: which prompt set it came from.
        tokens: its token ids, without the end token.
        refused: whether it opens as a refusal.
    """

    prompt: str
    answer: str
    harmful: bool
    tokens: tuple[int, ...]
    refused: bool

    @property
    def first_token(self) -> int | None:
        """The id it begins with, or None if it is empty."""
        return self.tokens[0] if self.tokens else None


def answer_baseline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    harmful: bool,
    batch_size: int,
) -> list[Answer]:
    """Answer prompts greedily with the unedited model."""
    ids = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=batch_size,
        description="baseline answers",
    )
    answers = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        answers.append(Answer(prompt, text, harmful, tuple(tokens), is_refusal(text)))
    return answers


def refusal_tokens(answers: Sequence[Answer], min_refusals: int) -> list[int]:
    """The tokens that refusals begin with and other answers do not, sorted.

    Args:
        answers: to harmful and harmless prompts.
        min_refusals: how many refused harmful prompts there must be.

    Raises:
        StageError: if the model refuses too few harmful prompts, or its refusals begin as its other answers do.
    """
    harmful = [answer for answer in answers if answer.harmful]
    refusals = [answer.first_token for answer in harmful if answer.refused]
    if len(refusals) < min_refusals:
        raise StageError(
            f"abliteration: {len(refusals)} of {len(harmful)} harmful prompts were refused by the base model, so there "
            "is too little refusal to find its direction; choose prompts that this model refuses, or lower "
            f"abliteration.selection.min_refusals ({min_refusals})"
        )
    others = Counter(answer.first_token for answer in answers if not answer.refused)
    num_others = max(sum(others.values()), 1)
    tokens = [
        token
        for token, count in Counter(refusals).items()
        if token is not None
        and count / len(refusals) >= MIN_SHARE
        and count / len(refusals) >= MIN_RATIO * others[token] / num_others
    ]
    if not tokens:
        raise StageError(
            "abliteration: this model's refusals begin with the same tokens as its other answers, so its next token "
            "cannot score refusal; use selection: {name: fixed, layer: ..., position: ...}"
        )
    return sorted(tokens)


def refusal_scores(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """log(P / (1 - P)) of the refusal tokens' summed next-token probability, in float64.

    Args:
        logits: [prompts, vocab] at the last position of each prompt.
        tokens: the refusal tokens.

    Returns:
        [prompts]; above 0 the model is about to refuse.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix B.
    """
    probability = torch.softmax(logits.to(torch.float64), dim=-1)[:, list(tokens)].sum(dim=-1)
    epsilon = 1e-8
    return torch.log(probability + epsilon) - torch.log(1 - probability + epsilon)
