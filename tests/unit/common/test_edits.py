"""A saved edit does the same by hooks and in the weights, takes out the direction, and only it.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_edits.py
"""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliteration.edits.orthogonalize import build
from common.architecture import ARCHITECTURES, find_writers
from common.edits import (
    Edit,
    Removal,
    applied_by_hooks,
    apply_to_weights,
    component_along,
    load_edit,
    orthogonalize,
    project,
    save_edit,
)
from common.errors import InputError, StageError

IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90, 17, 18, 19, 20]])
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
FAMILIES = sorted(ARCHITECTURES)
ROOT = Path(__file__).resolve().parents[3]


def _direction(seed=7):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _edit(model, strength=1.0, direction=None):
    direction = _direction() if direction is None else direction
    return build(direction, find_writers(model), strength, {})


def _edited(model, edit):
    model = copy.deepcopy(model)
    apply_to_weights(model, edit)
    return model


def _along(stream, direction):
    """The largest share of the stream along a unit direction, over layers and positions."""
    return max(float(((h @ direction).abs() / h.norm(dim=-1)).max()) for h in stream)


def _gone(family):
    """How little must be left along the direction, as a share of the stream."""
    # Norms compute in float32, so what stands behind a norm is off by float32's rounding.
    return 1e-6 if family in POST_NORM else 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_and_weights_give_the_same_residual_stream(family, build_model, read_stream):
    model = build_model(family)
    edit = _edit(model)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    weighted = read_stream(_edited(model, edit), IDS)
    original = read_stream(model, IDS)
    # float32 inside a norm turns a difference of one float64 ulp into one float32 ulp, now and then.
    tolerance = 1e-6 if family in POST_NORM else 1e-10
    for one, other, before in zip(hooked, weighted, original, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert (one - before).norm() / before.norm() > 0.05, "the edit has no effect"


@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_edit_no_writer_moves_the_stream_along_the_direction(
    family, build_model, read_stream
):
    model = build_model(family)
    edit = _edit(model)
    assert _along(read_stream(model, IDS), edit.direction) > 0.1
    assert _along(read_stream(_edited(model, edit), IDS), edit.direction) < _gone(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edit_changes_nothing_across_the_direction(family, build_model):
    model = build_model(family)
    edit = _edit(model)
    edited = dict(_edited(model, edit).named_parameters())
    for writer in find_writers(model):
        vector = edit.vector_of(writer.name)
        name = f"{writer.name}.{writer.parameter}"
        change = edited.pop(name) - writer.weight
        across = orthogonalize(change, vector, 1.0, writer.layout)
        assert across.abs().max() < 1e-12
        assert change.abs().max() > 1e-3
    for name, parameter in edited.items():
        if not name.endswith("bias"):
            assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_a_strength_s_leaves_one_minus_s_of_what_each_writer_wrote(family, strength, build_model):
    model = build_model(family)
    edit = _edit(model, strength)
    edited = {writer.name: writer for writer in find_writers(_edited(model, edit))}
    for writer in find_writers(model):
        vector = edit.vector_of(writer.name)
        before = component_along(writer.weight, vector, writer.layout)
        after = component_along(edited[writer.name].weight, vector, writer.layout)
        torch.testing.assert_close(after, (1 - strength) * before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_hooks_and_weights_agree_at_other_strengths(strength, build_model, read_stream):
    model = build_model("mixtral")
    edit = _edit(model, strength)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    weighted = read_stream(_edited(model, edit), IDS)
    for one, other in zip(hooked, weighted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_biases_of_writers_are_edited_too(build_model, read_stream):
    model = build_model("llama", attention_bias=True, mlp_bias=True)
    edit = _edit(model)
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0.1
    edited = _edited(model, edit)
    assert _along(read_stream(edited, IDS), edit.direction) < 1e-12
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    torch.testing.assert_close(hooked[-1], read_stream(edited, IDS)[-1], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        edited.model.layers[1].mlp.down_proj.bias.add_(0.1 * edit.direction)
    assert _along(read_stream(edited, IDS), edit.direction) > 1e-3


# Mutations: each is a mistake that keeps all shapes, and each must break the property above.


def test_the_wrong_side_of_a_square_output_projection_leaves_the_direction_in(
    build_model, read_stream
):
    model = build_model("llama")
    edit = _edit(model)
    edited = _edited(model, edit)
    wrong, right = edited.model.layers[1].self_attn.o_proj, model.model.layers[1].self_attn.o_proj
    assert right.weight.shape[0] == right.weight.shape[1]
    with torch.no_grad():
        wrong.weight.copy_(orthogonalize(right.weight, edit.direction, 1.0, "embedding"))
    assert _along(read_stream(edited, IDS), edit.direction) > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_skipped_expert_leaves_the_direction_in(family, build_model, read_stream):
    model = build_model(family)
    edit = _edit(model)
    edited = _edited(model, edit)
    left = []
    for expert in range(model.config.num_local_experts if family == "mixtral" else 4):
        mutant = copy.deepcopy(edited)
        with torch.no_grad():
            weight = mutant.model.layers[1].mlp.experts.down_proj
            weight[expert] = model.model.layers[1].mlp.experts.down_proj[expert]
        left.append(_along(read_stream(mutant, IDS), edit.direction))
    assert min(left) > 1e-4


@pytest.mark.parametrize("family", POST_NORM)
def test_removing_the_direction_itself_in_front_of_a_norm_leaves_it_in(
    family, build_model, read_stream
):
    model = build_model(family)
    edit = _edit(model)
    naive = dataclasses.replace(
        edit, removals={name: Removal("direction", 1.0) for name in edit.removals}
    )
    assert _along(read_stream(_edited(model, naive), IDS), edit.direction) > 1e-3


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.2.mlp.down_proj"])
def test_one_writer_left_out_leaves_the_direction_in(name, build_model, read_stream):
    model = build_model("qwen3")
    edit = _edit(model)
    removals = {other: removal for other, removal in edit.removals.items() if other != name}
    partial = dataclasses.replace(edit, removals=removals, left_alone={name: "forgotten"})
    assert _along(read_stream(_edited(model, partial), IDS), edit.direction) > 1e-3


def test_tied_embeddings_are_left_alone_in_both_forms_and_listed(build_model, read_stream):
    model = build_model("llama", tie_word_embeddings=True)
    edit = _edit(model)
    assert edit.left_alone == {"model.embed_tokens": "tied to the unembedding"}
    assert "model.embed_tokens" not in edit.removals
    edited = _edited(model, edit)
    assert torch.equal(edited.lm_head.weight, model.lm_head.weight)
    assert torch.equal(edited.model.embed_tokens.weight, model.model.embed_tokens.weight)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    weighted = read_stream(edited, IDS)
    assert torch.equal(hooked[0], read_stream(model, IDS)[0])
    torch.testing.assert_close(hooked[-1], weighted[-1], rtol=1e-10, atol=1e-10)


def test_hooks_are_gone_after_the_context_even_after_an_error(build_model, read_stream):
    model = build_model("llama")
    before = read_stream(model, IDS)
    with pytest.raises(KeyError), applied_by_hooks(model, _edit(model)):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, read_stream(model, IDS), strict=True))


def test_a_direction_of_any_length_and_sign_gives_the_same_edit(build_model):
    model = build_model("gemma2")
    one, other = _edited(model, _edit(model)), _edited(model, _edit(model, 1.0, -3 * _direction()))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_editing_twice_changes_nothing_more(build_model):
    weight = build_model("llama").model.layers[0].mlp.down_proj.weight
    unit = _direction() / _direction().norm()
    once = orthogonalize(weight, unit, 1.0, "linear")
    torch.testing.assert_close(orthogonalize(once, unit, 1.0, "linear"), once, rtol=0, atol=1e-14)


def test_project_removes_the_component_and_keeps_the_rest():
    unit = torch.tensor([0.6, 0.8], dtype=torch.float64)
    y = 3 * unit + 2 * torch.tensor([-0.8, 0.6], dtype=torch.float64)
    expected = 2 * torch.tensor([-0.8, 0.6], dtype=torch.float64)
    torch.testing.assert_close(project(y, unit, 1.0), expected)


def test_low_precision_weights_are_edited_in_float32_and_keep_their_type():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    unit = (_direction() / _direction().norm()).float()
    edited = orthogonalize(weight, unit.double(), 1.0, "linear")
    assert edited.dtype == torch.bfloat16
    exact = weight.float() - torch.outer(unit, unit @ weight.float())
    assert torch.equal(edited, exact.to(torch.bfloat16))


def test_saving_and_loading_gives_the_same_edit(build_model, tmp_path):
    model = build_model("gemma3_text")
    edit = dataclasses.replace(_edit(model, 0.7), about={"layer": 1, "position": -2, "base": "x"})
    save_edit(edit, tmp_path / "edit.safetensors")
    loaded = load_edit(tmp_path / "edit.safetensors")
    assert dict(loaded.removals) == dict(edit.removals)
    assert loaded.about == edit.about
    assert loaded.left_alone == edit.left_alone
    assert loaded.vectors.keys() == edit.vectors.keys()
    assert all(torch.equal(loaded.vectors[name], edit.vectors[name]) for name in edit.vectors)
    one, other = _edited(model, edit), _edited(model, loaded)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


SAVE = """
import sys
from pathlib import Path
import torch
from common.edits import Edit, Removal, save_edit
# A set: its order changes with the hash seed.
names = {f"model.layers.{i}.mlp.down_proj" for i in range(20)}
vectors = {name: torch.arange(4.0) for name in names} | {"direction": torch.ones(4)}
removals = {name: Removal(name, 0.5) for name in names}
save_edit(Edit(vectors, removals, dict.fromkeys(names, "x"), {"a": 1, "b": 2}), Path(sys.argv[1]))
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SAVE, str(path)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_an_edit_of_another_depth_is_refused_in_both_forms(build_model):
    edit = _edit(build_model("llama", num_hidden_layers=3))
    other = build_model("llama", num_hidden_layers=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match=r"name different writers \(model\.layers\.2.*depth"):
        apply_to_weights(other, edit)
    with pytest.raises(InputError, match="different writers"), applied_by_hooks(other, edit):
        pass
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_an_edit_of_another_family_is_refused(build_model):
    with pytest.raises(InputError, match="different writers"):
        apply_to_weights(build_model("mixtral"), _edit(build_model("llama")))


def test_a_writer_that_does_not_change_is_reported(build_model):
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.down_proj did not change"):
        apply_to_weights(model, _edit(model))


def test_a_direction_that_the_model_does_not_write_is_reported(build_model):
    model = build_model("llama")
    already = _edited(model, _edit(model))
    unit = torch.zeros(32, dtype=torch.float64)
    unit[3] = 1
    with torch.no_grad():
        for writer in find_writers(already):
            writer.weight.copy_(orthogonalize(writer.weight, unit, 1.0, writer.layout))
    with pytest.raises(StageError, match=r"model\.embed_tokens did not change"):
        apply_to_weights(already, _edit(already, 1.0, unit))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read as an edit"), (b"not a tensor file", "cannot be read as an edit")],
)
def test_a_missing_or_damaged_edit_is_refused(content, message, tmp_path):
    path = tmp_path / "edit.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_edit(path)


def test_tensors_that_are_no_edit_are_refused(tmp_path):
    save_file({"direction": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is no edit of format 1"):
        load_edit(tmp_path / "x.safetensors")


def test_the_vector_of_a_writer_is_the_one_its_removal_names():
    vectors = {"direction": torch.tensor([1.0, 0.0]), "w": torch.tensor([0.0, 1.0])}
    edit = Edit(vectors, {"a": Removal("w", 1.0), "b": Removal("direction", 1.0)}, {}, {})
    assert torch.equal(edit.vector_of("a"), vectors["w"])
    assert torch.equal(edit.vector_of("b"), edit.direction)
