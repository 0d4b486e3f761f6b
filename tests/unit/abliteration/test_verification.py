"""What an edit missed is found: in the weights, and in the stream of a model with an unmapped writer.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_verification.py
"""

import copy
import dataclasses

import pytest
import torch

from abliteration import verification
from common.architecture import find_writers
from common.checkpoint import Written
from common.edits import apply_to_weights, component_along, edited_writers
from common.errors import StageError
from tests.editing import edit_of, vector

ROUNDING = verification.ROUNDING[torch.float32]
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PROMPTS = ["a", "the other one", "how is it"]


def _edit(model, strength=1.0):
    return edit_of(model, "orthogonalize", DIRECTION, strength=strength)


def _edited(model, edit):
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit)
    return edited


def _written(model, edited, edit):
    """What the writers of two models write along what is removed, as the streamed export puts on record."""
    models = [edited_writers(each, edit) for each in (model, edited)]
    return {
        name: Written(
            *(
                float(component_along(w[name].weight, edit.basis(name), w[name].layout).norm())
                for w in models
            )
        )
        for name in edit.removals
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_a_whole_edit_passes_in_every_type(dtype, strength, build_model):
    model = build_model("mixtral", dtype=dtype)
    edit = _edit(model, strength)
    written = _written(model, _edited(model, edit), edit)
    ratios = verification.check_coverage(written, edit, dtype)
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
    with pytest.raises(
        StageError, match=r"layers\.1\.self_attn\.o_proj writes 1\.0000 of .* 0\.0000"
    ):
        verification.check_coverage(_written(model, edited, edit), edit, dtype)


def test_a_half_done_edit_does_not_pass_for_a_whole_one(build_model):
    model = build_model("llama")
    edit, half = _edit(model), _edit(model, 0.5)
    with pytest.raises(StageError, match=r"writes 0\.5000 of what it wrote"):
        verification.check_coverage(
            _written(model, _edited(model, half), edit), edit, torch.float64
        )


def test_a_writer_that_nothing_is_on_record_of_is_named(build_model):
    model = build_model("llama")
    edit = _edit(model)
    written = _written(model, _edited(model, edit), edit)
    del written["model.layers.2.mlp.down_proj"]
    with pytest.raises(StageError, match=r"model\.layers\.2\.mlp\.down_proj was not written"):
        verification.check_coverage(written, edit, torch.float64)


def test_a_writer_whose_weight_is_zero_need_not_be_on_record(build_model):
    model = build_model("llama")
    edit = edit_of(model, weights={"embedding": 0.0})
    written = _written(model, _edited(model, edit), edit)
    del written["model.embed_tokens"]
    assert "model.embed_tokens" not in verification.check_coverage(written, edit, torch.float64)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_edit_that_keeps_column_norms_leaves_as_much_as_is_due_or_more(strength, build_model):
    model = build_model("llama")
    edit = edit_of(model, "column_norm", DIRECTION, strength=strength)
    written = _written(model, _edited(model, edit), edit)
    ratios = verification.check_coverage(written, edit, torch.float64)
    assert all(1 - strength - 1e-9 <= ratio < 0.9 for ratio in ratios.values())


def test_a_missed_writer_is_named_where_column_norms_are_kept(build_model):
    model = build_model("llama")
    edit = edit_of(model, "column_norm", DIRECTION)
    written = _written(model, _edited(model, edit), edit)
    missed = {**written, "model.embed_tokens": Written(3.0, 3.0)}
    with pytest.raises(StageError, match=r"model\.embed_tokens .*writes 1\.0000"):
        verification.check_coverage(missed, edit, torch.float64)


def test_several_vectors_are_covered_together(build_model):
    model = build_model("qwen3_moe")
    edit = edit_of(model, "orthogonalize", vector(1), vector(2), strength=0.8)
    written = _written(model, _edited(model, edit), edit)
    ratios = verification.check_coverage(written, edit, torch.float64)
    assert list(ratios.values()) == pytest.approx([0.2] * len(edit.removals))


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
    verification.check_stream(before, after, edit, find_writers(model), ROUNDING)


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
        verification.check_stream(before, after, edit, find_writers(model), ROUNDING)


def test_the_stream_proves_nothing_about_partial_edits(build_model):
    model = build_model("llama")
    reach, writers = torch.ones(3), find_writers(model)
    alone = dataclasses.replace(_edit(model), left_alone={"model.embed_tokens": "tied"})
    rows = edit_of(model, "row_norm", DIRECTION)
    some = edit_of(model, weights={"mlp": (1.0, 0.0, 1.0)})
    adds = edit_of(model, "add", strength=1.0)
    for edit in (_edit(model, 0.5), alone, rows, some, adds):
        verification.check_stream(reach, reach, edit, writers, ROUNDING)
    for edit in (_edit(model), edit_of(model, "column_norm", DIRECTION)):
        with pytest.raises(StageError):
            verification.check_stream(reach, reach, edit, writers, ROUNDING)


@pytest.mark.parametrize("kind", ["orthogonalize", "projected", "column_norm", "biprojected"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_kind_of_edit_is_taken_for_an_unmapped_writer(kind, family, build_model, tokenizer):
    """A biprojected edit removes other vectors from other blocks, and so leaves some of the direction itself."""
    model = build_model(family, dtype=torch.float32)
    edit = edit_of(model, kind, DIRECTION)
    reaches = [
        verification.stream_along(each, tokenizer, PROMPTS, edit.direction)
        for each in (model, _edited(model, edit))
    ]
    assert (float(reaches[1].max()) > 1e-2) == (kind == "biprojected")
    verification.check_stream(*reaches, edit, find_writers(model), ROUNDING)
