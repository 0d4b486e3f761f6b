"""What an edit missed is found: in the weights, and in the stream of a model with an unmapped writer.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_verification.py
"""

import copy
import dataclasses

import pytest
import torch

from abliteration import verification
from common.edits import apply_to_weights
from common.errors import StageError
from tests.editing import edit_of

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PROMPTS = ["a", "the other one", "how is it"]


def _edit(model, strength=1.0):
    return edit_of(model, "orthogonalize", DIRECTION, strength=strength)


def _edited(model, edit):
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit)
    return edited


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_a_whole_edit_passes_in_every_type(dtype, strength, build_model):
    model = build_model("mixtral", dtype=dtype)
    edit = _edit(model, strength)
    before = verification.written_along(model, edit)
    after = verification.written_along(_edited(model, edit), edit)
    ratios = verification.check_coverage(before, after, edit, dtype)
    assert ratios.keys() == edit.removals.keys()
    assert max(ratios.values()) == pytest.approx(
        abs(1 - strength), abs=verification.ROUNDING[dtype]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_writer_that_was_missed_is_named(dtype, build_model):
    model = build_model("llama", dtype=dtype)
    edit = _edit(model)
    edited = _edited(model, edit)
    with torch.no_grad():
        edited.model.layers[1].self_attn.o_proj.weight.copy_(
            model.model.layers[1].self_attn.o_proj.weight
        )
    before = verification.written_along(model, edit)
    after = verification.written_along(edited, edit)
    with pytest.raises(
        StageError, match=r"layers\.1\.self_attn\.o_proj writes 1\.0000 of .* 0\.0000"
    ):
        verification.check_coverage(before, after, edit, dtype)


def test_a_half_done_edit_does_not_pass_for_a_whole_one(build_model):
    model = build_model("llama")
    edit, half = _edit(model), _edit(model, 0.5)
    before = verification.written_along(model, edit)
    after = verification.written_along(_edited(model, half), edit)
    with pytest.raises(StageError, match=r"writes 0\.5000 of what it wrote"):
        verification.check_coverage(before, after, edit, torch.float64)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_stream_of_an_edited_model_does_not_reach_along_the_direction(
    family, build_model, tokenizer
):
    model = build_model(family, dtype=torch.float32)
    edit = _edit(model)
    before = verification.stream_along(model, tokenizer, PROMPTS, edit.direction)
    after = verification.stream_along(_edited(model, edit), tokenizer, PROMPTS, edit.direction)
    assert before.shape == (3,)
    assert before.min() > 1e-2
    verification.check_stream(before, after, edit, torch.float32)


def test_a_writer_that_no_map_names_is_found_in_the_stream(build_model, tokenizer):
    model = build_model("llama", dtype=torch.float32)
    edit = _edit(model)

    def write(_module, _args, output):
        return output + 0.5 * edit.direction.to(output)

    model.model.layers[1].mlp.register_forward_hook(write)
    edited = _edited(model, edit)
    before = verification.stream_along(model, tokenizer, PROMPTS, edit.direction)
    after = verification.stream_along(edited, tokenizer, PROMPTS, edit.direction)
    with pytest.raises(StageError, match=r"at the input of block 2 still reaches"):
        verification.check_stream(before, after, edit, torch.float32)


def test_the_stream_proves_nothing_about_partial_edits(build_model):
    model = build_model("llama")
    reach = torch.ones(3)
    verification.check_stream(reach, reach, _edit(model, 0.5), torch.float32)
    alone = dataclasses.replace(_edit(model), left_alone={"model.embed_tokens": "tied"})
    verification.check_stream(reach, reach, alone, torch.float32)
    with pytest.raises(StageError):
        verification.check_stream(reach, reach, _edit(model), torch.float32)
