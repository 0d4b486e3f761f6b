"""Every estimator finds the direction that was planted, and withstands what it promises to withstand.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_directions.py
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

from abliteration.activations import Activations, clip_outliers
from abliteration.directions.geometric_median import geometric_median
from abliteration.directions.logistic_regression import probe

ESTIMATORS = {
    "difference_in_means": {},
    "geometric_median": {},
    "winsorized_means": {"quantile": 0.995},
    "svd": {"num_directions": 3},
    "logistic_regression": {"l2": 1.0},
}
LAYERS, POSITIONS, WIDTH = 3, 2, 64


def _activations(samples, winsorize=None):
    if winsorize is not None:
        samples = clip_outliers(samples, winsorize)
    return Activations(samples.double().mean(dim=0), len(samples), samples)


def _estimate(name, harmful, harmless, **changes):
    """Estimate from samples [prompts, layers, positions, d_model], as the stage does."""
    settings = SimpleNamespace(name=name, **{**ESTIMATORS[name], **changes})
    winsorize = getattr(settings, "quantile", None)
    module = importlib.import_module(f"abliteration.directions.{name}")
    return module.estimate(
        _activations(harmful, winsorize), _activations(harmless, winsorize), settings
    )


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _planted(prompts=200, strength=5.0):
    """Noise around a common mean, with one direction per cell planted into the harmful half."""
    planted = torch.nn.functional.normalize(_normal(LAYERS, POSITIONS, WIDTH, seed=1), dim=-1)
    mean = 3 * _normal(LAYERS, POSITIONS, WIDTH, seed=2)
    noise = 0.2 * _normal(2, prompts, LAYERS, POSITIONS, WIDTH)
    return noise[0] + mean + strength * planted, noise[1] + mean, planted


def _cosine(found, expected):
    return torch.cosine_similarity(found, expected, dim=-1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_finds_the_planted_direction_of_every_layer_and_position(name):
    harmful, harmless, planted = _planted()
    found = _estimate(name, harmful, harmless)
    k = 3 if name == "svd" else 1
    assert found.shape == (LAYERS, POSITIONS, k, WIDTH)
    assert found.dtype == torch.float64
    assert (_cosine(found[:, :, 0], planted) > 0.99).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_its_length_is_what_separates_the_prompts(name):
    harmful, harmless, _ = _planted()
    lengths = _estimate(name, harmful, harmless)[:, :, 0].norm(dim=-1)
    assert (lengths > 4.8).all()
    assert (lengths < 5.2).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_prompts_does_not_matter(name):
    harmful, harmless, _ = _planted(prompts=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    found = _estimate(name, harmful, harmless)
    # Both sets in the same new order: the pairs of the SVD stay together.
    other = _estimate(name, harmful[order], harmless[order])
    torch.testing.assert_close(found, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_prompts_that_do_not_differ_give_zeros_and_spoil_no_other_layer(name):
    harmful, harmless, planted = _planted(prompts=30)
    fixed = _normal(POSITIONS, WIDTH, seed=5).float()
    harmful, harmless = harmful.float(), harmless[:20].float()
    harmful[:, 0] = harmless[:, 0] = fixed
    found = _estimate(name, harmful, harmless)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert (_cosine(found[1:, :, 0], planted[1:]) > 0.9).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_cell_without_finite_numbers_spoils_no_other(name):
    harmful, harmless, _ = _planted(prompts=20)
    found = _estimate(name, harmful, harmless)
    harmful[3, 1, 0, 5] = torch.nan
    spoiled = _estimate(name, harmful, harmless)
    assert torch.equal(found[[0, 2]], spoiled[[0, 2]])
    # The SVD takes a layer's positions one by one, the rest do too.
    assert torch.equal(found[1, 1], spoiled[1, 1])


def test_an_outlier_prompt_moves_the_mean_and_not_the_median():
    harmful, harmless, planted = _planted(prompts=50)
    harmful[7] = 2000 * _normal(LAYERS, POSITIONS, WIDTH, seed=9)
    mean, median = (
        _estimate(name, harmful, harmless)[:, :, 0]
        for name in ("difference_in_means", "geometric_median")
    )
    assert (_cosine(mean, planted) < 0.5).all()
    assert (_cosine(median, planted) > 0.98).all()


def test_outlying_coordinates_move_the_mean_and_not_the_winsorized_mean():
    width = 400
    planted = torch.nn.functional.normalize(_normal(1, 1, width, seed=1), dim=-1)
    noise = 0.2 * _normal(2, 60, 1, 1, width)
    harmful, harmless = noise[0] + 5 * planted, noise[1]
    # Massive activations: one coordinate, huge in some prompts and small in others.
    harmful[::3, :, :, 17] = 3000.0
    mean, clipped = (
        _estimate(name, harmful, harmless, **changes)[:, :, 0]
        for name, changes in (("difference_in_means", {}), ("winsorized_means", {"quantile": 0.99}))
    )
    assert (_cosine(mean, planted) < 0.1).all()
    assert (_cosine(clipped, planted) > 0.95).all()


def test_the_geometric_median_has_the_smallest_sum_of_distances():
    points = _normal(31, 2, 8) ** 3
    median = geometric_median(points)

    def total(place):
        return (points - place).norm(dim=-1).sum(dim=0)

    for seed in range(20):
        nearby = median + 1e-3 * _normal(2, 8, seed=seed)
        assert (total(median) < total(nearby)).all()
    # A stationary point: the unit vectors to all points cancel.
    pull = torch.nn.functional.normalize(points - median, dim=-1).sum(dim=0)
    assert pull.norm(dim=-1).max() < 1e-4


def test_the_geometric_median_may_be_one_of_the_points():
    points = torch.cat([torch.zeros(3, 1, 4), torch.eye(4)[:2, None]]).double()
    assert torch.equal(geometric_median(points), torch.zeros(1, 4, dtype=torch.float64))
    # Begun on a point that is not the median, it leaves it.
    square = torch.tensor([[0.0, 0.0], [0, 0], [4, 0], [0, 4], [4, 4], [4, 3], [3, 4]]).double()
    found = geometric_median(square)
    assert (square - found).norm(dim=-1).sum() < (square - square[0]).norm(dim=-1).sum()


def test_svd_keeps_the_mean_difference_to_the_last_bit():
    harmful, harmless, _ = _planted(prompts=50)
    mean = _estimate("difference_in_means", harmful, harmless)
    assert torch.equal(_estimate("svd", harmful, harmless)[:, :, :1], mean)
    # Unequal numbers of prompts: the pairs are fewer, the mean is still of all.
    mean = _estimate("difference_in_means", harmful, harmless[:31])
    assert torch.equal(_estimate("svd", harmful, harmless[:31])[:, :, :1], mean)


def test_svd_finds_what_varies_beside_the_mean():
    harmful, harmless, planted = _planted(prompts=300)
    second = _normal(WIDTH, seed=4)
    second -= (second @ planted[1, 1]) * planted[1, 1]
    second /= second.norm()
    harmful[:, 1, 1] += 6 * _normal(300, 1, seed=6) * second
    found = _estimate("svd", harmful, harmless)[1, 1]
    assert _cosine(found[1], second).abs() > 0.99
    unit = torch.cat([found[:1] / found[0].norm(), found[1:]])
    torch.testing.assert_close(unit @ unit.T, torch.eye(3).double(), rtol=0, atol=1e-10)


def test_svd_gives_zeros_where_prompts_do_not_vary_in_as_many_ways():
    harmful, harmless, _ = _planted(prompts=2)
    found = _estimate("svd", harmful, harmless, num_directions=5)
    assert (found[:, :, :2].norm(dim=-1) > 0.5).all()
    # Two pairs whose mean is taken out vary in one way.
    assert torch.equal(found[:, :, 2:], torch.zeros_like(found[:, :, 2:]))


def test_the_probe_is_nearer_to_the_best_direction_where_noise_has_a_preferred_axis():
    width, prompts = 16, 400
    scale = torch.ones(width, dtype=torch.float64)
    scale[:8] = 6.0
    gap = torch.ones(width, dtype=torch.float64)
    noise = scale * _normal(2, prompts, 1, 1, width)
    harmful, harmless = noise[0] + gap, noise[1] - gap
    best = gap / scale.square()  # Fisher's discriminant: inverse covariance times the gap
    mean, probed = (
        _estimate(name, harmful, harmless)[0, 0, 0]
        for name in ("difference_in_means", "logistic_regression")
    )
    assert _cosine(probed, best) > 0.97
    assert _cosine(mean, best) < 0.8


def test_the_probe_is_the_minimum_of_its_penalised_loss():
    rows, labels = _normal(30, 50), (torch.arange(30) % 2).double()
    rows[labels == 1] += 0.3
    weights = torch.cat([probe(rows, labels, 0.7), torch.zeros(1)]).requires_grad_()
    wide = torch.cat([rows, torch.ones(30, 1)], dim=1)
    with torch.no_grad():  # the intercept is not returned: find it along its own axis
        for _ in range(200):
            excess = ((wide @ weights).sigmoid() - labels).sum() + 0.7 * weights[-1]
            weights[-1] -= 0.1 * excess
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        wide @ weights, labels, reduction="sum"
    )
    (loss + 0.35 * weights @ weights).backward()
    assert weights.grad.abs().max() < 1e-5


def test_the_probe_separates_what_is_separable_and_stays_finite():
    harmful, harmless, planted = _planted(prompts=100, strength=500.0)
    found = _estimate("logistic_regression", harmful, harmless, l2=1e-6)
    assert found.isfinite().all()
    assert (_cosine(found[:, :, 0], planted) > 0.99).all()
