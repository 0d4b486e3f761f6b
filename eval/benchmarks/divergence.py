"""How far a model's next-token probabilities have moved from the original's, over whole answers.

Both models read the original's own greedy answers to a panel of prompts (teacher forcing), and the
divergence KL(original || model) is taken at every token, the one that ends the answer included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common import chat, distributed
from common.divergence import answer_logits, batches, kl_divergence
from common.generation import generate
from common.prompts import load_prompts
from common.recipe import Divergence
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
    """One answer's divergences in nats, token by token, and how often the likeliest token is the same."""

    kl: list[float]
    top1_agreements: int


@dataclass(frozen=True)
class Panel:
    """Prompts whose answers by the original are the text on which models are compared.

    Attributes:
        spec: of the recipe.
        prompts: one user turn each.
        tokenizer: of all three models.
        batch_size: answers per forward pass and process.
        answers: the original's, filled when it is scored.
    """

    spec: Divergence
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    answers: list[list[int]] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """The panel's divergence."""
        return Row("divergence", self.spec.panel)

    def score(self, subject: Subject) -> list[Item]:
        """Let the original answer; compare the other models with it on its answers."""
        if not self.answers:
            self.answers.extend(self._scored_texts(subject))
        if subject.name == "original":
            return []
        prompts = chat.encode(self.tokenizer, self.prompts)
        lengths = [len(p) + len(a) for p, a in zip(prompts, self.answers, strict=True)]
        groups = list(batches(lengths, self.batch_size))
        bar = tqdm(
            total=len(prompts),
            desc=f"{self.spec.panel}: {subject.name}",
            disable=not distributed.is_main(),
            leave=False,
        )

        def work(part: Sequence[list[int]]) -> list[list[TokenDivergences]]:
            found = []
            for group in part:
                texts = (
                    [prompts[index] for index in group],
                    [self.answers[index] for index in group],
                )
                found.append(compare(subject, *texts, int(self.tokenizer.pad_token_id)))
                bar.update(len(group) * distributed.world_size())
            return found

        by_group = distributed.share(groups, work)
        bar.close()
        found = {
            i: d
            for group, ds in zip(groups, by_group, strict=True)
            for i, d in zip(group, ds, strict=True)
        }
        return [self._item(subject, index, found[index]) for index in range(len(prompts))]

    def _scored_texts(self, subject: Subject) -> list[list[int]]:
        answers = generate(
            subject.original,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.batch_size,
            description=f"{self.spec.panel}: answers",
        )
        # An answer that ended has one prediction more than it has tokens: that of its end. The
        # token put there is never read from.
        end = int(self.tokenizer.eos_token_id)
        return [ids if len(ids) == self.spec.max_new_tokens else [*ids, end] for ids in answers]

    def _item(self, subject: Subject, index: int, found: TokenDivergences) -> Item:
        kl = [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in found.kl]
        details = {"kl": kl, "top1_agreements": found.top1_agreements}
        value = sum(kl) / len(kl)
        return Item("divergence", self.spec.panel, subject.name, index, value, details=details)


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
    return [
        TokenDivergences(
            kl=kl_divergence(original, model).tolist(),
            top1_agreements=int((original.argmax(dim=-1) == model.argmax(dim=-1)).sum()),
        )
        for original, model in rows
    ]
