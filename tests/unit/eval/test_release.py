"""The release folder: it loads, it verifies, it is the same twice, and its card says what was measured.

Run: python -m pytest tests/unit/eval/test_release.py
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint import apply_to_checkpoint
from common.edits import SIDECAR, load_edit
from common.errors import GateError, StageError
from common.hooks import add_for_good
from common.model import load_model, load_tokenizer
from common.recipe import load_recipe
from eval.release import edit as edit_words
from eval.release import folder as release_folder
from eval.release import stage
from eval.release.card import front_matter, model_card
from eval.release.leaderboards import write_leaderboards
from eval.release.lint import lint
from eval.release.loading import EXAMPLE, guard_example, lines
from eval.release.verification import verify
from eval.subjects import load_healed
from tests.editing import edit_of, vector
from tests.releasing import Tracker, about, make_upstream, recipe_of, write_evaluation
from tests.releasing import write_release as make_release
from tests.unit.eval.test_stage import changed


def evaluate(finished, tmp_path) -> None:
    """Leave what an evaluation would: tests of the main road go through a real one."""
    folder = tmp_path / "eval"
    folder.mkdir()
    write_evaluation(folder)
    finished.upstream["eval"] = folder


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
    assert [result.dataset_name for result in found] == ["letters", "restricted"]
    args = found[0].metric_args
    assert args["n"] == 40
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
        "| letters (acc) | 40 |",
        "layer 1, token position -1",
        "not write along the removed direction",
        "original model, weight 1",
        "3 steps",
        "strength 1",
        "guard",
        "Its files are beside this card: LICENSE, NOTICE.",
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
    evaluate(finished, tmp_path)
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
        "model, tokenizer = load_model(folder), load_tokenizer(folder)",
        "model=model, tokenizer=tokenizer)",
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
    assert "common.model" not in card
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
    assert card.count('pipeline("image-text-to-text", model=folder)') == 2
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


def load_example(text: str, monkeypatch, answers: list[str], asked: list) -> dict:
    """The example as a module, with stubs in place of the model and of a guard that knows one bad word."""

    def pipeline(task: str, **_settings):
        def chat(turns, **_settings):
            asked.append(turns)
            reply = {"role": "assistant", "content": answers.pop(0)}
            return [{"generated_text": [*turns, reply]}]

        def classify(text, **_settings):
            return [{"label": "unsafe" if "bad" in text else "SAFE", "score": 0.9}]

        return classify if task == "text-classification" else chat

    monkeypatch.setattr("transformers.pipeline", pipeline)
    scope: dict = {"__name__": "guarded_chat"}
    exec(compile(text, "guarded_chat.py", "exec"), scope)
    return scope


def test_the_guard_example_stops_what_goes_in_and_what_comes_out(release, monkeypatch) -> None:
    text = (release / EXAMPLE.name).read_text()
    assert text.rstrip() in (release / "README.md").read_text()
    asked: list = []
    scope = load_example(text, monkeypatch, ["fine", "a bad answer"], asked)
    ask, guard = scope["load_model"]("x"), scope["load_guard"]("y")
    assert scope["answer"]("a bad question", ask, guard) == "This request is not served here."
    assert scope["answer"]("x" * 9000, ask, guard) == "This request is not served here."
    assert asked == []
    assert scope["answer"]("hello", ask, guard) == "fine"
    assert asked == [[{"role": "user", "content": "hello"}]]
    assert scope["answer"]("hello", ask, guard) == "This answer is withheld."
    assert len(asked) == 2

    def broken(text: str) -> bool:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        scope["answer"]("hello", ask, broken)
    assert len(asked) == 2, "a guard that breaks lets nothing pass"


@pytest.mark.parametrize("how", ["weights", "hooked", "adapters", "edited"])
def test_the_example_of_every_form_loads_what_that_form_is(how) -> None:
    text = guard_example(how, "base", "text-generation")
    compile(text, "guarded_chat.py", "exec")
    for line in lines(how, "base", "text-generation").splitlines():
        assert f"    {line}" in text or not line


def test_the_check_needs_no_weights(finished) -> None:
    assert stage.check(finished.recipe) == []
    assert stage.disk_bytes(finished.recipe) > 0
    (problem,) = stage.check(changed(finished.recipe, "model.name_or_path", "./nowhere"))
    assert "nowhere" in problem


def test_the_card_shows_refusals_by_category_and_how_well_they_are_counted(
    evaluated, tmp_path
) -> None:
    path = evaluated.upstream["eval"] / "results.json"
    results = json.loads(path.read_text())
    instrument = {
        "name": "a rule and a learned model",
        "agreement": 0.94,
        "kappa": 0.88,
        "rate_error": 0.029,
        "measured_on": "XSTest",
    }
    path.write_text(json.dumps({**results, "refusal_instrument": instrument}))
    card = (write_release(evaluated, tmp_path) / "README.md").read_text()
    assert "| panel | category | n | original | abliterated | healed |" in card
    for category in ("first", "second"):
        assert f"| restricted | {category} | 10 | 0.900 [" in card
    assert "agrees with people on 0.940 of the answers (kappa 0.88)" in card
    assert "share of refusals by up to 0.029" in card


def test_items_are_released_with_hashes_in_place_of_every_text(release) -> None:
    text = (release / "items.jsonl").read_text()
    assert "sea" not in text
    assert 'answer"' in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 180
    answers = [row["details"]["answer"] for row in rows if row["name"] == "letters"]
    assert len(set(answers)) == 40, "the same answer has the same hash"
    assert all(len(answer) == len("sha256:") + 64 for answer in answers)
    assert {row["details"].get("label") for row in rows} == {None, "compliance"}


def test_the_report_is_released_and_what_it_takes_to_rebuild_stands_beside_it(release) -> None:
    assert (release / "report.html").read_text().startswith("<!doctype html>")
    assert (release / "reproduce" / "recipe.yaml").read_bytes() == (
        release / "recipe.yaml"
    ).read_bytes()
    how = (release / "reproduce" / "README.md").read_text()
    assert "python -m eval verify PATH/TO/THIS/RELEASE --base base" in how
    pins = (release / "reproduce" / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__}" in pins


@pytest.mark.parametrize("kind", ["orthogonalize", "column_norm", "add"])
def test_a_release_without_weights_makes_the_healed_model_out_of_the_base(
    kind, make_model, byte_tokenizer, tmp_path
) -> None:
    upstream = make_upstream(tmp_path, make_model(0), byte_tokenizer, kind)
    release = make_release(tmp_path, upstream, form="adapter")
    assert not list(release.glob("*.safetensors.index.json")) + list(release.glob("model*"))
    assert not list(release.glob(".weights-*"))
    assert verify(release, tmp_path / "base").problems == []
    card = ModelCard.load(release / "README.md").data.to_dict()
    assert (card["base_model_relation"], card["library_name"]) == ("adapter", "peft")
    has_adapter_form = (release / "edit_adapter").is_dir()
    assert has_adapter_form == (kind == "orthogonalize")
    assert ("abliteration apply" in (release / "guarded_chat.py").read_text()) != has_adapter_form
    if has_adapter_form:
        # As the card's example does.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        edited = PeftModel.from_pretrained(model, release, subfolder="edit_adapter")
        healed = PeftModel.from_pretrained(edited.merge_and_unload(), release, subfolder="adapter")
        ids = torch.arange(20)[None]
        expected = load_healed(recipe_of(tmp_path), upstream)
        with torch.inference_mode():
            assert torch.allclose(healed(ids).logits, expected(ids).logits, atol=1e-5)


def test_a_swapped_adapter_of_a_release_without_weights_is_caught(
    make_model, byte_tokenizer, tmp_path
) -> None:
    upstream = make_upstream(tmp_path, make_model(0), byte_tokenizer)
    release = make_release(tmp_path, upstream, form="adapter")
    path = release / "adapter" / "adapter_model.safetensors"
    changed_tensors = {name: tensor + 0.5 for name, tensor in load_file(path).items()}
    save_file(changed_tensors, path, metadata={"format": "pt"})
    release_folder.write_checksums(release)
    (problem,) = verify(release, tmp_path / "base").problems
    assert "do not make these weights" in problem


def test_a_form_that_cannot_be_made_is_told_before_anything_runs(finished) -> None:
    recipe = changed(finished.recipe, "release.form", "adapter")
    assert stage.check(recipe) == []
    (problem,) = stage.check(changed(recipe, "train.adapter", None))
    assert problem.startswith("release.form: adapter needs an adapter")


@pytest.mark.slow
def test_two_processes_build_the_same_bytes(make_model, byte_tokenizer, tmp_path) -> None:
    upstream = make_upstream(tmp_path, make_model(0), byte_tokenizer)
    release = make_release(tmp_path, upstream)
    code = (
        "import sys; from pathlib import Path; from tests.releasing import write_release\n"
        "folder = Path(sys.argv[1]); names = ('abliteration', 'train', 'eval')\n"
        "write_release(folder, {name: folder / name for name in names}, 'again')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for name in [*release_folder.released_files(release), "SHA256SUMS"]:
        assert (release / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


BOARD = {"name": "gsm8k", "metric": "exact_match", "n": 1319}


def test_a_registered_benchmark_that_was_measured_whole_goes_to_the_hubs_leaderboards(
    tmp_path,
) -> None:
    healed = {"value": 0.75123, "low": 0.7271, "high": 0.774}
    rows = [{**BOARD, "healed": healed}, {**BOARD, "name": "letters", "healed": healed}]
    write_leaderboards({"benchmarks": rows}, tmp_path)
    (file,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 75.12)
    assert "n = 1319, 95 % interval [72.71, 77.40]" in entry.notes
    shutil.rmtree(tmp_path / ".eval_results")
    write_leaderboards({"benchmarks": [{**rows[0], "n": 200}]}, tmp_path)
    assert not (tmp_path / ".eval_results").exists(), "a part of the items is not the benchmark"


LICENCES = [
    ("llama3.1", "Built with Llama", "Llama 3.1 is licensed under the Llama 3.1 Community"),
    ("llama3", "Built with Meta Llama 3", "Meta Llama 3 is licensed under the Meta Llama 3"),
    ("gemma", "", "Gemma is provided under and subject to the Gemma Terms of Use"),
    ("apache-2.0", "", "The weights in this folder were made from base and changed"),
]


@pytest.mark.parametrize(("licence", "banner", "words"), LICENCES)
def test_the_duties_of_a_licence_are_done(evaluated, tmp_path, licence, banner, words) -> None:
    (Path(evaluated.recipe.model.name_or_path) / "NOTICE").write_text("Notice of the base.\n")
    recipe = changed(evaluated.recipe, "release", {"license": licence})
    evaluated = replace(evaluated, recipe=recipe)
    release = write_release(evaluated, tmp_path)
    notice = (release / "NOTICE").read_text()
    assert notice.startswith("Notice of the base.\n")
    assert words in notice
    assert (release / "LICENSE").read_text() == "Do as you like.\n"
    card = (release / "README.md").read_text()
    assert (f"# mini\n\n**{banner}**\n" in card) == bool(banner)
    assert lint(release) == []


@pytest.mark.parametrize(
    ("repo", "licence", "wanted"),
    [
        ("me/healed", "llama3.1", "me/Llama-healed"),
        ("me/Llama-healed", "llama3.1", None),
        ("me/Llama-healed", "llama3", "me/Llama-3-Llama-healed"),
        ("me/Llama-3-healed", "llama3", None),
        ("me/healed", "gemma", None),
    ],
)
def test_a_name_that_the_licence_forbids_is_told_by_the_check(
    finished, repo, licence, wanted
) -> None:
    recipe = changed(finished.recipe, "release", {"license": licence, "push_to_hub": repo})
    problems = stage.check(recipe)
    assert [wanted in problem for problem in problems] == ([True] if wanted else [])
