"""Parts of stage one that cannot work together are refused in the recipe, with what to do.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_abliteration_section.py
"""

from typing import Any

import pytest
from pydantic import ValidationError

from common.recipe import AbliterationSection

PROMPTS = {"harmful": {"path": "a.jsonl"}, "harmless": {"path": "b.jsonl"}}
FALSE = {"prompts": {**PROMPTS, "falsely_refused": {"path": "c.jsonl"}}}
SEARCH = {"selection": {"name": "search"}}
FIXED = {"selection": {"name": "fixed", "layer": 3, "position": -1}}
ADD = {"edit": {"name": "add"}}

CASES: list[tuple[dict[str, Any], str, str]] = [
    (ADD, "selection.name", "write fixed to add"),
    ({**ADD, **SEARCH}, "selection.name", "write fixed to add"),
    ({**ADD, "selection": {**FIXED["selection"], "layer": 2.5}}, "selection.layer", "1, 2"),
    ({**ADD, "selection": {**FIXED["selection"], "layer": 0}}, "selection.layer", "1, 2"),
    ({**ADD, **FIXED, "direction": {"name": "svd"}}, "direction.name", "take another"),
    ({**ADD, **FIXED, **FALSE}, "edit.name", "take a removal"),
    ({**SEARCH, "edit": {"name": "orthogonalize", "strength": 2.0}}, "edit.strength", "0.1 to 1.5"),
    ({**SEARCH, "edit": {"name": "orthogonalize", "strength": 0.05}}, "edit.strength", "0.1 to"),
    (
        {**SEARCH, "edit": {"name": "orthogonalize", "weights": {"mlp": 0.5}}},
        "edit.weights",
        "delete it",
    ),
    ({**SEARCH, "edit": {"name": "row_norm"}}, "edit.name", "add it to selection.edits"),
    ({**SEARCH, **FALSE}, "selection.name", "write scores"),
    ({**FALSE, "edit": {"name": "biprojected"}}, "edit", "orthogonalize"),
    (
        {**FALSE, "edit": {"name": "column_norm", "projection": "projected"}},
        "edit",
        "orthogonalize",
    ),
    ({"load_in_4bit": True, "edit": {"name": "column_norm"}}, "load_in_4bit", "column_norm"),
    ({"load_in_4bit": True, **SEARCH}, "load_in_4bit", "without norms"),
    ({"layer_by_layer": True}, "layer_by_layer", "selection: {name: fixed"),
    ({"layer_by_layer": True, "load_in_4bit": True, **FIXED}, "layer_by_layer", "keep one"),
]


@pytest.mark.parametrize(("changes", "key", "remedy"), CASES)
def test_parts_that_cannot_work_together_are_refused(changes, key, remedy):
    with pytest.raises(ValidationError) as caught:
        AbliterationSection.model_validate({"prompts": PROMPTS, **changes})
    errors = {".".join(map(str, each["loc"])): each["msg"] for each in caught.value.errors()}
    assert remedy in errors[key]


@pytest.mark.parametrize(
    "changes",
    [{}, FIXED, SEARCH, FALSE, {**ADD, **FIXED}, {"layer_by_layer": True, **FIXED}],
)
def test_parts_that_work_together_are_taken(changes):
    AbliterationSection.model_validate({"prompts": PROMPTS, **changes})
