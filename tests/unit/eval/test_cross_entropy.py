"""The cross-entropy of plain text.

Run: python -m pytest tests/unit/eval/test_cross_entropy.py
"""

import json
import math
from pathlib import Path

import pytest
import torch

from common.errors import InputError, StageError
from common.recipe import CrossEntropy, Recipe
from eval import stage
from eval.benchmarks import Subject, cross_entropy

TEXTS = ["The rain fell.", "A longer line about a river, and a boat on it.", "No.", "x"]


def spec_of(tmp_path: Path, texts: list[str], **settings) -> CrossEntropy:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = {"path": str(path), "column": "text"}
    return CrossEntropy(name="cross_entropy", panel="prose", documents=documents, **settings)


def test_a_document_is_read_as_it_is_read_alone(byte_tokenizer, make_model, tmp_path) -> None:
    model = make_model(0)
    (loaded,) = cross_entropy.load(spec_of(tmp_path, TEXTS), byte_tokenizer, batch_size=2)
    items = loaded.score(Subject("original", model, model))
    assert len(items) == 3  # nothing predicts the only token of the last
    for item, text in zip(items, TEXTS, strict=False):
        ids = torch.tensor([byte_tokenizer.encode(text)])
        with torch.inference_mode():
            expected = float(model(ids, labels=ids).loss)  # the mean over all tokens but the first
        assert item.details["num_tokens"] == ids.shape[1] - 1
        assert item.value == pytest.approx(expected, abs=1e-4)
        assert item.details["nll"] == pytest.approx(expected * (ids.shape[1] - 1), rel=1e-4)


def test_documents_are_cut_at_the_limit_and_at_the_models_own(
    byte_tokenizer, make_model, tmp_path
) -> None:
    model = make_model(0)  # it has 256 positions
    for limit, expected in ((10, 9), (2000, 255)):
        spec = spec_of(tmp_path, ["word " * 100], max_tokens=limit)
        (loaded,) = cross_entropy.load(spec, byte_tokenizer, batch_size=2)
        (item,) = loaded.score(Subject("original", model, model))
        assert item.details["num_tokens"] == expected


def test_a_damaged_model_is_worse_at_text_that_it_knew(
    byte_tokenizer, make_model, tmp_path
) -> None:
    model, damaged = make_model(0), make_model(0)
    ids = torch.tensor([byte_tokenizer.encode(TEXTS[1])])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.model.layers[1].mlp.down_proj.weight.zero_()
    (loaded,) = cross_entropy.load(spec_of(tmp_path, TEXTS[1:2]), byte_tokenizer, batch_size=2)
    (before,) = loaded.score(Subject("original", model, model))
    (after,) = loaded.score(Subject("abliterated", damaged, model))
    assert after.value > before.value + 0.1


def test_text_without_a_token_to_predict_is_the_users_matter(byte_tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match="no document of prose has two tokens"):
        cross_entropy.load(spec_of(tmp_path, ["x", "y"]), byte_tokenizer, batch_size=2)


def test_a_model_without_numbers_is_told(byte_tokenizer, make_model, tmp_path) -> None:
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    (loaded,) = cross_entropy.load(spec_of(tmp_path, TEXTS), byte_tokenizer, batch_size=2)
    with pytest.raises(StageError, match="gives document 0 of prose no probability"):
        loaded.score(Subject("healed", model, model))


def test_the_content_counts_and_not_the_path(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = spec_of(tmp_path / "a", TEXTS), spec_of(tmp_path / "b", TEXTS)
    assert cross_entropy.inputs(one) == cross_entropy.inputs(other)
    assert cross_entropy.inputs(one) != cross_entropy.inputs(spec_of(tmp_path, TEXTS[1:]))
    assert cross_entropy.texts(one) == {"prose": TEXTS}


def test_a_recipe_measures_and_gates_it(finished, tmp_path) -> None:
    data = finished.recipe.model_dump(mode="json")
    data["eval"]["benchmarks"] = [spec_of(tmp_path, TEXTS).model_dump(mode="json")]
    data["eval"]["accept"] = {"cross_entropy[prose].gap.high": {"max": 0.1}}
    recipe = Recipe.model_validate(data)
    assert stage.check(recipe) == []
    data["eval"]["accept"] = {"cross_entropy[verse].gap.high": {"max": 0.1}}
    with pytest.raises(ValueError, match="is not a cross_entropy panel of this recipe"):
        Recipe.model_validate(data)
    data["eval"]["accept"] = {}
    data["eval"]["benchmarks"][0]["documents"]["path"] = str(tmp_path / "nowhere.jsonl")
    (problem,) = stage.check(Recipe.model_validate(data))
    assert problem.startswith("eval.benchmarks[0].documents: ")
