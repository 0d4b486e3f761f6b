"""A direction is placed at every writer as that writer needs it.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_placement.py
"""

import pytest
import torch

from abliteration.placement import at_layer, orthonormal, projected, vectors_at, without
from abliteration.strengths import kernel_weight, layer_problems
from common.architecture import ARCHITECTURES, find_writers
from common.recipe import EditWeights, LayerKernel
from tests.editing import direction_of, edit_of, vector

POST_NORM = [
    name for name, family in ARCHITECTURES.items() if any(w.post_norm for w in family.writers)
]


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_writer_is_removed_from_or_listed(family, build_model):
    model = build_model(family)
    edit = edit_of(model, strength=0.8, about={"layer": 3})
    assert set(edit.removals) == {writer.name for writer in find_writers(model)}
    assert {removal.strengths for removal in edit.removals.values()} == {(0.8,)}
    assert edit.about == {"layer": 3}
    for unit in edit.vectors.values():
        assert unit.dtype == torch.float64
        assert unit.norm() == pytest.approx(1, abs=1e-12)
    assert torch.cosine_similarity(edit.direction, vector(), dim=0) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("family", POST_NORM)
def test_what_passes_a_norm_loses_its_component_behind_the_norm(family, build_model):
    model = build_model(family)
    edit = edit_of(model)
    outputs = torch.randn(50, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for writer in find_writers(model)[1:]:
        unit = edit.basis(writer.name)[0]
        # Any output without u has, once scaled by the gain, nothing along v.
        left = outputs - (outputs @ unit)[:, None] * unit
        assert ((left * writer.post_norm_gain) @ edit.direction).abs().max() < 1e-12
        naive = outputs - (outputs @ edit.direction)[:, None] * edit.direction
        assert ((naive * writer.post_norm_gain) @ edit.direction).abs().max() > 0.1


def test_a_tied_embedding_is_listed_with_the_reason(build_model):
    edit = edit_of(build_model("llama", tie_word_embeddings=True))
    assert edit.left_alone == {"model.embed_tokens": "tied to the unembedding"}
    assert "model.embed_tokens" not in edit.removals


def test_a_projected_direction_keeps_the_harmless_mean_of_its_layer():
    direction = direction_of(layer=1.25)
    mean = 0.75 * direction.harmless[1] + 0.25 * direction.harmless[2]
    assert (projected(direction) @ mean).abs().max() < 1e-12 * mean.norm()
    assert (direction.vectors @ mean).abs().max() > 1e-3
    # Nothing else is taken away.
    rest = direction.vectors[0] - projected(direction)[0]
    assert torch.cosine_similarity(rest, mean, dim=0).abs() == pytest.approx(1)


def test_a_biprojected_direction_keeps_the_harmless_mean_of_every_block(build_model):
    model = build_model("llama")
    direction = direction_of()
    for writer in find_writers(model):
        placed = vectors_at(direction, "biprojected", writer)
        mean = direction.harmless[writer.block or 0]
        assert (placed @ mean).abs().max() < 1e-12 * mean.norm()
    edit = edit_of(model, "biprojected")
    assert not torch.allclose(
        edit.basis("model.layers.0.mlp.down_proj"), edit.basis("model.layers.2.mlp.down_proj")
    )


def test_a_component_much_larger_than_the_rest_leaves_nothing_behind():
    axis, rest = vector(1), vector(2)
    mixed = rest + 1e9 * axis
    left = without(mixed[None], axis)[0]
    assert (left @ axis).abs() < 1e-9 * mixed.norm() * 1e-6


def test_without_a_zero_vector_changes_nothing():
    assert torch.equal(
        without(vector()[None], torch.zeros(32, dtype=torch.float64)), vector()[None]
    )


def test_an_orthonormal_basis_keeps_the_first_direction():
    basis = orthonormal(torch.stack([vector(1), vector(2), vector(1) + 1e-3 * vector(3)]))
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    assert torch.cosine_similarity(basis[0], vector(1), dim=0) == pytest.approx(1)


def test_between_two_layers_values_are_mixed_in_proportion():
    per_layer = torch.tensor([[0.0], [10.0], [30.0]])
    assert at_layer(per_layer, 2).item() == 30
    assert at_layer(per_layer, 1.25).item() == 15


def test_the_kernel_is_heretics_triangle():
    kernel = LayerKernel(
        max_weight=1.2, max_weight_position=4, min_weight=0.2, min_weight_distance=2.5
    )
    weights = [kernel_weight(kernel, layer) for layer in range(9)]
    assert weights == pytest.approx([0, 0, 0.4, 0.8, 1.2, 0.8, 0.4, 0, 0])


def test_weights_by_component_and_layer_multiply_the_strength(build_model):
    model = build_model("qwen3_moe")
    weights = EditWeights(
        embedding=0.0,
        attention=(0.0, 0.5, 1.0),
        mlp=LayerKernel(max_weight_position=2, min_weight=0.25, min_weight_distance=1.0),
    )
    edit = edit_of(model, strength=0.8, weights=weights)
    strengths = {name: removal.strengths[0] for name, removal in edit.removals.items()}
    assert strengths == pytest.approx(
        {
            "model.embed_tokens": 0,
            "model.layers.0.self_attn.o_proj": 0,
            "model.layers.1.self_attn.o_proj": 0.4,
            "model.layers.2.self_attn.o_proj": 0.8,
            "model.layers.0.mlp.down_proj": 0,
            "model.layers.1.mlp.experts": 0.2,
            "model.layers.2.mlp.experts": 0.8,
        }
    )


def test_weights_that_do_not_fit_the_depth_are_problems():
    weights = EditWeights(
        attention=(1.0, 1.0), mlp=LayerKernel(max_weight_position=40, min_weight_distance=2)
    )
    first, second = layer_problems(weights, 3)
    assert "attention: holds 2 numbers, but the model has 3 layers" in first
    assert "mlp: the kernel reaches none of the model's 3 layers" in second
    assert layer_problems(EditWeights(), 3) == []
