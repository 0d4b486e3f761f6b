"""What the report says of directions is what was planted in them.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_geometry.py
"""

import math

import pytest
import torch

from abliteration.geometry import (
    cosine_between_layers,
    projections,
    relative_difference,
    separation,
)

GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_planted_angles_between_layers_are_found_at_their_position():
    axes = torch.eye(3, dtype=torch.float64)
    angle = math.pi / 3
    turned = math.cos(angle) * axes[0] + math.sin(angle) * axes[1]
    # Two positions: at the first the layers turn by 60 degrees and reverse, at the second they agree.
    directions = torch.stack(
        [
            torch.stack([5 * axes[0], axes[2]]),
            torch.stack([0.1 * turned, 3 * axes[2]]),
            torch.stack([-axes[0], 7 * axes[2]]),
        ]
    )
    first, second = torch.tensor(cosine_between_layers(directions), dtype=torch.float64)
    expected = torch.tensor([[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.ones(3, 3, dtype=torch.float64))


def test_a_direction_of_no_length_has_no_angle():
    cosines = cosine_between_layers(torch.stack([torch.zeros(1, 4), torch.ones(1, 4)]))[0]
    assert math.isnan(cosines[0][0])
    assert math.isnan(cosines[0][1])
    assert cosines[1][1] == pytest.approx(1)


def test_the_relative_difference_does_not_grow_with_the_stream():
    harmful, harmless = _random(3, 2, 8), _random(3, 2, 8)
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).reshape(3, 1, 1)
    same = [relative_difference(harmful[:1] * s, harmless[:1] * s)[0] for s in scale]
    assert same[1] == pytest.approx(same[0])
    assert same[2] == pytest.approx(same[0])
    # Opposite vectors of one length are two lengths apart.
    assert relative_difference(harmful, -harmful)[0] == pytest.approx([2.0, 2.0])


def test_planted_separation_is_found_layer_by_layer():
    num_prompts, axis = 4000, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    planted = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    harmless = _random(num_prompts, 3, 3)
    harmful = _random(num_prompts, 3, 3) + planted[:, None] * axis
    found = separation(harmful, harmless, 9 * axis.expand(3, 3))
    assert found == pytest.approx(planted.tolist(), abs=0.1)


def test_separation_is_in_standard_deviations_and_has_no_sign():
    harmful, harmless, directions = _random(50, 2, 4) + 1, _random(50, 2, 4), _random(2, 4)
    found = separation(harmful, harmless, directions)
    assert separation(7 * harmful, 7 * harmless, directions) == pytest.approx(found)
    assert separation(harmless, harmful, -directions) == pytest.approx(found)


def test_projections_are_components_in_units_of_the_stream():
    direction = _random(1, 5)
    unit = direction / direction.norm()
    streams = (torch.tensor([2.0, -3.0], dtype=torch.float64)[:, None] * unit).reshape(2, 1, 5)
    assert projections(streams, 100 * direction).flatten().tolist() == pytest.approx([2, -3])
