"""The command applies edits and bare directions, shows what they hold, and never ends in a traceback.

Run: make setup && .venv/bin/python -m pytest tests/unit/abliteration/test_command.py
"""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from abliteration.__main__ import main
from common.architecture import find_writers
from common.edits import Addition, Edit, Removal, component_along, save_edit
from common.model import load_model


def _direction(seed=7):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def edit_file(model_folder, tmp_path):
    unit = _direction() / _direction().norm()
    removals = {
        w.name: Removal(("direction",), (0.5 if ".1." in w.name else 1.0,))
        for w in find_writers(load_model(model_folder))
    }
    about = {"base_model": "tiny", "layer": 1, "position": -2}
    save_edit(Edit({"direction": unit}, removals, {}, {}, about), tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def _apply(model, edit, output, *more):
    return main(
        ["apply", "--model", str(model), "--edit", str(edit), "--output", str(output), *more]
    )


def _left(folder, direction, strength=1.0):
    """The largest share of what the writers of the saved Llama wrote that is left along a direction."""
    edited = {w.name: w for w in find_writers(load_model(folder[1]))}
    basis = (direction / direction.norm())[None]
    return max(
        abs(
            float(component_along(edited[w.name].weight, basis, w.layout).norm())
            / float(component_along(w.weight, basis, w.layout).norm())
            - abs(1 - strength)
        )
        for w in find_writers(load_model(folder[0]))
    )


def test_apply_writes_the_edited_model_and_says_what_is_left(
    edit_file, model_folder, tmp_path, capsys
):
    assert _apply(model_folder, edit_file, tmp_path / "output") == 0
    out = capsys.readouterr().out
    assert "7 writers edited" in out
    assert "at most 0.5 (model.layers.1." in out
    assert (tmp_path / "output" / "tokenizer.json").is_file()
    load_model(tmp_path / "output")


def test_adapter_writes_a_folder_that_peft_loads(edit_file, model_folder, tmp_path):
    command = ["adapter", "--model", str(model_folder), "--edit", str(edit_file)]
    assert main([*command, "--output", str(tmp_path / "adapter")]) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "content",
    [
        _direction(),
        _direction()[None].float(),
        [_direction()],
        {12: _direction()},
        {"direction": _direction().half()},
    ],
)
def test_an_old_direction_is_removed_from_every_writer(content, model_folder, tmp_path):
    path = tmp_path / "refusal_dir.pth"
    torch.save(content, path)
    assert _apply(model_folder, path, tmp_path / "output") == 0
    assert _left((model_folder, tmp_path / "output"), _direction()) < 2e-3


def test_a_strength_is_how_much_of_a_direction_is_removed(model_folder, tmp_path):
    torch.save(_direction(), tmp_path / "d.pt")
    assert _apply(model_folder, tmp_path / "d.pt", tmp_path / "output", "--strength", "0.7") == 0
    assert _left((model_folder, tmp_path / "output"), _direction(), 0.7) < 1e-5


@pytest.mark.parametrize(
    "content",
    [
        torch.stack([_direction(seed) for seed in range(3)]),
        [_direction(seed) for seed in range(3)],
        {f"layer_{seed}": _direction(seed) for seed in range(3)},
        {("resid_pre", seed): _direction(seed) for seed in range(3)},
    ],
)
def test_of_several_layers_one_is_chosen(content, model_folder, tmp_path, capsys):
    path = tmp_path / "directions.pt"
    torch.save(content, path)
    assert _apply(model_folder, path, tmp_path / "output") == 2
    assert "holds 3 directions (0, 1, 2); choose one with --layer" in capsys.readouterr().err
    assert _apply(model_folder, path, tmp_path / "output", "--layer", "2") == 0
    assert _left((model_folder, tmp_path / "output"), _direction(2)) < 1e-5
    assert _apply(model_folder, path, tmp_path / "other", "--layer", "5") == 2
    assert "no direction of layer 5" in capsys.readouterr().err


def test_a_direction_of_a_release_is_removed(model_folder, tmp_path, capsys):
    path = tmp_path / "refusal_direction.safetensors"
    about = {"layer": 1, "position": -2, "base_model": "tiny"}
    save_file({"direction": _direction()}, path, metadata={"refusal_direction": json.dumps(about)})
    assert _apply(model_folder, path, tmp_path / "output") == 0
    assert _left((model_folder, tmp_path / "output"), _direction()) < 1e-5
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert "kind: direction\nbase model: tiny\nlayer: 1" in capsys.readouterr().out


