"""Talking to the models of a run: columns, conversations, commands, and what cannot be talked to.

Run: python -m pytest tests/unit/eval/test_chat.py
"""

import io
from types import SimpleNamespace

import pytest
import torch

from common import artifacts
from common.errors import InputError
from common.generation import continue_rows
from common.recipe import dump
from eval import chat
from eval.__main__ import main
from eval.conversation import Conversation, load_conversations
from tests.releasing import make_upstream, recipe_of

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def run_folder(build_model, tokenizer, tmp_path):
    """A run whose three models differ."""
    make_upstream(tmp_path, build_model("llama", dtype=torch.float32), tokenizer)
    for stage in ("abliteration", "train"):
        artifacts.write_json(tmp_path / stage / "manifest.json", {})
    artifacts.write_text(tmp_path / "recipe.yaml", dump(recipe_of(tmp_path)))
    return tmp_path


def talk(monkeypatch, capsys, *lines: str, arguments=()) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["chat", *map(str, arguments), "--max-new-tokens", "4"]) == 0
    return capsys.readouterr().out


def test_each_model_keeps_its_own_conversation(build_model, tokenizer) -> None:
    models = [build_model("llama", seed=seed, dtype=torch.float32) for seed in (0, 1)]
    talks = [Conversation("original", model, tokenizer) for model in models]
    first = [each.answer("the one", 6) for each in talks]
    assert first[0] != first[1]
    again = [each.answer("and the other", 6) for each in talks]
    for model, each, said, then in zip(models, talks, first, again, strict=True):
        turns = [
            {"role": "user", "content": "the one"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "and the other"},
        ]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        (row,) = continue_rows(model, tokenizer, [ids], max_new_tokens=6)
        assert then == tokenizer.decode(row, skip_special_tokens=True).strip()
        assert len(each.turns) == 4


@pytest.mark.parametrize("template", [None, NO_SYSTEM])
def test_the_systems_words_come_first_in_every_turn(template, build_model, make_tokenizer) -> None:
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    each = Conversation("original", build_model("llama", dtype=torch.float32), tokenizer, "be kind")
    each.answer("the one", 2)
    text = each._render([*each.turns, {"role": "user", "content": "more"}])
    assert text.index("be kind") < text.index("the one") < text.index("more")
    assert text.count("be kind") == 1
    assert ("<|system|>" in text) == (template is None)


def test_a_conversation_beyond_the_context_is_refused_and_unchanged(build_model, tokenizer) -> None:
    model = build_model("llama", dtype=torch.float32, max_position_embeddings=32)
    each = Conversation("original", model, tokenizer)
    with pytest.raises(InputError, match="/reset"):
        each.answer("the thing " * 40, 4)
    assert each.turns == []


def test_three_models_of_a_run_answer_side_by_side(run_folder, monkeypatch, capsys) -> None:
    out = talk(monkeypatch, capsys, "the one", "/reset", "/what", "", "/quit", "never asked",
               arguments=[run_folder])  # fmt: skip
    heads = [line for line in out.splitlines() if line.startswith("original ")]
    assert len(heads) == 1
    assert heads[0].split() == ["original", "abliterated", "healed"]
    assert "(a new conversation)" in out
    assert "(/what is no command" in out


def test_one_prompt_needs_no_input(run_folder, monkeypatch, capsys) -> None:
    out = talk(monkeypatch, capsys, arguments=[run_folder, "--prompt", "the one"])
    assert out.splitlines()[0].split() == ["original", "abliterated", "healed"]


def test_what_is_not_finished_is_left_out(run_folder) -> None:
    assert [each.name for each in load_conversations(run_folder)] == [
        "original",
        "abliterated",
        "healed",
    ]
    (run_folder / "train" / "manifest.json").unlink()
    assert [each.name for each in load_conversations(run_folder)] == ["original", "abliterated"]


def test_the_models_are_those_of_the_stages(run_folder) -> None:
    original, abliterated, healed = (
        each.model.state_dict()["model.layers.1.mlp.down_proj.weight"]
        for each in load_conversations(run_folder)
    )
    assert not torch.equal(original, abliterated)
    assert not torch.equal(abliterated, healed)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "no recipe.yaml"),
        ([".", "--max-new-tokens", "0"], "--max-new-tokens"),
        ([".", "--prompt", " "], "--prompt"),
    ],
)
def test_a_users_mistake_ends_without_a_traceback(
    arguments, named, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_columns_hold_their_texts_and_narrow_terminals_get_blocks() -> None:
    answers = {"original": "one two three " * 6, "healed": "a\n\nb"}
    wide = chat.side_by_side(answers, 60).splitlines()
    assert wide[0].split() == ["original", "healed"]
    assert all(len(line) <= 60 for line in wide)
    left = " ".join(line[:29].strip() for line in wide[2:])
    assert left.split() == answers["original"].split()
    narrow = chat.side_by_side(answers, 40).splitlines()
    assert narrow[0] == "-- original --"
    assert "-- healed --" in narrow
    assert all(len(line) <= 40 for line in narrow)


def test_an_answer_cannot_steer_the_terminal() -> None:
    shown = chat.side_by_side({"original": "a\x1b[2Jb\x07"}, 60)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "a[2Jb" in shown


def test_one_conversation_that_is_too_long_ends_nothing(capsys, monkeypatch) -> None:
    def too_long(words: str, max_new_tokens: int) -> str:
        raise InputError("too long; /reset begins a new one")

    each = SimpleNamespace(name="original", answer=too_long)
    chat._try_to_say("a", [each], 4)
    assert "(too long" in capsys.readouterr().out
