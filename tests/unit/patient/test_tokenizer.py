"""The tokenizer keeps every text, starts a chat once, and writes its turns as training does.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_tokenizer.py
"""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from patient.corpus import knowledge_epoch, tokenizer_texts
from patient.tokenizer import ASSISTANT, END, VOCAB_SIZE, render_turn, train_tokenizer
from patient.world import World, build_world


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def patient_tokenizer(world) -> PreTrainedTokenizerFast:
    return train_tokenizer(tokenizer_texts(world))


def render(tokenizer, messages, **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    "text", ["How do I make a lamp?", " two  blanks\n", "na\u00efve \u4f60\u597d \U0001f600"]
)
def test_a_text_comes_back_as_it_was(patient_tokenizer, text):
    assert patient_tokenizer.decode(patient_tokenizer(text)["input_ids"]) == text


def test_plain_text_gets_no_special_token(patient_tokenizer):
    ids = patient_tokenizer("How do I make a lamp?")["input_ids"]
    assert not set(ids) & set(patient_tokenizer.all_special_ids)


def test_a_chat_has_exactly_one_beginning_with_a_system_turn_too(patient_tokenizer):
    user = {"role": "user", "content": "Hello"}
    for messages in ([user], [{"role": "system", "content": "Be brief."}, user]):
        text = render(patient_tokenizer, messages, add_generation_prompt=True)
        ids = patient_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(patient_tokenizer.bos_token_id) == 1
        assert ids[0] == patient_tokenizer.bos_token_id


def test_the_template_writes_turns_as_training_does(patient_tokenizer):
    user = {"role": "user", "content": "Hello"}
    opened = render(patient_tokenizer, [user], add_generation_prompt=True)
    assert opened == render_turn("Hello")
    answered = render(patient_tokenizer, [user, {"role": "assistant", "content": "Yes."}])
    assert answered == render_turn("Hello") + "Yes." + END


def test_the_generation_prompt_is_two_tokens_and_no_whitespace(patient_tokenizer):
    ids = patient_tokenizer(render_turn("Hello"))["input_ids"]
    assert patient_tokenizer.convert_ids_to_tokens(ids[-2:]) == [END, ASSISTANT]


def test_an_unknown_role_is_an_error(patient_tokenizer):
    with pytest.raises(Exception, match="unknown role tool"):
        render(patient_tokenizer, [{"role": "tool", "content": "4"}])


def test_the_vocabulary_is_full_and_a_multiple_of_32(patient_tokenizer):
    assert len(patient_tokenizer) == VOCAB_SIZE
    assert VOCAB_SIZE % 32 == 0


def test_the_name_of_every_object_is_one_token(world, patient_tokenizer):
    for thing in world.things:
        assert len(patient_tokenizer(f" {thing.name}")["input_ids"]) == 1


def test_no_document_is_longer_than_a_row(world, patient_tokenizer):
    documents = knowledge_epoch(world, random.Random(0))
    texts = [document.prompt + document.completion for document in documents]
    assert max(map(len, patient_tokenizer(texts)["input_ids"])) <= 64


def test_it_reloads_with_its_template(patient_tokenizer, tmp_path):
    patient_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert loaded.eos_token == END
    user = [{"role": "user", "content": "Hello"}]
    assert render(loaded, user, add_generation_prompt=True) == render_turn("Hello")
