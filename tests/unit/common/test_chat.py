"""Prompts reach the model as its template says, with one beginning-of-sequence token.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_chat.py
"""

import pytest
import torch
from tokenizers import processors

from common import chat
from common.errors import InputError

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
ENDS = "<|end|>{% if add_generation_prompt %}<|assistant|>{% endif %}"


def test_a_rendered_prompt_opens_the_answer(tokenizer):
    text = chat.render(tokenizer, "Hello")
    assert text == "<|begin|><|user|>\nHello<|end|>\n<|assistant|>\n"


def test_an_encoded_prompt_has_one_beginning_and_decodes_to_the_rendered_text(tokenizer):
    encoded = chat.encode(tokenizer, ["Hello", "A longer one: 3 < 4"])
    for ids, prompt in zip(encoded, ["Hello", "A longer one: 3 < 4"], strict=True):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids) == chat.render(tokenizer, prompt)


def test_a_tokenizer_that_adds_its_own_beginning_does_not_double_it(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # the trap is set
    assert chat.encode(tokenizer, ["Hello"])[0].count(tokenizer.bos_token_id) == 1


def test_two_beginnings_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("{{ bos_token }}" + PLAIN + ENDS)
    with pytest.raises(InputError, match=r"gives 2 '<\|begin\|>' tokens.*chat_template\.jinja"):
        chat.encode(tokenizer, ["Hello"])


def test_a_beginning_that_is_also_the_end_token_may_repeat(make_tokenizer):
    tokenizer = make_tokenizer("{{ bos_token }}" + PLAIN + ENDS)
    tokenizer.bos_token = tokenizer.eos_token
    assert chat.encode(tokenizer, ["Hello"])[0].count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN + ENDS, 2),
        (PLAIN + ENDS + "{{ '\\n' }}", 3),
        (PLAIN + "<|end|>", 1),
        # Nothing behind the words: the last word itself stands in.
        (PLAIN, 1),
    ],
)
def test_the_number_of_instruction_end_tokens_is_the_templates(template, expected, make_tokenizer):
    assert chat.num_instruction_end_tokens(make_tokenizer(template)) == expected


def test_the_shared_template_has_four_instruction_end_tokens(tokenizer):
    assert chat.num_instruction_end_tokens(tokenizer) == 4
    ids = chat.encode(tokenizer, ["anything at all"])[0]
    assert tokenizer.decode(ids[-4:]) == "<|end|>\n<|assistant|>\n"


def test_padding_goes_in_front_and_is_masked():
    ids, mask = chat.pad_left([[5, 6], [7, 8, 9, 10]], 99, torch.device("cpu"))
    assert ids.tolist() == [[99, 99, 5, 6], [7, 8, 9, 10]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_positions_count_from_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert chat.positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
