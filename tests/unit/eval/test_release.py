"""The release folder: it loads, it verifies, it is the same twice, and its card says what was measured.

Run: python -m pytest tests/unit/eval/test_release.py
"""

import json
import shutil
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

from common.checkpoint import apply_to_checkpoint
from common.edits import SIDECAR, load_edit
from common.errors import GateError, StageError
from common.hooks import add_for_good
from common.model import load_model, load_tokenizer
from common.recipe import load_recipe
from eval import stage as evaluation
from eval.release import edit as edit_words
from eval.release import folder as release_folder
from eval.release import stage
from eval.release.card import GUARD_EXAMPLE, front_matter, model_card
from eval.subjects import load_healed
from tests.editing import edit_of, vector
from tests.unit.eval.conftest import about
from tests.unit.eval.test_stage import Tracker, changed


def evaluate(finished, tmp_path) -> dict:
    folder = tmp_path / "eval"
    folder.mkdir()
    results = evaluation.run(finished.recipe, folder, finished.upstream, Tracker())
    finished.upstream["eval"] = folder
    return results


def write_release(evaluated, tmp_path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    stage.run(evaluated.recipe, folder, evaluated.upstream, Tracker())
    return folder


@pytest.fixture
def evaluated(finished, tmp_path):
    evaluate(finished, tmp_path)
    return finished


@pytest.fixture
def release(evaluated, tmp_path) -> Path:
    return write_release(evaluated, tmp_path)


def test_the_weights_are_those_that_were_evaluated(evaluated, release) -> None:
    model = AutoModelForCausalLM.from_pretrained(release)
    expected = load_healed(evaluated.recipe, evaluated.upstream)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert sorted(model.state_dict()) == sorted(expected.state_dict())
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_base_edit_and_adapter_make_the_released_weights(evaluated, release, tmp_path) -> None:
    base, edited = Path(evaluated.recipe.model.name_or_path), tmp_path / "edited"
    apply_to_checkpoint(base, load_edit(release / "edit.safetensors"), edited)
    model = AutoModelForCausalLM.from_pretrained(edited)
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


# Its generation prompt thinks aloud unless told not to, as Qwen3's does.
THINKING = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)


def test_a_model_that_thinks_keeps_its_own_template_and_the_card_says_how_it_was_asked(
    evaluated, tmp_path
) -> None:
    template = Path(evaluated.recipe.model.name_or_path) / "chat_template.jinja"
    template.write_text(THINKING)
    assert load_tokenizer(template.parent).chat_template != THINKING
    release = write_release(evaluated, tmp_path)
    assert (release / "chat_template.jinja").read_text() == THINKING
    card = (release / "README.md").read_text()
    assert "Every answer stood behind an empty thought" in card
    assert "`enable_thinking`" in card


def test_several_templates_and_the_files_of_a_processor_are_released_too(
    evaluated, tmp_path
) -> None:
    base = Path(evaluated.recipe.model.name_or_path)
    (base / "additional_chat_templates").mkdir()
    names = ("additional_chat_templates/tool_use.jinja", "preprocessor_config.json")
    for name in names:
        (base / name).write_text("{}")
    release = write_release(evaluated, tmp_path)
    assert all((release / name).read_text() == "{}" for name in names)


