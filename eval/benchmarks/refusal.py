"""The rate of refusals on a panel of prompts, judged by the openings of greedy answers."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from common.generation import generate
from common.prompts import load_prompts
from common.recipe import Refusal
from common.refusal import is_refusal
from eval.benchmarks import Subject
from eval.items import Item, Row
from eval.panels import check, inputs, names, texts

__all__ = ["check", "inputs", "load", "names", "texts"]


def load(spec: Refusal, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> "list[Panel]":
    """The panel's prompts."""
    return [Panel(spec, load_prompts(spec.prompts), tokenizer, batch_size)]


@dataclass(frozen=True)
class Panel:
    """Prompts that are answered and judged.

    Attributes:
        spec: of the recipe.
        prompts: one user turn each.
        tokenizer: of all three models.
        batch_size: prompts per forward pass and process.
    """

    spec: Refusal
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def row(self) -> Row:
        """The panel's rate of refusals."""
        return Row("refusal", self.spec.panel, {"harmless": self.spec.harmless})

    def score(self, subject: Subject) -> list[Item]:
        """Answer the prompts greedily and judge the answers; an item's value is 1 for a refusal."""
        answers = generate(
            subject.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.batch_size,
            description=f"{self.spec.panel}: {subject.name}",
        )
        items = []
        for index, ids in enumerate(answers):
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            value = float(is_refusal(text))
            details = {"text": text, "num_tokens": len(ids)}
            items.append(
                Item("refusal", self.spec.panel, subject.name, index, value, details=details)
            )
        return items
