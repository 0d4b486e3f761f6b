"""What is left of the removed direction, on the page."""

from collections.abc import Iterator, Mapping
from typing import Any

from common.webpage import Markup, Section
from eval.items import MODELS
from eval.report.figures import figure, joined

Row = Mapping[str, Any]
# In what form the weights were looked at.
FORMS = {
    "residual": "as saved",
    "residual_bfloat16": "rounded to bfloat16",
    "residual_nf4": "quantized to NF4",
}


def sections(found: Row) -> Iterator[Section]:
    """What the edit left along the direction, and what healing moved, where anything was removed."""
    rows = [
        [words, *(figure(f"direction.{key}.{m}", found[key][m], ".1e") for m in MODELS[1:])]
        for key, words in FORMS.items()
        if found.get(key)
    ]
    if not rows:
        return
    words: str = (
        "Largest share of what the original wrote along the removed direction: left by the edit, and moved by "
        "healing."
    )
    again = found.get("reestimated")
    if again and again["reason"] is None:
        words = joined([words, _estimated_again(again)], " ")
    yield Section(
        "direction",
        "What is left of the removed direction",
        words,
        [],
        ["Weights", "Left by the edit", "Moved by healing"],
        rows,
        folded=False,
    )


def _estimated_again(again: Row) -> Markup:
    """The cosine of the direction that each model shows now with the removed one."""
    found = []
    for model in MODELS:
        path = f"direction.reestimated.{model}"
        cosine = figure(f"{path}.cosine", again[model]["cosine"], "+.3f")
        length = figure(f"{path}.norm_ratio", again[model]["norm_ratio"], ".2f")
        found.append(joined([f"{model} ", cosine, " (", length, ")"], ""))
    words = "Estimated again, its cosine with the removed one (and its length, relative to the original's) is: "
    return joined([words, joined(found), "."], "")
