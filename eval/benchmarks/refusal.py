"""The rate of refusals on a panel of prompts: every greedy answer is judged whole, with the prompt beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from common import distributed
from common.recipe import Recipe, Refusal
from common.refusal import Verdict, judge, without_thoughts
from eval import judges, panels
from eval.advisories import find_advisories
from eval.answer_cache import AnswerCache, generate
from eval.benchmarks import Subject, place
from eval.items import Item, Row
from eval.judges import Judgement
from eval.panels import load_panel, names, texts

__all__ = ["check", "inputs", "load", "names", "texts"]


def check(spec: Refusal, recipe: Recipe) -> list[str]:
    """Whether the prompts can be loaded, and the judge be asked."""
    problems = panels.check(spec, recipe)
    if spec.judge is not None:
        key = f"{place(spec, recipe)}.judge"
        problems += [f"{key}.{problem}" for problem in judges.check(spec.judge)]
    return problems


def inputs(spec: Refusal) -> dict[str, object]:
    """Settings, and the content of the prompts and of the judge."""
    judge = None if spec.judge is None else judges.inputs(spec.judge)
    return panels.inputs(spec) | {"judge": judge}


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
        about = {"harmless": self.spec.harmless, "system": self.spec.system}
        judge = self.spec.judge
        if judge is not None:
            about |= {"judge": judges.name_of(judge)} if judges.tells_refusals(judge) else {}
            about |= {"harm_judge": judges.name_of(judge)} if judges.tells_harm(judge) else {}
        said = {key: value for key, value in about.items() if value is not None}
        return Row("refusal", self.spec.panel, said)

    def score(self, subject: Subject) -> list[Item]:
        """Answer the prompts greedily and judge the answers; an item's value is 1 for a refusal."""
        answers = generate(
            subject.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.spec.max_new_tokens,
            batch_size=self.batch_size,
            answers=subject.answers,
            system=self.spec.system,
            description=f"{self.spec.panel}: {subject.name}",
        )
        said = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
        items = []
        for index, judgement in enumerate(self._judgements(said, subject.answers)):
            text, length = said[index], len(answers[index])
            judged = self._judged(text, self.prompts[index], judgement)
            details = {"text": text, "num_tokens": length, **judged}
            value = float(details["class"] in ("full_refusal", "partial_refusal"))
            items.append(
                Item("refusal", self.spec.panel, subject.name, index, value, details=details)
            )
        return items

    def _judgements(self, answers: Sequence[str], known: AnswerCache) -> list[Judgement]:
        """What the recipe's judge says, or has said before; nothing without one."""
        judge = self.spec.judge
        if judge is None:
            return [Judgement()] * len(answers)
        shown = [without_thoughts(answer) for answer in answers]
        exchanges = list(zip(self.prompts, shown, strict=True))

        def ask(numbers: Sequence[int]) -> list[tuple[object, ...]]:
            return [astuple(j) for j in judges.ask(judge, [exchanges[n] for n in numbers])]

        asked = [["judge", self._judge_inputs, *exchange] for exchange in exchanges]
        description = f"{self.spec.panel}: {judges.name_of(judge)}"
        return [Judgement(*each) for each in known.answer_at_once(asked, ask, description)]

    @cached_property
    def _judge_inputs(self) -> dict[str, object]:
        """What the recipe's judge depends on: its weights are hashed once for all models."""
        assert self.spec.judge is not None
        return distributed.broadcast(
            judges.inputs(self.spec.judge) if distributed.is_main() else {}
        )

    def _judged(self, text: str, prompt: str, judgement: Judgement) -> dict[str, object]:
        """What is to be kept of an answer besides its words."""
        verdict = judge(text, prompt)
        if judgement.label is not None and verdict.label != "degenerate":
            verdict = Verdict(judgement.label, "", 1.0)
        found = find_advisories(without_thoughts(text), prompt)
        about: dict[str, object] = {
            "class": verdict.label,
            "evidence": verdict.evidence,
            "confidence": round(verdict.confidence, 4),
            "num_words": found.num_words_in_all,
            "num_advisory_words": found.num_words,
        }
        if judgement.harmful is not None:
            about["harmful"] = judgement.harmful
        if (category := self.categories.get(prompt)) is not None:
            about["category"] = category
        return about
