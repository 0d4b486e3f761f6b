"""GGUF files in a release: written, loaded back, scored, and said in the card; what cannot be is refused early.

Run: python -m pytest tests/unit/eval/test_gguf_release.py
"""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import StageError
from common.recipe import Recipe
from eval.gguf import files, runtimes
from eval.gguf.modelfile import modelfile
from eval.release import stage
from eval.release.lint import lint
from eval.release.verification import verify
from tests.releasing import make_upstream, read, recipe_of, write_release

gguf = pytest.importorskip("gguf", reason="the gguf package is an extra")

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Without a system turn it writes one of its own, as Qwen2.5's does.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def upstream(build_model, tokenizer, tmp_path):
    return make_upstream(tmp_path, build_model("llama", dtype=torch.float32), tokenizer)


def test_every_file_is_scored_against_the_weights_beside_it(upstream, tmp_path) -> None:
    release = write_release(tmp_path, upstream, gguf=["f32", "q8_0"])
    full, small = read(release, "gguf/scores.json")["files"]
    assert full["file"] == "gguf/mini-F32.gguf"
    assert full["tokenizer"]["same"] == full["tokenizer"]["n"] > 0
    (row,) = full["divergence"]
    assert row["mean_kl"] < 1e-9
    assert row["top1_agreement"] == 1
    assert 0 < small["divergence"][0]["mean_kl"] < 0.05
    (refused,) = full["refusal"]
    assert (refused["name"], refused["n"]) == ("restricted", 2)
    assert refused["low"] <= refused["value"] <= refused["high"]
    card = (release / "README.md").read_text()
    assert "| gguf/mini-Q8_0.gguf |" in card
    assert (release / "gguf" / "Modelfile").read_text().startswith("FROM ./mini-F32.gguf\n")


def test_a_release_with_such_files_is_linted_verified_and_the_same_twice(
    upstream, tmp_path
) -> None:
    first = write_release(tmp_path, upstream, gguf=["q8_0"])
    again = write_release(tmp_path, upstream, "again", gguf=["q8_0"])
    assert (first / "SHA256SUMS").read_bytes() == (again / "SHA256SUMS").read_bytes()
    assert "gguf/mini-Q8_0.gguf" in (first / "SHA256SUMS").read_text()
    assert lint(first) == []
    assert verify(first, tmp_path / "base").problems == []
    file = first / "gguf" / "mini-Q8_0.gguf"
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    file.write_bytes(damaged)
    assert any("mini-Q8_0" in problem for problem in verify(first, tmp_path / "base").problems)


def test_the_file_holds_the_healed_weights(upstream, tmp_path) -> None:
    release = write_release(tmp_path, upstream, gguf=["f32"])
    back = AutoModelForCausalLM.from_pretrained(
        release / "gguf", gguf_file="mini-F32.gguf", dtype=torch.float32
    )
    healed = AutoModelForCausalLM.from_pretrained(release).state_dict()
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, healed[name]), name


def test_a_release_without_them_holds_none(upstream, tmp_path) -> None:
    release = write_release(tmp_path, upstream)
    assert not (release / "gguf").exists()
    assert "GGUF" not in (release / "README.md").read_text()


def test_a_family_that_cannot_be_written_is_told_before_any_work(
    build_model, tokenizer, tmp_path
) -> None:
    make_upstream(tmp_path, build_model("llama", dtype=torch.float32), tokenizer)
    shutil.rmtree(tmp_path / "base")
    build_model("olmo2", dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert stage.check(recipe_of(tmp_path)) == []
    (problem,) = stage.check(recipe_of(tmp_path, gguf=["f16"]))
    assert "olmo2" in problem
    assert "gguf_converter" in problem


def test_k_quants_need_llama_cpp(upstream, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runtimes, "BINDING", "no_such_package")
    (problem,) = stage.check(recipe_of(tmp_path, gguf=["f16", "q4_k_m"]))
    assert "q4_k_m can be written by llama.cpp alone" in problem
    assert "pip install" in problem


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"gguf": ["f16"], "form": "adapter"}, "full weights"),
        ({"gguf": ["f16", "f16"]}, "there already"),
        ({"gguf_converter": "convert.py"}, "no effect"),
        ({"gguf": ["q2_k"]}, "q8_0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, why, tmp_path) -> None:
    raw = recipe_of(tmp_path).model_dump(mode="json", exclude_defaults=True)
    with pytest.raises(ValueError, match=why):
        Recipe.model_validate({**raw, "release": settings})


def test_what_stands_beside_the_weights_cannot_be_left_out(upstream, tmp_path) -> None:
    (tmp_path / files.SIDECAR).touch()
    with pytest.raises(StageError, match="beside the weights"):
        files.write_files(recipe_of(tmp_path, gguf=["f16"]), tmp_path)


def test_a_converter_is_called_with_the_folder_and_its_failure_is_told(upstream, tmp_path) -> None:
    converter = tmp_path / "convert.py"
    converter.write_text("import sys\nopen(sys.argv[3], 'w').write(' '.join(sys.argv[4:]))\n")
    runtimes.convert(converter, tmp_path / "base", tmp_path / "m.gguf", "bf16")
    assert (tmp_path / "m.gguf").read_text() == "--outtype bf16"
    converter.write_text("raise SystemExit('no such architecture')\n")
    with pytest.raises(StageError, match="no such architecture"):
        runtimes.convert(converter, tmp_path / "base", tmp_path / "other.gguf", "bf16")
    changed = files.converter_hash(recipe_of(tmp_path, gguf=["f16"], gguf_converter=str(converter)))
    assert changed is not None


def test_a_missing_converter_is_told_before_any_work(upstream, tmp_path) -> None:
    recipe = recipe_of(tmp_path, gguf=["f16"], gguf_converter=str(tmp_path / "none.py"))
    assert any("no converter" in problem for problem in stage.check(recipe))


def test_the_pieces_around_the_turns_are_those_of_the_template(make_tokenizer) -> None:
    text = modelfile(make_tokenizer(PLAIN), "./m.gguf")
    assert 'PARAMETER stop "<|end|>"' in text
    assert '{{ else if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n' in text
    assert text.count("<|begin|>") == 2  # with a system turn and without
    assert text.rstrip().split('"""')[1].endswith("{{ end }}{{ end }}<|assistant|>\n")


def test_a_systems_own_words_stand_only_where_no_other_are_given(make_tokenizer) -> None:
    text = modelfile(make_tokenizer(DEFAULT_SYSTEM), "./m.gguf")
    assert "{{ if .System }}{{ else }}<|system|>\nBe kind.<|end|>\n{{ end }}" in text


@pytest.mark.parametrize("template", [NUMBERED, PLAIN.replace("<|end|>", "{{ '{{' }}")])
def test_a_template_that_pieces_cannot_say_is_left_out(template, make_tokenizer) -> None:
    text = modelfile(make_tokenizer(template), "./m.gguf")
    assert 'TEMPLATE "' not in text
    assert "# No TEMPLATE" in text
