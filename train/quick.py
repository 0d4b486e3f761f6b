"""What stage three offers training: `train/run.py` hands it over, since the stages do not know each other."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.statistics import Difference


class Damage(Protocol):
    """What the edit broke in one domain: `eval.quick.Damage`."""

    @property
    def num_items(self) -> int:
        """Questions."""

    @property
    def original(self) -> float:
        """Share that the original answers right."""

    @property
    def abliterated(self) -> float:
        """Share that the abliterated model answers right."""

    @property
    def difference(self) -> Difference:
        """Abliterated minus original."""

    @property
    def p(self) -> float:
        """Adjusted after Holm over all domains."""

    @property
    def is_significant(self) -> bool:
        """Whether the edit surely lowered the domain."""


class QuickEvaluation(Protocol):
    """A quick evaluation: `eval.quick.QuickEvaluation`."""

    def ask(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: str
    ) -> list[str]:
        """A model's replies to all prompts, on every process."""

    def damages(self, original: Sequence[str], abliterated: Sequence[str]) -> Mapping[str, Damage]:
        """What the edit did to each domain, from the two models' replies."""

    def scores(
        self, original: Sequence[str], abliterated: Sequence[str], healed: Sequence[str]
    ) -> dict[str, float]:
        """`recovery`, `recovery_low`, `recovery_high`, `refusal`, `over_refusal` and more, from the replies."""
