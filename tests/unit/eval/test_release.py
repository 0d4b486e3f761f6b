"""The release folder: it loads, it verifies, it is the same twice, and its card says what was measured.

Run: python -m pytest tests/unit/eval/test_release.py
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.edits import apply_to_weights, load_edit
from common.errors import GateError, StageError
from common.recipe import load_recipe
from eval import stage as evaluation
from eval.release import folder as release_folder
from eval.release import stage
from eval.release.card import GUARD_EXAMPLE
from eval.subjects import load_healed
from tests.unit.eval.test_stage import Tracker, changed


@pytest.fixture
def evaluated(finished, tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    evaluation.run(finished.recipe, folder, finished.upstream, Tracker())
    finished.upstream["eval"] = folder
    return finished


@pytest.fixture
def release(evaluated, tmp_path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    stage.run(evaluated.recipe, folder, evaluated.upstream, Tracker())
    return folder


def test_the_weights_are_those_that_were_evaluated(evaluated, release) -> None:
    model = AutoModelForCausalLM.from_pretrained(release)
    expected = load_healed(evaluated.recipe, evaluated.upstream)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert sorted(model.state_dict()) == sorted(expected.state_dict())
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_base_edit_and_adapter_make_the_released_weights(evaluated, release) -> None:
    model = AutoModelForCausalLM.from_pretrained(evaluated.recipe.model.name_or_path)
    apply_to_weights(model, load_edit(release / "edit.safetensors"))
    rebuilt = PeftModel.from_pretrained(model, release / "adapter").merge_and_unload()
    released = AutoModelForCausalLM.from_pretrained(release)
    for name, weight in rebuilt.state_dict().items():
        assert torch.equal(released.state_dict()[name], weight), name


def test_tokenizer_template_and_licence_are_the_bases_own(evaluated, release) -> None:
    base = Path(evaluated.recipe.model.name_or_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (release / name).read_bytes() == (base / name).read_bytes()
    chat = [{"role": "user", "content": "hi"}]
    text = AutoTokenizer.from_pretrained(release).apply_chat_template(chat, tokenize=False)
    assert text == "<|user|>\nhi<|end|>\n"


def test_the_direction_comes_with_where_it_was_found(evaluated, release) -> None:
    edit = load_edit(release / "edit.safetensors")
    with safe_open(release / "refusal_direction.safetensors", framework="pt") as file:
        direction, metadata = file.get_tensor("direction"), file.metadata()
    bare = torch.load(release / "refusal_dir.pth", weights_only=True)
    assert torch.equal(direction, bare)
    assert torch.allclose(direction.double(), edit.direction, atol=1e-7)
    assert list(metadata) == ["refusal_direction"]
    about = json.loads(metadata["refusal_direction"])
    assert (about["layer"], about["position"], about["base_model"]) == (1, -1, "base")
    assert list(about) == sorted(about)


def test_the_checksums_hold_and_cover_every_file(release) -> None:
    check = subprocess.run(
        ["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"],
        cwd=release,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    named = [line.split("  ")[1] for line in (release / "SHA256SUMS").read_text().splitlines()]
    present = {str(file.relative_to(release)) for file in release.rglob("*") if file.is_file()}
    assert named == sorted(named)
    assert set(named) == present - {"SHA256SUMS"}
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "README.md"} <= set(named)


def test_a_second_build_gives_the_same_bytes_whatever_lay_there(
    evaluated, release, tmp_path
) -> None:
    again = tmp_path / "again"
    (again / "adapter").mkdir(parents=True)
    (again / "model-00001-of-00009.safetensors").write_bytes(b"left by an attempt that was killed")
    stage.run(evaluated.recipe, again, evaluated.upstream, Tracker())
    assert (again / "SHA256SUMS").read_text() == (release / "SHA256SUMS").read_text()


def test_no_path_of_this_machine_is_published(release, tmp_path) -> None:
    for file in release.rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert (
        json.loads((release / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        is None
    )
    load_recipe(release / "recipe.yaml")


def test_a_path_that_slipped_in_stops_the_release(release, tmp_path) -> None:
    release_folder.require_portable(release, [tmp_path, Path("/")])
    (release / "config.json").write_text(f'{{"_name_or_path": "{tmp_path}/base"}}')
    with pytest.raises(StageError, match=r"config\.json holds a path of this machine"):
        release_folder.require_portable(release, [tmp_path])


def test_the_recipe_is_made_portable_and_stays_a_recipe(finished, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = changed(finished.recipe, "output_dir", "/somewhere/else/runs")
    data = yaml.safe_load(release_folder.portable_recipe(recipe))
    assert data["model"]["name_or_path"] == "base"
    assert data["output_dir"] == "runs"
    assert data["eval"]["benchmarks"][0]["include_path"] == "tasks"


def test_a_missed_gate_makes_no_release(evaluated, tmp_path) -> None:
    path = evaluated.upstream["eval"] / "results.json"
    results = json.loads(path.read_text())
    gate = {"name": "pooled.n", "value": 0, "bound": "min", "limit": 5, "passed": False}
    results["accept"] = {"passed": False, "gates": [gate]}
    path.write_text(json.dumps(results))
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(GateError, match=r"pooled\.n is 0, but eval\.accept asks for at least 5"):
        stage.run(evaluated.recipe, folder, evaluated.upstream, Tracker())
    assert list(folder.iterdir()) == []


def test_the_cards_metadata_is_what_the_hub_reads(release) -> None:
    card = ModelCard.load(release / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "base"
    assert data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"abliterated", "healed", "dpo", "distillation", "lora"} == set(data["tags"])
    assert data["license"] == "other"
    front = yaml.safe_load((release / "README.md").read_text().split("---\n")[1])
    _, found = model_index_to_eval_results(front["model-index"])
    assert all(isinstance(result, EvalResult) for result in found)
    assert [result.dataset_name for result in found] == ["letters", "sums", "restricted"]
    args = found[0].metric_args
    assert args["n"] == 10
    assert args["low"] <= found[0].metric_value <= args["high"]


def test_the_card_says_what_was_done_and_measured(evaluated, release) -> None:
    card = (release / "README.md").read_text()
    results = json.loads((release / "results.json").read_text())
    row = results["refusal"][0]["healed"]
    assert (
        f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] refused by the healed model"
        in card
    )
    for text in (
        "| letters (acc) | 10 |",
        "layer 1, token position -1",
        "not write along the removed direction",
        "original model, weight 1",
        "3 steps",
        "strength 1",
        "guard",
        "Its files are beside this card: LICENSE.",
        "sha256sum -c SHA256SUMS",
    ):
        assert text in card
    assert card.isascii()
    for line in (evaluated.upstream["eval"] / "items.jsonl").read_text().splitlines():
        answer = json.loads(line)["details"].get("text", "")
        assert len(answer) < 4 or answer not in card


def test_the_guard_example_runs(monkeypatch) -> None:
    code = GUARD_EXAMPLE.removeprefix("```python\n").removesuffix("```")
    asked = []

    def pipeline(*_args, **_settings):
        def chat(turns, **_settings):
            asked.append(turns)
            return [{"generated_text": [*turns, {"role": "assistant", "content": "fine"}]}]

        return chat

    monkeypatch.setattr("transformers.pipeline", pipeline)
    scope: dict = {}
    exec(code, scope)
    assert scope["answer"]("hello") == "This request is not served here."
    assert asked == []
    scope["is_allowed"] = lambda text: text != "bad"
    assert scope["answer"]("hello") == "fine"


def test_the_check_needs_no_weights(finished) -> None:
    assert stage.check(finished.recipe) == []
    assert stage.disk_bytes(finished.recipe) > 0
    (problem,) = stage.check(changed(finished.recipe, "model.name_or_path", "./nowhere"))
    assert "nowhere" in problem
