"""The edit that is built for a direction names every writer and the vector that each needs.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_orthogonalize.py
"""

import pytest
import torch

from abliteration.edits.orthogonalize import build
from common.architecture import ARCHITECTURES, find_writers

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_writer_is_removed_from_or_listed(family, build_model):
    writers = find_writers(build_model(family))
    edit = build(DIRECTION, writers, 0.8, {"layer": 3})
    assert set(edit.removals) == {writer.name for writer in writers}
    assert {removal.strength for removal in edit.removals.values()} == {0.8}
    assert edit.about == {"layer": 3}
    for vector in edit.vectors.values():
        assert vector.dtype == torch.float64
        assert vector.norm() == pytest.approx(1, abs=1e-12)
    cosine = torch.cosine_similarity(edit.direction, DIRECTION.double(), dim=0)
    assert cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_what_passes_a_norm_loses_its_component_behind_the_norm(family, build_model):
    writers = find_writers(build_model(family))
    edit = build(DIRECTION, writers, 1.0, {})
    outputs = torch.randn(50, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for writer in writers[1:]:
        vector = edit.vector_of(writer.name)
        # Any output without u has, once scaled by the gain, nothing along v.
        left = outputs - (outputs @ vector)[:, None] * vector
        assert ((left * writer.post_norm_gain) @ edit.direction).abs().max() < 1e-12
        naive = outputs - (outputs @ edit.direction)[:, None] * edit.direction
        assert ((naive * writer.post_norm_gain) @ edit.direction).abs().max() > 0.1


def test_a_tied_embedding_is_listed_with_the_reason(build_model):
    edit = build(DIRECTION, find_writers(build_model("llama", tie_word_embeddings=True)), 1.0, {})
    assert edit.left_alone == {"model.embed_tokens": "tied to the unembedding"}
    assert "model.embed_tokens" not in edit.removals
