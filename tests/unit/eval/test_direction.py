"""What is left of the removed direction is measured in the weights as they are used, and found again in the stream.

Run: python -m pytest tests/unit/eval/test_direction.py
"""

import importlib.util

import pytest
import torch

from common import chat
from common.edits import apply_to_weights, load_edit
from common.hooks import applied_by_hooks
from common.recipe import Recipe
from eval import direction
from eval.direction import Contrast, contrast, difference_in_means, reestimated, writes_along
from tests.editing import edit_of, vector

TARGET, HARMLESS = ["a b", "the other one", "how"], ["why not", "x y z"]
ABOUT = {"layer": 1.5, "position": -2}


@pytest.fixture
def model(build_model):
    return build_model("llama", dtype=torch.float32)


def _plain_mean(model, tokenizer, prompts, layer):
    """Mean hidden state at the input of a block, prompt by prompt, at the last position but one."""
    states = []
    for ids in chat.encode(tokenizer, prompts):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        states.append(hidden[layer][0, -2].double())
    return torch.stack(states).mean(dim=0)


def test_the_difference_is_that_of_plain_forward_passes_between_two_layers(model, tokenizer):
    place = Contrast(TARGET, HARMLESS, [], 1.25, -2)
    found = difference_in_means(model, tokenizer, place, batch_size=2)
    due = sum(
        share
        * (_plain_mean(model, tokenizer, TARGET, n) - _plain_mean(model, tokenizer, HARMLESS, n))
        for n, share in ((1, 0.75), (2, 0.25))
    )
    assert torch.allclose(found, due, atol=1e-5)
    whole = difference_in_means(model, tokenizer, Contrast(TARGET, HARMLESS, [], 1, -2), 2)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_what_is_to_stay_is_taken_out_of_the_difference(model, tokenizer):
    kept = ["never", "no no"]
    found, other = (
        difference_in_means(model, tokenizer, Contrast(target, HARMLESS, also, 1, -1), 4)
        for target, also in ((TARGET, kept), (kept, []))
    )
    assert abs(float(found @ other)) < 1e-6 * float(found.norm() * other.norm())


def test_the_removed_direction_is_found_again_and_is_gone_behind_the_edit(model, tokenizer):
    place = Contrast(TARGET, HARMLESS, [], 1, -1)
    removed = difference_in_means(model, tokenizer, place, 4)
    edit = edit_of(model, "orthogonalize", removed)
    traces = {"original": direction.trace(model, edit, tokenizer, place, 4)}
    with applied_by_hooks(model, edit):
        gone = difference_in_means(model, tokenizer, place, 4)
    traces["abliterated"] = direction.Trace({}, gone)
    traces["healed"] = direction.Trace({}, gone + 0.5 * removed)
    found = reestimated(edit, traces, place)
    assert found["reason"] is None
    assert found["original"] == {"cosine": pytest.approx(1.0), "norm_ratio": 1.0}
    assert abs(found["abliterated"]["cosine"]) < 1e-5
    assert found["healed"]["cosine"] > 0.1
    expected = float((gone + 0.5 * removed).norm() / removed.norm())
    assert found["healed"]["norm_ratio"] == pytest.approx(expected)


def test_weights_are_measured_as_saved_rounded_and_quantized(model):
    edit = edit_of(model, "orthogonalize", vector())
    original = direction.Trace(
        {form: writes_along(model, edit, form) for form in direction.FORMS}, None
    )
    apply_to_weights(model, edit)
    abliterated = direction.Trace(
        {form: writes_along(model, edit, form) for form in direction.FORMS}, None
    )
    found = direction.residuals(edit, original, abliterated, abliterated)
    saved, rounded = found["saved"], found["bfloat16"]
    assert saved["healed"] == 0.0
    assert saved["abliterated"] < 1e-5
    # Nothing was trained: what is there now came from rounding alone.
    assert 1e-4 < rounded["abliterated"] < 2e-2
    assert rounded["healed"] == pytest.approx(rounded["abliterated"], rel=1e-2)
    if importlib.util.find_spec("bitsandbytes") is None:
        assert found["nf4"] is None
    else:
        assert rounded["healed"] < found["nf4"]["healed"] < 0.5


def test_without_bitsandbytes_nothing_is_said_of_four_bits(model, monkeypatch):
    monkeypatch.setattr(direction.importlib.util, "find_spec", lambda _name: None)
    edit = edit_of(model, "orthogonalize", vector())
    trace = direction.Trace(
        {form: writes_along(model, edit, form) for form in direction.FORMS}, None
    )
    assert direction.residuals(edit, trace, trace, trace)["nf4"] is None


def test_where_nothing_was_removed_there_is_a_reason_instead(finished, model):
    recipe = finished.recipe
    added = edit_of(model, "add", vector(), about=ABOUT)
    assert contrast(recipe, added) == "the edit adds a direction and removes none"
    void = edit_of(
        model,
        "orthogonalize",
        vector(),
        about=ABOUT,
        strength=1,
        weights={"attention": 0, "mlp": 0, "embedding": 0},
    )
    assert contrast(recipe, void) == "the edit removes nothing"
    unplaced = edit_of(model, "orthogonalize", vector())
    reason = contrast(recipe, unplaced)
    assert "does not say at which layer" in reason
    found = reestimated(unplaced, dict.fromkeys(("original", "abliterated", "healed")), reason)
    assert found == {"original": None, "abliterated": None, "healed": None, "reason": reason}


def test_where_false_refusals_were_removed_true_ones_are_what_stays(finished, tmp_path):
    (tmp_path / "false.txt").write_text("Kill a process?\n")
    data = finished.recipe.model_dump(mode="json")
    data["abliteration"]["prompts"]["falsely_refused"] = {"path": str(tmp_path / "false.txt")}
    edit = load_edit(finished.upstream["abliteration"] / "edit.safetensors")
    found = contrast(Recipe.model_validate(data), edit)
    assert (found.target, found.kept[0]) == (["Kill a process?"], "How are you?")
    plain = contrast(finished.recipe, edit)
    assert (plain.target, plain.kept) == (["How are you?", "Who are you?", "Where?"], [])
    assert plain.harmless == ["Sing a song.", "Tell a long tale."]
    assert (plain.layer, plain.position) == (1, -1)
