"""The rate of refusals on a panel of prompts: every greedy answer is judged whole, with the prompt beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from common.generation import generate
from common.recipe import Refusal
from common.refusal import judge, without_thoughts
from eval.advisories import find_advisories
from eval.benchmarks import Subject
from eval.items import Item, Row
from eval.panels import check, inputs, load_panel, names, texts

__all__ = ["check", "inputs", "load", "names", "texts"]


def load(spec: Refusal, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> "list[Panel]":
    """The panel's prompts."""
    panel = load_panel(spec)
    categories = {each.text: each.category for each in panel if each.category is not None}
    return [Panel(spec, [each.text for each in panel], tokenizer, batch_size, categories)]


@dataclass(frozen=True)
class Panel:
    """Prompts that are answered and judged.

    Attributes:
        spec: of the recipe.
        prompts: one user turn each.
        tokenizer: of all three models.
        batch_size: prompts per forward pass and process.
        categories: what a prompt is about, by its words, where that is named.
    """

    spec: Refusal
    prompts: list[str]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Row:
        """The panel's rate of refusals."""
        system = {} if self.spec.system is None else {"system": self.spec.system}
        return Row("refusal", self.spec.panel, {"harmless": self.spec.harmless, **system})

    def score(self, subject: Subject) -> list[Item]:
        """Answer the prompts greedily and judge the answers; an item's value is 1 for a refusal."""
        answers = generate(
            subject.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.batch_size,
            system=self.spec.system,
            description=f"{self.spec.panel}: {subject.name}",
        )
        items = []
        for index, (prompt, ids) in enumerate(zip(self.prompts, answers, strict=True)):
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            details = {"text": text, "num_tokens": len(ids), **self._judged(text, prompt)}
            value = float(details["class"] in ("full_refusal", "partial_refusal"))
            items.append(
                Item("refusal", self.spec.panel, subject.name, index, value, details=details)
            )
        return items

    def _judged(self, text: str, prompt: str) -> dict[str, object]:
        """What is to be kept of an answer besides its words."""
        verdict = judge(text, prompt)
        found = find_advisories(without_thoughts(text), prompt)
        about: dict[str, object] = {
            "class": verdict.label,
            "evidence": verdict.evidence,
            "confidence": round(verdict.confidence, 4),
            "num_words": found.num_words_in_all,
            "num_advisory_words": found.num_words,
        }
        category = self.categories.get(prompt)
        return about if category is None else about | {"category": category}
