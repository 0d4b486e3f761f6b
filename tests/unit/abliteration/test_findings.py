"""What the prompts differ in, between layers too; and false refusal without what it shares with true refusal.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_findings.py
"""

import pytest
import torch

from abliteration.activations import Activations
from abliteration.findings import Findings, find, keep_true_refusal
from abliteration.placement import orthonormal
from abliteration.prompt_sets import PromptSet
from common.errors import StageError
from common.recipe import COMPONENTS

LAYERS, POSITIONS, WIDTH = 4, 2, 24


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _findings(directions):
    means = _random(LAYERS, POSITIONS, WIDTH, seed=9)
    return Findings(directions, means, means + directions[:, :, 0])


def _cosine(one, other):
    return float(torch.cosine_similarity(one, other, dim=-1))


def test_at_a_whole_layer_the_direction_is_what_was_measured():
    directions = _random(LAYERS, POSITIONS, 1, WIDTH)
    findings = _findings(directions)
    found = findings.at(2, -1)
    assert torch.equal(found.vectors, directions[2, -1])
    assert torch.equal(found.harmless, findings.harmless[:, -1])
    assert found.layer == 2


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_between_two_layers_unit_vectors_are_mixed_in_proportion(share):
    directions = _random(LAYERS, POSITIONS, 1, WIDTH)
    # Lengths grow along the depth; they must not decide which layer counts.
    directions[2] *= 50
    found = _findings(directions).at(1 + share, -2)
    lower, upper = directions[1, -2, 0], directions[2, -2, 0]
    mixed = (1 - share) * lower / lower.norm() + share * upper / upper.norm()
    assert _cosine(found.vectors[0], mixed) == pytest.approx(1, abs=1e-12)
    assert _cosine(found.vectors[0], (1 - share) * lower + share * upper) < 0.995
    length = (1 - share) * lower.norm() + share * upper.norm()
    assert float(found.vectors[0].norm()) == pytest.approx(float(length))


