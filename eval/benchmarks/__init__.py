"""Benchmarks: one file adds one, and its name is its recipe key.

A file offers these functions; `spec` is its entry in `eval.benchmarks` of the recipe:

    names(spec) -> list[str]                     the rows it will give, found without its data
    check(spec, recipe) -> list[str]             problems in words, found without loading weights
    inputs(spec) -> dict[str, object]            what its outcome depends on: settings and hashes of contents, no paths
    texts(spec) -> dict[str, list[str]]          the wording of its items by row, to compare with training prompts
    load(spec, tokenizer, *, batch_size) -> list[Loaded]
                                                 its rows with their items, ready to be put to any model

`Loaded.score` is called once for each model, original first, with the same requests in the same
batches, so that nothing but the weights differs.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.recipe import Engine, Recipe
from eval.answer_cache import AnswerCache
from eval.items import Item, ModelName, Row

Spec = Any  # each benchmark has a class of its own in the recipe


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        name: which of the three it is.
        model: its weights.
        original: the original model, which some measures compare with; the model itself for the
            original.
        engine: what answers the harness's requests.
        answers: what the model has answered before, on disk.
    """

    name: ModelName
    model: PreTrainedModel
    original: PreTrainedModel
    engine: Engine = "packed"
    answers: AnswerCache = field(default_factory=AnswerCache)


class Loaded(Protocol):
    """One row of a benchmark, with its items in memory."""

    @property
    def row(self) -> Row:
        """What it measures."""

    def score(self, subject: Subject) -> list[Item]:
        """Put all items to a model; the processes of the launch share the work and all get all items."""


class Component(Protocol):
    """What a file of this package offers; see above."""

    def names(self, spec: Spec) -> list[str]:
        """The rows."""

    def check(self, spec: Spec, recipe: Recipe) -> list[str]:
        """Problems."""

    def inputs(self, spec: Spec) -> dict[str, object]:
        """For the fingerprint."""

    def texts(self, spec: Spec) -> dict[str, list[str]]:
        """The items' wording."""

    def load(
        self, spec: Spec, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
    ) -> Sequence[Loaded]:
        """The items."""


def component(name: str) -> Component:
    """The file that a recipe's benchmark name selects."""
    module: Any = importlib.import_module(f"eval.benchmarks.{name}")
    return module  # type: ignore[no-any-return]  # a module that offers the functions above


def place(spec: Spec, recipe: Recipe) -> str:
    """The dotted key of a benchmark in its recipe, with which its problems begin."""
    index = next(index for index, entry in enumerate(recipe.eval.benchmarks) if entry is spec)
    return f"eval.benchmarks[{index}]"
