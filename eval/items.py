"""What an evaluation measured, before any arithmetic: one row per thing measured, one item per answer and model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["benchmarks", "refusal", "divergence", "cross_entropy"]
ModelName = Literal["original", "abliterated", "healed"]

MODELS: tuple[ModelName, ...] = ("original", "abliterated", "healed")


@dataclass(frozen=True)
class Row:
    """One thing that is measured: a row of results.json.

    Attributes:
        kind: the list of results.json that holds it.
        name: unique within its list.
        about: facts that are known before any model is loaded and are copied into the row (metric,
            role...).
    """

    kind: Kind
    name: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """What one model did on one item of a row.

    Attributes:
        kind: of the row.
        name: of the row.
        model: which of the three.
        id: of the item, unique within its row.
        value: a rate, 0 or 1 for a wrong or right answer; for a divergence the mean over its
            tokens.
        cluster: label shared by the items that rest on one fact, if any.
        answer_logp: log-probability of the right answer, where there is one.
        details: what else is worth keeping (the answer's text, divergences by token).
    """

    kind: Kind
    name: str
    model: ModelName
    id: str | int
    value: float
    cluster: str | None = None
    answer_logp: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The item as a line of items.jsonl."""
        return {
            "kind": self.kind,
            "name": self.name,
            "model": self.model,
            "id": self.id,
            "value": self.value,
            "cluster": self.cluster,
            "answer_logp": self.answer_logp,
            "details": dict(self.details),
        }