def test_towards_a_whole_layer_the_direction_is_continuous():
    findings = _findings(_random(LAYERS, POSITIONS, 1, WIDTH))
    for near in (1 - 1e-9, 1 + 1e-9):
        torch.testing.assert_close(
            findings.at(near, -1).vectors, findings.at(1, -1).vectors, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("layer", [0.0, 0.5])
def test_where_the_prompts_do_not_differ_there_is_no_direction(layer):
    directions = _random(LAYERS, POSITIONS, 1, WIDTH)
    directions[0, 1] = 0
    findings = _findings(directions)
    with pytest.raises(StageError, match=rf"do not differ at layer {layer:g}, position -1"):
        findings.at(layer, -1)
    findings.at(layer, -2)
    findings.at(1.0, -1)


def test_what_is_not_finite_is_no_direction():
    directions = _random(LAYERS, POSITIONS, 1, WIDTH)
    directions[1, 0, 0, 3] = torch.nan
    with pytest.raises(StageError):
        _findings(directions).at(1.5, -2)


@pytest.mark.parametrize("layer", [1, 1.5])
def test_ways_in_which_the_prompts_do_not_vary_are_left_out(layer):
    directions = _random(LAYERS, POSITIONS, 3, WIDTH)
    directions[1, 0, 2] = 0
    vectors = _findings(directions).at(layer, -2).vectors
    assert vectors.shape == (2, WIDTH)
    basis = orthonormal(vectors)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    assert _findings(directions).at(layer, -1).vectors.shape == (3, WIDTH)


# False refusal.


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shared", [0.0, 0.7, -5.0, 1e6])
def test_of_two_planted_directions_only_the_false_one_is_left(k, shared):
    """False refusal is b + c a, true refusal a."""
    a = _random(LAYERS, POSITIONS, k, WIDTH, seed=1)
    b = _random(LAYERS, POSITIONS, k, WIDTH, seed=2)
    for layer in range(LAYERS):
        for position in range(POSITIONS):
            axes = orthonormal(a[layer, position])
            b[layer, position] -= b[layer, position] @ axes.T @ axes
    found = keep_true_refusal(b + shared * a, a)
    torch.testing.assert_close(found, b, rtol=1e-9, atol=1e-9 * max(1, abs(shared)))
    assert (found @ a.mT).abs().max() < 1e-9 * max(1, abs(shared))


@pytest.mark.parametrize("k", [1, 3])
def test_removing_false_refusal_leaves_what_lies_along_true_refusal(k):
    a = _random(LAYERS, POSITIONS, k, WIDTH, seed=1)
    false = _random(LAYERS, POSITIONS, k, WIDTH, seed=2) + 2 * a
    activations = _random(50, WIDTH, seed=3)

    def left(directions):
        basis = orthonormal(directions[2, 1])
        return activations - activations @ basis.T @ basis

    axes = orthonormal(a[2, 1])
    along = activations @ axes.T
    kept = left(keep_true_refusal(false, a))
    torch.testing.assert_close(kept @ axes.T, along, rtol=1e-10, atol=1e-10)
    assert (kept - activations).abs().max() > 0.1
    # Without the orthogonalization true refusal would have gone as well.
    assert (left(false) @ axes.T - along).abs().max() > 0.1


def test_directions_are_told_apart_layer_by_layer_and_position_by_position():
    false, true = (_random(LAYERS, POSITIONS, 1, WIDTH, seed=seed) for seed in (1, 2))
    found = keep_true_refusal(false, true)
    for layer in range(LAYERS):
        for position in range(POSITIONS):
            assert found[layer, position] @ true[layer, position, 0] == pytest.approx(0, abs=1e-12)
    assert (found[0, 0] @ true[1, 0, 0]).abs() > 1e-3


def test_where_false_refusal_is_true_refusal_nothing_is_left():
    true = _random(LAYERS, POSITIONS, 1, WIDTH)
    found = keep_true_refusal(2.5 * true, true)
    assert not found.any(), "rounding must not pass for a direction"
    with pytest.raises(StageError, match="do not differ"):
        _findings(found).at(1, -1)


def test_where_there_is_no_true_refusal_false_refusal_stays():
    false = _random(LAYERS, POSITIONS, 2, WIDTH)
    true = torch.zeros_like(false)
    assert torch.equal(keep_true_refusal(false, true), false)
    true[:, :, 0] = _random(LAYERS, POSITIONS, WIDTH, seed=5)  # fewer ways than were asked for
    found = keep_true_refusal(false, true)
    assert found.isfinite().all()
    assert (found @ true.mT).abs().max() < 1e-12


# From prompts to findings.


def _collect(means):
    """Stands in for reading a model: each set of prompts has known means."""

    def collect(sets, quantile, files):
        collect.asked = (list(map(list, sets)), quantile, files)
        read = []
        for prompts in sets:
            samples = means[prompts[0][0]] + 1e-3 * _random(
                len(prompts), LAYERS, POSITIONS, WIDTH, seed=len(prompts)
            )
            read.append(Activations(samples.mean(dim=0), len(prompts), samples))
        return read

    return collect


def _settings(name, **changes):
    return COMPONENTS["abliteration.direction"][name](name=name, **changes)


ESTIMATORS = {
    "difference_in_means": {},
    "geometric_median": {},
    "winsorized_means": {"quantile": 0.9},
    "svd": {"num_directions": 1},
}
MEANS = {letter: _random(LAYERS, POSITIONS, WIDTH, seed=ord(letter)) for letter in "hnf"}
PROMPTS = PromptSet(["h1", "h2", "h3"], ["n1", "n2", "n3"])


@pytest.mark.parametrize(("name", "settings"), ESTIMATORS.items())
def test_every_estimator_finds_the_planted_difference(name, settings, tmp_path):
    collect = _collect(MEANS)
    findings = find(_settings(name, **settings), PROMPTS, collect, tmp_path)
    planted = MEANS["h"] - MEANS["n"]
    assert findings.directions.shape == (LAYERS, POSITIONS, 1, WIDTH)
    cosines = torch.cosine_similarity(findings.directions[:, :, 0], planted, dim=-1)
    assert cosines.min() > 0.999
    torch.testing.assert_close(findings.harmless, MEANS["n"], rtol=0, atol=0.01)
    torch.testing.assert_close(findings.target, MEANS["h"], rtol=0, atol=0.01)
    sets, quantile, files = collect.asked
    assert sets == [PROMPTS.harmless, PROMPTS.harmful]
    assert quantile == settings.get("quantile")
    assert (files is None) == (name in ("difference_in_means", "winsorized_means"))


@pytest.mark.parametrize(("name", "settings"), ESTIMATORS.items())
def test_false_refusal_is_estimated_without_true_refusal(name, settings, tmp_path):
    prompts = PromptSet(["h1", "h2", "h3"], ["n1", "n2"], ["f1", "f2"])
    collect = _collect(MEANS)
    findings = find(_settings(name, **settings), prompts, collect, tmp_path)
    true, false = MEANS["h"] - MEANS["n"], MEANS["f"] - MEANS["n"]
    axis = true / true.norm(dim=-1, keepdim=True)
    expected = false - (false * axis).sum(-1, keepdim=True) * axis
    found = findings.directions[:, :, 0]
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999
    assert torch.cosine_similarity(found, true, dim=-1).abs().max() < 1e-2
    assert torch.cosine_similarity(false, true, dim=-1).abs().min() > 1e-2
    torch.testing.assert_close(findings.target, MEANS["f"], rtol=0, atol=0.01)
    if collect.asked[2] is not None:
        assert len(set(collect.asked[2])) == 3
        assert {path.parent for path in collect.asked[2]} == {tmp_path}
