"""How far a model's next-token probabilities have moved from the original's, over whole answers.

Both models read the original's own greedy answers to a panel of prompts (teacher forcing), and the
divergences KL(original || model) and KL(model || original) are taken at every token, the one that
ends the answer included. Which of those answers refuse is noted: a model that has lost a refusal is
far from the original there, and was meant to be. Beside them stands what each model answers itself: how long its greedy
answers are, and how much they repeat themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat, distributed
from common.divergence import answer_logits, batches, kl_divergence, repetition, surprisal
from common.errors import StageError
from common.prompts import load_prompts
from common.recipe import Divergence
from common.refusal import judge
from eval.answer_cache import AnswerCache, generate
from eval.benchmarks import Subject
from eval.items import Item, Row
from eval.panels import check, inputs, names, texts

# Enough for any reading, and items.jsonl stays small.
SIGNIFICANT_DIGITS = 6


__all__ = ["check", "inputs", "load", "names", "texts"]


def load(spec: Divergence, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> "list[Panel]":
    """The panel's prompts."""
    return [Panel(spec, load_prompts(spec.prompts), tokenizer, batch_size)]


@dataclass(frozen=True)
class TokenDivergences:
    """One answer by the original, token by token, in nats.

    Attributes:
        kl: KL(original || model).
        reverse_kl: KL(model || original).
        top1_agreements: how often both give the same token the highest probability.
        original_nll: -log-probability of the answer under the original.
        nll: likewise under the model.
    """

    kl: list[float]
    reverse_kl: list[float]
    top1_agreements: int
    original_nll: float
    nll: float


@dataclass(frozen=True)
class Panel:
    """Prompts whose answers by the original are the text on which models are compared.

    Attributes:
        spec: of the recipe.
        prompts: one user turn each.
        tokenizer: of all three models.
        batch_size: answers per forward pass and process.
        own_answers: the original's greedy answers, filled when it is scored.
    """

    spec: Divergence
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    own_answers: list[list[int]] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """The panel's divergence."""
        return Row("divergence", self.spec.panel)

    @property
    def texts(self) -> list[list[int]]:
        """The original's answers, each as far as its tokens are predicted.

        An answer that ended has one prediction more than it has tokens: that of its end. The token
        put there is never read from.
        """
        end, most = int(self.tokenizer.eos_token_id), self.spec.max_new_tokens
        return [ids if len(ids) == most else [*ids, end] for ids in self.own_answers]

    def score(self, subject: Subject) -> list[Item]:
        """Let the original answer; compare the other models with it on its answers, and let them answer."""
        if not self.own_answers:
            # What the original has answered before is at hand where it is the one that is asked.
            known = subject.answers if subject.model is subject.original else AnswerCache()
            self.own_answers.extend(self._answers(subject.original, "original", known))
        if subject.name == "original":
            return []
        found = self._compare(subject)
        answers = self._answers(subject.model, subject.name, subject.answers)
        return [
            self._item(subject, index, found[index], answers[index]) for index in range(len(found))
        ]

    def _compare(self, subject: Subject) -> list[TokenDivergences]:
        prompts, answers = chat.encode(self.tokenizer, self.prompts), self.texts
        lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
        groups = list(batches(lengths, self.batch_size))

        def work(group: Sequence[int]) -> list[TokenDivergences]:
            texts = ([prompts[index] for index in group], [answers[index] for index in group])
            return compare(subject, *texts, int(self.tokenizer.pad_token_id))

        by_group = distributed.share_batches(groups, work, f"{self.spec.panel}: {subject.name}")
        found = dict(zip(chain(*groups), chain(*by_group), strict=True))
        return [found[index] for index in range(len(prompts))]

    def _answers(self, model: PreTrainedModel, name: str, known: AnswerCache) -> list[list[int]]:
        return generate(
            model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.batch_size,
            answers=known,
            description=f"{self.spec.panel}: {name}, answers",
        )

    def _item(
        self, subject: Subject, index: int, found: TokenDivergences, answer: list[int]
    ) -> Item:
        kl, reverse_kl = _rounded(found.kl), _rounded(found.reverse_kl)
        details = {
            "kl": kl,
            "reverse_kl": reverse_kl,
            "top1_agreements": found.top1_agreements,
            "original_nll": found.original_nll,
            "nll": found.nll,
            "original_refuses": self._original_refuses[index],
            "original_answer": self._about(self.own_answers[index]),
            "answer": self._about(answer),
        }
        value = sum(kl) / len(kl)
        if not math.isfinite(value + sum(reverse_kl) + found.nll):
            raise StageError(
                f"eval: the divergence of the {subject.name} model from the original is {value} on prompt {index} of "
                f"{self.spec.panel}: one of them gives no number, or no probability to what the other may say; look "
                "for NaN or -inf in its weights and logits"
            )
        return Item("divergence", self.spec.panel, subject.name, index, value, details=details)

    @cached_property
    def _original_refuses(self) -> list[bool]:
        """Whether the original refuses each prompt."""
        said = self.tokenizer.batch_decode(self.own_answers, skip_special_tokens=True)
        return [
            judge(answer, prompt).is_refusal
            for answer, prompt in zip(said, self.prompts, strict=True)
        ]

    def _about(self, answer: list[int]) -> dict[str, float]:
        """Length and repetition of an answer, and whether it was cut."""
        return {
            "num_tokens": len(answer),
            "was_cut": len(answer) == self.spec.max_new_tokens,
            "repetition": repetition(answer),
        }


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in values]


@torch.inference_mode()
def compare(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
) -> list[TokenDivergences]:
    """Compare a model with the original on a batch of answers.

    Args:
        subject: the model and the original.
        prompts: token ids of each prompt.
        answers: token ids of each answer.
        pad_id: id to pad with.
    """
    rows = zip(
        answer_logits(subject.original, prompts, answers, pad_id),
        answer_logits(subject.model, prompts, answers, pad_id),
        strict=True,
    )
    return [_divergences(original, model) for original, model in rows]


def _divergences(original: Tensor, model: Tensor) -> TokenDivergences:
    # The answers are greedy: what the original says next, its end included, is its likeliest token.
    said = original.argmax(dim=-1)
    return TokenDivergences(
        kl=kl_divergence(original, model).tolist(),
        reverse_kl=kl_divergence(model, original).tolist(),
        top1_agreements=int((said == model.argmax(dim=-1)).sum()),
        original_nll=float(surprisal(original, said).sum()),
        nll=float(surprisal(model, said).sum()),
    )
