"""The exported model is the model that was scored, or the stage stops and says so.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_export.py
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliteration import export
from abliteration.prompt_sets import PromptSet
from common import chat
from common.edits import apply_to_weights
from common.errors import StageError
from common.model import load_model
from tests.editing import edit_of, vector

VALIDATION = PromptSet(
    ["do it", "tell me how the other one is made", "why"], ["and the thing", "what is it?"]
)
RECIPE = SimpleNamespace(
    model=SimpleNamespace(dtype="auto"), abliteration=SimpleNamespace(load_in_4bit=False)
)


@pytest.fixture
def saved(build_model, tokenizer, tmp_path):
    """Save a tiny model, and load it as the stage does."""

    def save(family="llama", dtype=torch.float32, **changes):
        folder = tmp_path / family
        build_model(family, dtype=dtype, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, load_model(folder)

    return save


def _export(folder, model, edit, tokenizer):
    scores = export.score(model, tokenizer, VALIDATION, edit, 2)
    output = folder.with_name("model")
    return output, export.write(folder, edit, output, scores, RECIPE, tokenizer, 2)


def _after_writing(monkeypatch, change):
    """Change the tensors of the export between writing and loading."""

    def write(source, edit, output, real=export.apply_to_checkpoint):
        written = real(source, edit, output)
        tensors = load_file(output / "model.safetensors")
        change(tensors, load_file(source / "model.safetensors"))
        save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(export, "apply_to_checkpoint", write)


def _logits(model, tokenizer, prompts):
    """One prompt at a time."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0, -1] for ids in chat.encode(tokenizer, prompts)]
    return torch.stack(rows).double()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize(
    "kind", ["orthogonalize", "projected", "biprojected", "column_norm", "row_norm"]
)
def test_every_kind_of_edit_is_exported_as_it_was_scored(kind, family, saved, tokenizer):
    folder, model = saved(family)
    edit = edit_of(model, kind)
    output, report = _export(folder, model, edit, tokenizer)
    assert report.mismatch < 1e-8 < 1e-4 < report.moved
    assert report.residuals.keys() == edit.removals.keys()
    # And it is the edited model indeed.
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit)
    torch.testing.assert_close(
        _logits(load_model(output), tokenizer, VALIDATION.harmful),
        _logits(edited, tokenizer, VALIDATION.harmful),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_narrow_types_passes(dtype, saved, tokenizer):
    folder, model = saved(dtype=dtype)
    _, report = _export(folder, model, edit_of(model), tokenizer)
    assert report.mismatch < report.moved
    assert max(report.residuals.values()) < 2e-2


def test_partial_edits_tied_embeddings_and_additions_are_exported_too(saved, tokenizer):
    folder, model = saved(tie_word_embeddings=True)
    for edit in (
        edit_of(model, strength=0.6),
        edit_of(model, weights={"mlp": 0.0, "attention": (0.0, 1.0, 0.5)}),
        edit_of(model, "add", strength=0.5),
    ):
        output, report = _export(folder, model, edit, tokenizer)
        assert report.mismatch < 1e-8 < report.moved
    # The folder of the first was replaced by the last.
    assert (output / "additions.safetensors").is_file()


def test_an_export_with_a_writer_left_unedited_is_not_what_was_scored(
    saved, tokenizer, monkeypatch
):
    name = "model.layers.1.mlp.down_proj.weight"
    _after_writing(monkeypatch, lambda after, before: after.update({name: before[name]}))
    folder, model = saved()
    with pytest.raises(StageError, match=r"not the one that was scored: KL .* report it as a bug"):
        _export(folder, model, edit_of(model), tokenizer)


def test_an_export_that_no_longer_computes_is_not_what_was_scored(saved, tokenizer, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"
    _after_writing(monkeypatch, lambda after, _: after[name].fill_(torch.nan))
    folder, model = saved()
    with pytest.raises(StageError, match="not the one that was scored: KL nan"):
        _export(folder, model, edit_of(model), tokenizer)


def test_what_is_due_to_the_batch_is_no_mismatch(saved, tokenizer, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"
    _after_writing(monkeypatch, lambda after, _: after[name].mul_(1.2))
    folder, model = saved()
    with pytest.raises(StageError, match="not the one that was scored"):
        _export(folder, model, edit_of(model), tokenizer)
    monkeypatch.setattr(export, "self_divergence", lambda *_: 10.0)
    _, report = _export(folder, model, edit_of(model), tokenizer)
    assert report.noise == 10
    assert report.mismatch > export.ALLOWED[torch.float32]


def test_a_writer_that_was_missed_stops_the_stage(saved, tokenizer, monkeypatch):
    def write(source, edit, output, real=export.apply_to_checkpoint):
        written = dict(real(source, edit, output))
        del written["model.layers.0.self_attn.o_proj"]
        return written

    monkeypatch.setattr(export, "apply_to_checkpoint", write)
    folder, model = saved()
    with pytest.raises(StageError, match=r"layers\.0\.self_attn\.o_proj was not written"):
        _export(folder, model, edit_of(model), tokenizer)


def test_a_writer_that_no_map_names_stops_the_stage(saved, tokenizer, monkeypatch):
    """It writes in the scored model and in the export alike, so that only the stream shows it."""
    folder, model = saved()
    edit = edit_of(model)

    def write_beside(model):
        model.model.layers[0].mlp.register_forward_hook(
            lambda _module, _args, output: output + 0.5 * edit.direction.to(output)
        )
        return model

    monkeypatch.setattr(export, "load_model", lambda *a, **k: write_beside(load_model(*a, **k)))
    with pytest.raises(StageError, match="something unmapped writes there"):
        _export(folder, write_beside(model), edit, tokenizer)


def test_a_model_that_was_never_whole_in_memory_is_checked_by_its_weights(
    saved, tokenizer, monkeypatch
):
    folder, model = saved()
    edit = edit_of(model)
    monkeypatch.setattr(export, "load_model", None)
    report = export.write(folder, edit, folder.with_name("model"), None, RECIPE, tokenizer, 2)
    assert report.as_data() == {
        "largest_residual": max(report.residuals.values()),
        "export_mismatch_kl": None,
        "edit_kl": None,
        "noise_floor_kl": None,
    }
    assert max(report.residuals.values()) < 1e-4


def test_the_scores_are_those_of_the_edited_model(saved, tokenizer, monkeypatch):
    _, model = saved(dtype=torch.float64)
    edit = edit_of(model, "orthogonalize", vector(3))
    edited = copy.deepcopy(model)
    apply_to_weights(edited, edit)
    scores = export.score(model, tokenizer, VALIDATION, edit, 2)
    assert scores.prompts == [*VALIDATION.harmful, *VALIDATION.harmless]
    before, after = (_logits(each, tokenizer, scores.prompts) for each in (model, edited))
    torch.testing.assert_close(scores.logits.double(), after, rtol=1e-5, atol=1e-6)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    moved = (p.exp() * (p - q)).sum(-1).mean()
    assert scores.moved == pytest.approx(float(moved), rel=1e-5)
    assert scores.noise < 1e-10
    assert scores.reach.shape == (3,)
    # A few prompts of each kind are enough.
    monkeypatch.setattr(export, "SAMPLE", 1)
    sampled = export.score(model, tokenizer, VALIDATION, edit, 2)
    assert sampled.prompts == ["do it", "and the thing"]


def test_where_false_refusal_is_removed_the_sample_is_of_falsely_refused_prompts(saved, tokenizer):
    _, model = saved()
    validation = PromptSet(["do it"], ["the thing"], ["kill the process"])
    scores = export.score(model, tokenizer, validation, edit_of(model), 2)
    assert scores.prompts == ["kill the process", "the thing"]
