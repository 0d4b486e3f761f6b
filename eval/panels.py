"""Panels: prompts of the recipe's own that a benchmark puts to the models. What such benchmarks share."""

from common import artifacts
from common.prompts import check_prompts, load_prompts
from common.recipe import Divergence, Recipe, Refusal
from eval.benchmarks import place

Spec = Divergence | Refusal


def names(spec: Spec) -> list[str]:
    """The panel."""
    return [spec.panel]


def check(spec: Spec, recipe: Recipe) -> list[str]:
    """Whether the prompts can be loaded."""
    return check_prompts(spec.prompts, f"{place(spec, recipe)}.prompts")


def inputs(spec: Spec) -> dict[str, object]:
    """Settings and the content of the prompts."""
    return spec.model_dump(mode="json", exclude={"prompts"}) | {
        "prompts": artifacts.hash_data(load_prompts(spec.prompts))
    }


def texts(spec: Spec) -> dict[str, list[str]]:
    """The prompts."""
    return {spec.panel: load_prompts(spec.prompts)}
