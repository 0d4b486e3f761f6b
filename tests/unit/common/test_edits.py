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

from common.architecture import ARCHITECTURES, find_writers
from common.edits import (
    Edit,
    Removal,
    apply_to_weights,
    component_along,
    edited_weight,
    load_edit,
    project,
    save_edit,
)
from common.errors import InputError, StageError
from common.hooks import applied_by_hooks, applied_in_trials
from tests.editing import edit_of, vector

IDS = torch.tensor([[0, 40, 41, 99, 120, 7, 200, 33, 64, 65, 3, 90, 17, 18, 19, 20]])
POST_NORM = tuple(
    name for name, family in ARCHITECTURES.items() if any(w.post_norm for w in family.writers)
)
FAMILIES = sorted(ARCHITECTURES)
ROOT = Path(__file__).resolve().parents[3]


ONE = torch.ones(1, dtype=torch.float64)


def _edit(model, strength=1.0, direction=None):
    return edit_of(
        model, "orthogonalize", *([] if direction is None else [direction]), strength=strength
    )


def _without(weight, basis, layout):
    return edited_weight(weight, basis, torch.ones(len(basis)), "none", layout)


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
        name = f"{writer.name}.{writer.parameter}"
        change = edited.pop(name) - writer.weight
        across = _without(change, edit.basis(writer.name), writer.layout)
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
        basis = edit.basis(writer.name)
        before = component_along(writer.weight, basis, writer.layout)
        after = component_along(edited[writer.name].weight, basis, writer.layout)
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
        wrong.weight.copy_(_without(right.weight, edit.direction[None], "embedding"))
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
        edit, removals={name: Removal(("direction",), (1.0,)) for name in edit.removals}
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
    one, other = _edited(model, _edit(model)), _edited(model, _edit(model, 1.0, -3 * vector()))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_editing_twice_changes_nothing_more(build_model):
    weight = build_model("llama").model.layers[0].mlp.down_proj.weight
    unit = vector() / vector().norm()
    once = _without(weight, unit[None], "linear")
    torch.testing.assert_close(_without(once, unit[None], "linear"), once, rtol=0, atol=1e-14)


def test_project_removes_the_component_and_keeps_the_rest():
    unit = torch.tensor([0.6, 0.8], dtype=torch.float64)
    y = 3 * unit + 2 * torch.tensor([-0.8, 0.6], dtype=torch.float64)
    expected = 2 * torch.tensor([-0.8, 0.6], dtype=torch.float64)
    torch.testing.assert_close(project(y[None], unit[None], ONE)[0], expected)


def test_low_precision_weights_are_edited_in_float32_and_keep_their_type():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    unit = (vector() / vector().norm()).float()
    edited = edited_weight(weight, unit.double()[None], ONE, "none", "linear")
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
from common.edits import Addition, Edit, Removal, save_edit
# A set: its order changes with the hash seed.
names = {f"model.layers.{i}.mlp.down_proj" for i in range(20)}
vectors = {name: torch.arange(4.0) for name in names} | {"direction": torch.ones(4)}
removals = {name: Removal((name,), (0.5,)) for name in names}
additions = {name: Addition(name, 0.5) for name in names}
left_alone = dict.fromkeys(names, "x")
save_edit(Edit(vectors, removals, additions, left_alone, {"a": 1, "b": 2}), Path(sys.argv[1]))
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
            writer.weight.copy_(_without(writer.weight, unit[None], writer.layout))
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


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[2]",
        '{"format": 2}',
        '{"format": 2, "removals": {"x": 1}, "additions": {}, "left_alone": {}, "about": {}}',
        '{"format": 2, "removals": {"x": {"vectors": ["gone"], "strengths": [1.0], "keep_norm": "none"}},'
        ' "additions": {}, "left_alone": {}, "about": {}}',
    ],
)
def test_an_edit_whose_record_is_damaged_is_refused(about, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"direction": torch.ones(3)}, path, metadata={"healing": about})
    with pytest.raises(InputError, match="is damaged"):
        load_edit(path)


