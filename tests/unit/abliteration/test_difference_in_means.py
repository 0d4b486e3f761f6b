"""The difference in means finds the direction that was planted.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_difference_in_means.py
"""

import torch

from abliteration.directions.difference_in_means import estimate


def test_it_points_from_harmless_to_harmful_with_the_planted_length():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(3, 2, 16, generator=generator, dtype=torch.float64)
    harmless = torch.randn(3, 2, 16, generator=generator, dtype=torch.float64)
    direction = estimate(harmless + planted, harmless)
    torch.testing.assert_close(direction, planted, rtol=1e-12, atol=1e-12)


def test_it_finds_a_planted_direction_under_noise():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(16, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 400, 16, generator=generator, dtype=torch.float64)
    means = (noise[0] + planted).mean(dim=0), noise[1].mean(dim=0)
    direction = estimate(*(mean[None, None] for mean in means))[0, 0]
    assert torch.cosine_similarity(direction, planted, dim=0) > 0.98