def test_behind_a_norm_a_direction_is_removed_from_what_the_norm_lets_through(
    build_model, read_stream, tmp_path
):
    model = build_model("gemma2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    torch.save(_direction(), tmp_path / "d.pth")
    assert _apply(tmp_path / "source", tmp_path / "d.pth", tmp_path / "output") == 0
    ids = torch.tensor([[0, 40, 41, 99, 120, 7]])
    unit = (_direction() / _direction().norm()).float()
    before = [h - model.model.embed_tokens(ids) for h in read_stream(model, ids)]
    edited = load_model(tmp_path / "output")
    after = [h - edited.model.embed_tokens(ids) for h in read_stream(edited, ids)]
    assert float((before[-1] @ unit).abs().max()) > 0.1
    assert float((after[-1] @ unit).abs().max()) < 1e-4


def test_inspect_says_what_an_edit_holds(edit_file, capsys):
    assert main(["inspect", str(edit_file)]) == 0
    out = capsys.readouterr().out
    for line in (
        "kind: edit\nbase model: tiny\nlayer: 1\nposition: -2\n",
        "vectors: 1 of d_model 32\n",
        "  model.embed_tokens: 1\n",
        "  mlp.down_proj: layer 0: 1, layer 1: 0.5, layer 2: 1\n",
        "additions: 0\n",
    ):
        assert line in out


def test_inspect_joins_layers_and_shows_norms_additions_and_what_is_left_alone(tmp_path, capsys):
    unit = torch.zeros(4, dtype=torch.float64)
    unit[0] = 1
    removals = {
        f"model.layers.{i}.mlp": Removal(("direction", "b"), (1.0, 0.5), "column") for i in range(4)
    }
    other = torch.roll(unit, 1)
    edit = Edit(
        {"direction": unit, "b": other * 1.5},
        removals,
        {"model.layers.2.mlp": Addition("direction", -3.25)},
        {"model.embed_tokens": "tied to the unembedding"},
        {},
    )
    save_edit(edit, tmp_path / "e.safetensors")
    assert main(["inspect", str(tmp_path / "e.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "  b: norm 1.5, not 1" in out
    assert "  mlp: layers 0-3: 1, 0.5 (column norms kept)" in out
    assert "  mlp: layer 2: -3.25 direction" in out
    assert "  model.embed_tokens: tied to the unembedding" in out


def test_inspect_says_what_an_old_direction_holds(tmp_path, capsys):
    torch.save({3: _direction(), 4: 2 * _direction()}, tmp_path / "d.pth")
    assert main(["inspect", str(tmp_path / "d.pth")]) == 0
    out = capsys.readouterr().out
    assert f"vector of layer 3: d_model 32, norm {float(_direction().norm()):.6g}" in out
    assert "vector of layer 4" in out


class Unsafe:
    """What a pickle can do besides holding tensors."""

    def __reduce__(self):
        """Say what unpickling does."""
        return os.system, ("touch ran",)


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(
    model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.save({"direction": _direction(), "x": Unsafe()}, tmp_path / "d.pth")
    assert _apply(model_folder, tmp_path / "d.pth", tmp_path / "output") == 2
    assert "could run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "cannot be loaded"),
        (b"", "cannot be loaded"),
        (_direction()[:5], "5 numbers"),
        (torch.zeros(32), "zero or not finite"),
        (torch.full((32,), torch.nan), "zero or not finite"),
        (torch.randn(2, 3, 32), "expected"),
        (torch.arange(32), "expected"),
        ({}, "holds no direction"),
        ("text", "holds no direction"),
    ],
)
def test_what_is_no_direction_is_refused(content, message, model_folder, tmp_path, capsys):
    path = tmp_path / "d.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert _apply(model_folder, path, tmp_path / "output") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_wrong_paths_and_settings_end_with_2_and_a_sentence(
    edit_file, model_folder, tmp_path, capsys
):
    for arguments, message in (
        ((tmp_path / "none", edit_file, tmp_path / "o"), "no folder"),
        ((model_folder, tmp_path / "none.pth", tmp_path / "o"), "cannot be read"),
        ((tmp_path, edit_file, tmp_path / "o"), "config.json"),
        ((model_folder, edit_file, tmp_path), "exists already"),
        ((model_folder, edit_file, tmp_path / "o", "--strength", "2"), "have no effect"),
        ((model_folder, edit_file, tmp_path / "o", "--revision", "main"), "has no effect"),
        ((model_folder, edit_file, edit_file / "o"), "cannot be made"),
    ):
        assert _apply(*arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
    assert main(["inspect", str(tmp_path)]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["apply"])
    assert caught.value.code == 2


def test_interrupted_ends_with_130_and_says_how_to_go_on(
    edit_file, model_folder, tmp_path, monkeypatch, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.checkpoint._edit_tensor", interrupt)
    assert _apply(model_folder, edit_file, tmp_path / "output") == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert _apply(model_folder, edit_file, tmp_path / "output") == 0