def test_tensors_that_are_no_edit_are_refused(tmp_path):
    save_file({"direction": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is no edit of format 2"):
        load_edit(tmp_path / "x.safetensors")


KINDS = {
    "projected": {},
    "biprojected": {"strength": 0.8},
    "column_norm": {"strength": 0.7},
    "row_norm": {"strength": 0.7, "projection": "projected"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit_is_the_same_by_hooks_and_in_the_weights(
    kind, family, build_model, read_stream
):
    model = build_model(family)
    edit = edit_of(model, kind, **KINDS[kind])
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    weighted = read_stream(_edited(model, edit), IDS)
    plain = read_stream(
        _edited(model, _edit(model, edit.strengths(next(iter(edit.removals)))[0])), IDS
    )
    tolerance = 1e-6 if family in POST_NORM else 1e-10
    for one, other in zip(hooked, weighted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert (hooked[-1] - plain[-1]).norm() / plain[-1].norm() > 1e-3, "as if it were plain"


def test_several_directions_are_removed_at_once(build_model, read_stream):
    model = build_model("gemma2")
    one, other = vector(1), vector(2)
    edit = edit_of(model, "orthogonalize", one, other)
    edited = _edited(model, edit)
    for direction in (one, other):
        assert _along(read_stream(edited, IDS), direction / direction.norm()) < 1e-6
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    torch.testing.assert_close(hooked[-1], read_stream(edited, IDS)[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["linear", "conv1d", "experts", "experts_transposed"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.4])
def test_a_column_norm_edit_keeps_every_column_and_a_row_norm_edit_every_row(layout, strength):
    shape = {"linear": (32, 48), "conv1d": (48, 32)}.get(layout)
    shape = shape or ((3, 32, 48) if layout == "experts" else (3, 48, 32))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    last = layout in ("conv1d", "experts_transposed")
    basis = torch.linalg.qr(torch.stack([vector(1), vector(2)]).T)[0].T.contiguous()
    strengths = torch.tensor([strength, strength], dtype=torch.float64)
    for keep, axis in (("column", -1 if last else -2), ("row", -2 if last else -1)):
        edited = edited_weight(weight, basis, strengths, keep, layout)
        torch.testing.assert_close(
            edited.norm(dim=axis), weight.norm(dim=axis), rtol=1e-12, atol=1e-12
        )
        left = component_along(edited, basis, layout).norm()
        before = component_along(weight, basis, layout).norm()
        if keep == "column" and strength == 1:
            assert left < 1e-12 * before
        plain = edited_weight(weight, basis, strengths, "none", layout)
        assert (plain.norm(dim=axis) - weight.norm(dim=axis)).abs().max() > 1e-3


def test_a_row_norm_edit_is_heretics_published_formula():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, strength = vector() / vector().norm(), 0.8
    norms = weight.norm(dim=1)
    unit_rows = weight / norms[:, None]
    a = unit_rows.T @ v
    b = unit_rows @ a
    n = (1 - 2 * strength * v * b + strength**2 * v**2 * (a @ a)).sqrt()
    expected = (weight - strength * torch.outer(norms * v, a)) / n[:, None]
    edited = edited_weight(weight, v[None], strength * ONE, "row", "linear")
    torch.testing.assert_close(edited, expected, rtol=1e-12, atol=1e-12)


def test_a_column_along_the_direction_becomes_nothing_instead_of_infinite():
    weight = torch.randn(32, 4, dtype=torch.float64)
    unit = vector() / vector().norm()
    weight[:, 2] = 3 * unit
    edited = edited_weight(weight, unit[None], ONE, "column", "linear")
    assert edited[:, 2].norm() < 1e-12
    torch.testing.assert_close(edited[:, 0].norm(), weight[:, 0].norm())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gpt_neox", "gpt_oss"])
@pytest.mark.parametrize("keep_norm", ["none", "column", "row"])
def test_trials_in_one_pass_equal_models_edited_one_by_one(
    family, keep_norm, build_model, read_stream
):
    model = build_model(family)
    kind = {"none": "orthogonalize", "column": "column_norm", "row": "row_norm"}[keep_norm]
    edits = [edit_of(model, kind, vector(seed), strength=s) for seed, s in ((1, 1.0), (2, 0.6))]
    ids = torch.cat([IDS, IDS.flip(1)])
    if keep_norm != "none" and family in ("qwen3_moe", "gpt_oss"):
        # The inputs of experts are inside their module: such trials run one at a time.
        with (
            pytest.raises(ValueError, match="cannot share a pass"),
            applied_in_trials(model, edits),
        ):
            pass
        return
    with applied_in_trials(model, edits):
        together = read_stream(model, torch.cat([ids, ids]))
    tolerance = 1e-6 if family in POST_NORM else 1e-10
    for trial, edit in enumerate(edits):
        alone = read_stream(_edited(model, edit), ids)
        for one, other in zip(together, alone, strict=True):
            part = one[2 * trial : 2 * trial + 2]
            torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance)
    assert (together[-1][:2] - together[-1][2:]).norm() / together[-1][:2].norm() > 0.05


def test_an_addition_moves_the_stream_at_its_layer_by_its_amount(build_model, read_stream):
    model = build_model("llama")
    edit = edit_of(model, "add", strength=0.5)
    with applied_by_hooks(model, edit):
        moved = read_stream(model, IDS)
    original = read_stream(model, IDS)
    torch.testing.assert_close(moved[0], original[0])
    expected = original[1] + 0.5 * vector()
    torch.testing.assert_close(moved[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_an_addition_goes_into_a_bias_where_one_reaches_the_stream(
    family, build_model, read_stream
):
    model = build_model(family)
    edit = edit_of(model, "add", strength=-2.0)
    with applied_by_hooks(model, edit):
        hooked = read_stream(model, IDS)
    weighted = read_stream(_edited(model, edit), IDS)
    torch.testing.assert_close(hooked[-1], weighted[-1], rtol=1e-10, atol=1e-10)
    assert (weighted[-1] - read_stream(model, IDS)[-1]).norm() > 1


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_an_addition_without_such_a_bias_is_refused_in_the_weights(family, build_model):
    model = build_model(family)
    with pytest.raises(InputError, match="no bias that could hold it; apply it by hooks"):
        apply_to_weights(model, edit_of(model, "add"))


def test_an_addition_behind_a_norm_is_not_rescaled_by_it(build_model, read_stream):
    model = build_model("gemma2")
    with applied_by_hooks(model, edit_of(model, "add")):
        moved = read_stream(model, IDS)
    torch.testing.assert_close(
        moved[1], read_stream(model, IDS)[1] + vector(), rtol=1e-6, atol=1e-6
    )


def test_the_basis_of_a_writer_is_what_its_removal_names():
    vectors = {"direction": torch.tensor([1.0, 0.0]), "w": torch.tensor([0.0, 1.0])}
    removals = {"a": Removal(("w",), (1.0,)), "b": Removal(("direction", "w"), (0.5, 0.25))}
    edit = Edit(vectors, removals, {}, {}, {})
    assert torch.equal(edit.basis("a"), vectors["w"][None])
    assert torch.equal(edit.basis("b"), torch.eye(2))
    assert edit.strengths("b").tolist() == [0.5, 0.25]
