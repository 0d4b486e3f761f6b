"""How well a model predicts plain text: the cross-entropy of documents, in nats per token.

Plain text shows damage where a model's own answers do not: it is nobody's answer, and nothing in it
is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import artifacts, distributed
from common.divergence import answer_logits, batches, surprisal
from common.errors import InputError, StageError
from common.prompts import check_prompts, load_prompts
from common.recipe import CrossEntropy, Recipe
from eval.benchmarks import Subject, place
from eval.items import Item, Row

# Logits of more tokens at once would take gigabytes over a large vocabulary.
TOKENS_AT_ONCE = 4096


def names(spec: CrossEntropy) -> list[str]:
    """The text."""
    return [spec.panel]


def check(spec: CrossEntropy, recipe: Recipe) -> list[str]:
    """Whether the documents can be loaded."""
    return check_prompts(spec.documents, f"{place(spec, recipe)}.documents")


def inputs(spec: CrossEntropy) -> dict[str, object]:
    """Settings and the content of the documents."""
    return spec.model_dump(mode="json", exclude={"documents"}) | {
        "documents": artifacts.hash_data(load_prompts(spec.documents))
    }


def texts(spec: CrossEntropy) -> dict[str, list[str]]:
    """The documents."""
    return {spec.panel: load_prompts(spec.documents)}


def load(
    spec: CrossEntropy, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> "list[Documents]":
    """The documents as token ids, each cut at `max_tokens`.

    Raises:
        InputError: if none has two tokens, since nothing predicts the first.
    """
    encoded = tokenizer(load_prompts(spec.documents))["input_ids"]
    documents = [[int(token) for token in ids[: spec.max_tokens]] for ids in encoded]
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise InputError(
            f"eval.benchmarks: no document of {spec.panel} has two tokens, so there is nothing to "
            "predict; name other documents"
        )
    return [Documents(spec, documents, tokenizer, batch_size)]


@dataclass(frozen=True)
class Documents:
    """Plain text that all three models read.

    Attributes:
        spec: of the recipe.
        documents: token ids of each.
        tokenizer: of all three models.
        batch_size: documents per forward pass and process.
    """

    spec: CrossEntropy
    documents: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def row(self) -> Row:
        """The text's cross-entropy."""
        return Row("cross_entropy", self.spec.panel)

    def score(self, subject: Subject) -> list[Item]:
        """Let a model read the documents; an item's value is its document's nats per token."""
        documents = self._fitted(subject.original)
        longest = max(len(ids) for ids in documents)
        rows = max(1, min(self.batch_size, TOKENS_AT_ONCE // longest))
        groups = list(batches([len(ids) for ids in documents], rows))
        pad_id = int(self.tokenizer.pad_token_id)
        by_group = distributed.share_batches(
            groups,
            lambda group: read(subject.model, [documents[i] for i in group], pad_id),
            f"{self.spec.panel}: {subject.name}",
        )
        nlls = dict(zip(chain(*groups), chain(*by_group), strict=True))
        return [self._item(subject, i, nlls[i], len(ids) - 1) for i, ids in enumerate(documents)]

    def _fitted(self, model: PreTrainedModel) -> list[list[int]]:
        """The documents, cut at what the model can read."""
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return [ids[:room] for ids in self.documents]

    def _item(self, subject: Subject, index: int, nll: float, num_tokens: int) -> Item:
        if nll != nll or nll == float("inf"):
            raise StageError(
                f"eval: the {subject.name} model gives document {index} of {self.spec.panel} no probability ({nll}); "
                "look for NaN or -inf in its weights and logits"
            )
        details = {"nll": nll, "num_tokens": num_tokens}
        return Item(
            "cross_entropy", self.spec.panel, subject.name, index, nll / num_tokens, details=details
        )


@torch.inference_mode()
def read(model: PreTrainedModel, documents: Sequence[Sequence[int]], pad_id: int) -> list[float]:
    """-log-probability, in nats, of each document behind its first token, in one forward pass."""
    firsts, rests = [ids[:1] for ids in documents], [ids[1:] for ids in documents]
    logits = answer_logits(model, firsts, rests, pad_id)
    return [
        float(surprisal(one, torch.tensor(rest, device=one.device)).sum())
        for one, rest in zip(logits, rests, strict=True)
    ]