def test_what_no_weight_can_hold_is_released_beside_the_weights(finish, tmp_path) -> None:
    finished = finish("add", strength=-2.0)
    results = evaluate(finished, tmp_path)
    assert results["direction"]["residual"] is None
    release = write_release(finished, tmp_path)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = load_healed(finished.recipe, finished.upstream)(ids).logits
        assert torch.equal(load_model(release)(ids).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(release)(ids).logits
        assert not torch.allclose(plain, expected, atol=0.1), "the addition has no effect"
        # The adapter with the edit, as the card says.
        base = AutoModelForCausalLM.from_pretrained(finished.recipe.model.name_or_path)
        add_for_good(base, load_edit(release / "edit.safetensors"))
        rebuilt = PeftModel.from_pretrained(base, release / "adapter").merge_and_unload()
        assert torch.equal(rebuilt(ids).logits, expected)
    card = (release / "README.md").read_text()
    for text in (
        "with its refusal direction subtracted from the residual stream",
        "## What was added",
        "beside model.layers.0.mlp.down_proj (add, -2 times its own length",
        "transformers, and what is built on it, loads the weights alone and answers without it",
        'model = load_model("path/to/this/folder")',
        "model=model, tokenizer=tokenizer)  # loaded as above",
        f"- `{SIDECAR}`: what is added",
        "Training could write along any direction",
        "activation-addition",
    ):
        assert text in card
    assert "abliterated\n- healed" not in card
    assert SIDECAR in (release / "SHA256SUMS").read_text()


def test_a_fully_trained_model_adds_what_its_base_adds(finish) -> None:
    finished = finish("add")
    train, abliterated = finished.upstream["train"], finished.upstream["abliteration"] / "model"
    (train / "adapter").rename(train / "unused")
    shutil.copytree(abliterated, train / "model")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        healed = load_healed(finished.recipe, finished.upstream)(ids).logits
        assert torch.equal(healed, load_model(abliterated)(ids).logits)


def test_a_release_of_weights_alone_has_no_additions_and_says_nothing_of_them(release) -> None:
    assert not (release / SIDECAR).exists()
    card = (release / "README.md").read_text()
    assert SIDECAR not in card
    assert "load_model" not in card
    assert "empty thought" not in card


KERNEL = {
    "max_weight": 1.5,
    "max_weight_position": 1.25,
    "min_weight": 0.5,
    "min_weight_distance": 1,
}
DESCRIBED = [
    (
        "orthogonalize",
        {},
        {},
        [
            "with its refusal direction removed from the weights",
            "made not to refuse where its base does",
            "harmful prompts differ from harmless ones",
            "(resid_pre, layer 1, token position -1",
            "chosen by scores",
            "It was taken out of 7 matrices that write to the stream (orthogonalize, strength 1).",
        ],
    ),
    (
        "projected",
        {},
        {},
        ["What of it is orthogonal to the mean of harmless prompts at its layer"],
    ),
    ("biprojected", {}, {}, ["at its own layer and at that of each matrix, was taken out of 7"]),
    ("column_norm", {}, {}, ["It was taken out", "norm of every column was restored"]),
    (
        "row_norm",
        {"projection": "projected", "strength": 0.5},
        {},
        ["What of it is orthogonal", "(row_norm, strength 0.5)", "norm of every row was restored"],
    ),
    (
        "orthogonalize",
        {"weights": {"embedding": 0.0, "attention": [1.0, 0.25, 0.0], "mlp": KERNEL}},
        {"layer": 1.75, "selection": "search", "edit": "orthogonalize"},
        [
            "layer 1.75, mixed of layers 1 and 2,",
            "found by a search of 5 trials",
            "out of 4 matrices",
            "it runs from 0.25 to 1.25: embedding 0; attention by layer 1, 0.25, 0; mlp 1.5 at "
            "layer 1.25, falling to 0.5 at a distance of 1 layers, 0 beyond.",
            "Where the weight is 0, 3 matrices stayed as they were.",
        ],
    ),
    (
        "orthogonalize",
        {},
        {"target": "falsely_refused", "selection": "fixed"},
        [
            "with its direction of false refusal removed",
            "not to refuse harmless prompts that its base refuses, and to go on refusing harmful",
            "harmless prompts that the base refuses differ from those it answers",
            "orthogonal to that of harmful prompts, whose refusal is to stay",
            "The recipe names layer and position.",
        ],
    ),
    (
        "add",
        {"strength": 1.5},
        {},
        [
            "with its refusal direction added to the residual stream",
            "made to refuse where its base does not",
            "beside model.layers.0.mlp.down_proj (add, 1.5 times its own length",
        ],
    ),
]


@pytest.mark.parametrize(("kind", "settings", "changes", "sentences"), DESCRIBED)
def test_every_kind_of_edit_is_described(
    kind, settings, changes, sentences, build_model, evaluated
) -> None:
    edit = edit_of(
        build_model("llama"), kind, about={**about(kind, **settings), **changes}, **settings
    )
    search = {"name": "search", "num_trials": 5}
    recipe = changed(evaluated.recipe, "abliteration.selection", search)
    results = json.loads((evaluated.upstream["eval"] / "results.json").read_text())
    card = model_card(recipe, edit, results, {"pairs": 1, "steps": 1}, [])
    for sentence in sentences:
        assert sentence in card
    assert ("## What was removed" in card) == (kind != "add")
    assert card.isascii()


def test_a_model_that_sees_is_served_by_another_pipeline(evaluated, build_model, tmp_path) -> None:
    config = build_model("llava").config
    config.save_pretrained(tmp_path / "llava")
    assert stage._task(tmp_path / "llava") == "image-text-to-text"
    assert stage._task(Path(evaluated.recipe.model.name_or_path)) == "text-generation"
    results = json.loads((evaluated.upstream["eval"] / "results.json").read_text())
    edit = edit_of(build_model("llava"), about=about())
    given = (evaluated.recipe, edit, results, {"pairs": 1, "steps": 1}, [])
    card = model_card(*given, task="image-text-to-text")
    assert 'pipeline("image-text-to-text", model="path' in card
    assert ModelCard(card).data.pipeline_tag == "image-text-to-text"


def test_several_directions_are_counted(build_model) -> None:
    edit = edit_of(build_model("llama"), "orthogonalize", vector(1), vector(2), about=about())
    direction, removal = edit_words.description(None, edit)
    assert direction.startswith("The 2 directions in which harmful prompts differ")
    assert removal.startswith("They were taken out of 7 matrices")


def test_data_sets_of_every_kind_of_prompts_are_named(evaluated, build_model) -> None:
    prompts = {
        "harmful": {"dataset": "a/harmful"},
        "harmless": {"dataset": "a/harmless"},
        "falsely_refused": {"dataset": "a/false"},
        "validation": {
            "harmful": {"dataset": "b/harmful"},
            "harmless": {"dataset": "b/harmless"},
            "falsely_refused": {"dataset": "b/false"},
        },
    }
    recipe = changed(evaluated.recipe, "abliteration.prompts", prompts)
    results = json.loads((evaluated.upstream["eval"] / "results.json").read_text())
    edit = edit_of(build_model("llama"), about=about())
    named = front_matter(recipe, edit, results, "text-generation")["datasets"]
    assert named == [
        f"{owner}/{kind}" for owner in "ab" for kind in ("false", "harmful", "harmless")
    ]


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
