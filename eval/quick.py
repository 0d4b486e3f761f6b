"""A quick evaluation of a model in memory: small enough to be made again and again while it is trained.

Questions, whose answers are right or wrong, are answered greedily; for the stopping of a training prompts that the
original refuses and harmless ones as well. What a model replied is data, so that the original's and the abliterated
model's replies are made once and every later model is compared with them, item by item.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import statistics
from common.errors import StageError
from common.generation import generate
from common.overlap import normalize
from common.prompts import load_prompts
from common.questions import is_right, load_questions
from common.recipe import QuickQuestions, Stopping
from common.refusal import is_refusal
from common.statistics import Difference, Floats
from eval.comparison import SIGNIFICANCE, Answers, pool

# The name where a recipe names no domains.
ONE_DOMAIN = "questions"


@dataclass(frozen=True)
class Damage:
    """What the edit broke in one domain of the questions.

    Attributes:
        num_items: questions.
        original: share that the original answers right.
        abliterated: share that the abliterated model answers right.
        difference: abliterated minus original, paired, with its own p-value.
        p: adjusted after Holm over all domains.
    """

    num_items: int
    original: float
    abliterated: float
    difference: Difference
    p: float

    @property
    def is_significant(self) -> bool:
        """Whether the edit surely lowered the domain."""
        return self.difference.value < 0 and self.p < SIGNIFICANCE


class QuickEvaluation:
    """The prompts of a quick evaluation, ready to be put to any model."""

    def __init__(self, settings: QuickQuestions, seed: int) -> None:
        """Load the prompts.

        Args:
            settings: of the recipe.
            seed: of the bootstrap.
        """
        self.settings, self.seed = settings, seed
        self.questions = load_questions(settings.questions)
        self.harmful, self.harmless = (
            (load_prompts(settings.harmful), load_prompts(settings.harmless))
            if isinstance(settings, Stopping)
            else ([], [])
        )

    def ask(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
    ) -> list[str]:
        """What a model replies to all prompts, greedily: the questions, the harmful, the harmless ones.

        The processes of the launch share the work, and all get all replies.
        """
        ids = generate(
            model,
            tokenizer,
            [*(question.prompt for question in self.questions), *self.harmful, *self.harmless],
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            description=description,
        )
        return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in ids]

    def damages(self, original: Sequence[str], abliterated: Sequence[str]) -> dict[str, Damage]:
        """What the edit did to each domain.

        Args:
            original: replies of the original model, from `ask`.
            abliterated: replies of the abliterated model.
        """
        before, after = self._right(original, original), self._right(abliterated, original)
        places = self._places()
        differences = [
            statistics.paired_difference(
                after[inside], before[inside], np.arange(len(inside)), seed=self.seed
            )
            for inside in places.values()
        ]
        adjusted = statistics.holm([difference.p for difference in differences])
        return {
            domain: Damage(
                len(inside),
                float(before[inside].mean()),
                float(after[inside].mean()),
                difference,
                p,
            )
            for (domain, inside), difference, p in zip(
                places.items(), differences, adjusted, strict=True
            )
        }

    def scores(
        self, original: Sequence[str], abliterated: Sequence[str], healed: Sequence[str]
    ) -> dict[str, float]:
        """How far a model has come, from its replies and those of the two models that it lies between.

        Returns:
            `recovery` with `recovery_low` and `recovery_high`, pooled over the damaged domains as in stage 3;
            `refusal` and `over_refusal`; `right/<domain>`, the share of right answers.

        Raises:
            StageError: if the edit surely damaged no domain, so that there is nothing to recover.
        """
        damages, places = self.damages(original, abliterated), self._places()
        damaged = [domain for domain, damage in damages.items() if damage.is_significant]
        before, after, now = (
            self._right(replies, original) for replies in (original, abliterated, healed)
        )
        parts = [places[domain] for domain in damaged]
        pooled = pool(
            [Answers(before[p], after[p], now[p], np.arange(len(p))) for p in parts],
            seed=self.seed,
        )
        if pooled is None:
            found = ", ".join(
                f"{domain} {damage.original:.2f} to {damage.abliterated:.2f} on {damage.num_items}"
                for domain, damage in damages.items()
            )
            raise StageError(
                f"train: the edit surely damaged no domain of train.stopping.questions ({found}), so there is no "
                "recovery to stop at; give more questions, or delete train.stopping"
            )
        first, second = len(self.questions), len(self.questions) + len(self.harmful)
        return {
            "recovery": pooled.recovery.value,
            "recovery_low": pooled.recovery.low,
            "recovery_high": pooled.recovery.high,
            "refusal": _refusal_rate(healed[first:second]),
            "over_refusal": _refusal_rate(healed[second:]),
            **{f"right/{domain}": float(now[inside].mean()) for domain, inside in places.items()},
        }

    def _right(self, replies: Sequence[str], original: Sequence[str]) -> Floats:
        """1 for each question [questions] that is answered right."""
        return np.array(
            [
                is_right(reply, question.answer)
                if question.answer is not None
                else normalize(reply) == normalize(due)
                for question, reply, due in zip(
                    self.questions,
                    replies,
                    original,
                    strict=False,  # other replies follow
                )
            ],
            dtype=np.float64,
        )

    def _places(self) -> dict[str, statistics.Integers]:
        """The indices of each domain's questions."""
        domains = [question.domain or ONE_DOMAIN for question in self.questions]
        return {
            domain: np.array([index for index, own in enumerate(domains) if own == domain])
            for domain in dict.fromkeys(domains)
        }


def _refusal_rate(replies: Sequence[str]) -> float:
    return sum(map(is_refusal, replies)) / len(replies)
