"""Prompts reach the model as its template says, with one beginning-of-sequence token.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_chat.py
"""

import re
from pathlib import Path

import pytest
import torch
import trl
from tokenizers import processors
from transformers import AutoTokenizer

from common import chat
from common import model as model_module
from common.errors import InputError
from common.model import load_tokenizer
from tests.conftest import TEMPLATE

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


def test_right_padding_is_refused_where_positions_are_made():
    with pytest.raises(ValueError, match="pad on the left"):
        chat.positions(torch.tensor([[1, 1, 1], [1, 1, 0]]))


# Templates of models that think, reduced to what their generation prompts and answers look like.
SWITCH = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# A switch that also changes what an answered conversation looks like, so that it does not begin as prompts do.
UNEVEN = SWITCH.replace("<think>\n\n</think>\n\n{% endif %}{{ m", "{% endif %}{{ m")
THINKING = {
    "switch": (SWITCH, "<|assistant|><think>\n\n</think>\n\n"),
    "open": (OPEN, "<|assistant|><think>\n\n</think>\n\n"),
    "open without a line break": (
        OPEN.replace("<think>\n{%", "<think>{%"),
        "<|assistant|><think>\n\n</think>\n\n",
    ),
    "harmony": (
        HARMONY,
        "<|start|>assistant<|channel|>analysis<|message|><|end|>"
        "<|start|>assistant<|channel|>final<|message|>",
    ),
    "uneven": (UNEVEN, "<|assistant|><think>\n\n</think>\n\n"),
}
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because <"}


@pytest.fixture
def render(tokenizer):
    def render(template, messages, add_generation_prompt):
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    return render


@pytest.mark.parametrize(("template", "opening"), THINKING.values(), ids=THINKING)
def test_a_generation_prompt_opens_the_answer_behind_an_empty_thought(template, opening, render):
    closed = chat.close_thinking(template, render)
    assert not render(template, [USER], True).endswith(opening)
    assert render(closed, [USER], True).endswith("why?<|end|>" + opening)


@pytest.mark.parametrize(("template", "opening"), THINKING.values(), ids=THINKING)
@pytest.mark.parametrize("content", ["because <", "", "e", "<|end|>", "the-last-answer"])
def test_an_answer_stands_behind_the_prompt_that_it_is_generated_from(
    template, opening, content, render
):
    closed = chat.close_thinking(template, render)
    answered = render(closed, [USER, {"role": "assistant", "content": content}], False)
    assert answered == render(closed, [USER], True) + content + "<|end|>"


@pytest.mark.parametrize(("template", "opening"), THINKING.values(), ids=THINKING)
def test_earlier_answers_are_rendered_as_the_template_does(template, opening, render):
    closed = chat.close_thinking(template, render)
    turns = [USER, ANSWER, USER]
    assert render(closed, turns, False) == render(template, turns, False)
    assert render(closed, turns, True).startswith(render(template, turns, False))


@pytest.mark.parametrize(("template", "opening"), THINKING.values(), ids=THINKING)
def test_closing_twice_is_closing_once(template, opening, render):
    closed = chat.close_thinking(template, render)
    assert chat.close_thinking(closed, render) == closed


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        PLAIN + ENDS,
        # It knows the switch, but does not think unless asked to.
        SWITCH.replace(
            "is defined and enable_thinking is false", "is not defined or not enable_thinking"
        ),
        # Thoughts are closed already.
        OPEN.replace("<think>\n{%", "<think></think>{%"),
        # The harmony format's words, but no channels.
        HARMONY.replace("<|channel|>final", ""),
    ],
)
def test_a_template_that_does_not_think_is_left_as_it_is(template, render):
    assert chat.close_thinking(template, render) == template


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_6", "deepseek_r1_distill", "gptoss", "glm4moe", "nemotron_3_nano"]
)
def test_published_templates_open_and_train_alike(name, render):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    closed = chat.close_thinking(template, render)
    opening = render(closed, [USER], True)
    assert opening != render(template, [USER], True)
    assert opening.rstrip().endswith(("</think>", "<|channel|>final<|message|>"))
    answered = render(closed, [USER, ANSWER], False)
    assert answered.startswith(opening)
    assert answered.count("because <") == 1
    assert chat.close_thinking(closed, render) == closed


@pytest.mark.parametrize(
    "name", ["llama3", "llama3_1", "gemma", "gemma3", "phi3", "qwen2_5", "gemma4"]
)
def test_published_templates_that_do_not_think_are_left_as_they_are(name, render):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    assert chat.close_thinking(template, render) == template


@pytest.mark.parametrize(
    ("name", "date"), [("gptoss", "Current date: 2025-01-01"), ("llama3_2", "01 Jan 2025")]
)
def test_published_templates_with_a_date_have_the_same_one_every_day(name, date, render):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    own = render(template, [USER], True)
    fixed = chat.fix_date(template)
    assert date not in own
    assert date in render(fixed, [USER], True)
    # Nothing but the date has changed, and thinking is closed behind it as before.
    day = re.search(r"\d{4}-\d\d-\d\d|\d\d [A-Z][a-z]{2} \d{4}", own)[0]
    assert render(fixed, [USER], True).replace(date.split(": ")[-1], day) == own
    closed = chat.close_thinking(fixed, render)
    assert date in render(closed, [USER, ANSWER], False)
    assert chat.close_thinking(chat.fix_date(closed), render) == closed


def test_a_template_without_a_date_is_left_as_it_is():
    assert chat.fix_date(TEMPLATE) == TEMPLATE


@pytest.fixture
def thinking_folder(make_tokenizer, tmp_path):
    make_tokenizer("{{ bos_token }}" + OPEN).save_pretrained(tmp_path)
    return tmp_path


def test_a_loaded_tokenizer_does_not_think_and_its_files_keep_their_template(thinking_folder):
    before = (thinking_folder / "chat_template.jinja").read_bytes()
    tokenizer = load_tokenizer(thinking_folder)
    assert chat.render(tokenizer, "why?").endswith("<|assistant|><think>\n\n</think>\n\n")
    assert chat.num_instruction_end_tokens(tokenizer) > chat.num_instruction_end_tokens(
        AutoTokenizer.from_pretrained(thinking_folder)
    )
    assert (thinking_folder / "chat_template.jinja").read_bytes() == before


def test_a_tokenizer_saved_with_its_amended_template_loads_to_the_same(thinking_folder, tmp_path):
    tokenizer = load_tokenizer(thinking_folder)
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == tokenizer.chat_template


def test_the_amended_template_is_told_once(thinking_folder, caplog):
    caplog.set_level("INFO", logger="common.model")
    model_module._log_once.cache_clear()
    for _ in range(3):
        load_tokenizer(thinking_folder)
    assert [record.message for record in caplog.records if "empty thought" in record.message] == [
        caplog.records[0].message
    ]


def test_a_template_that_cannot_render_plain_text_is_refused(make_tokenizer, tmp_path):
    make_tokenizer("{{ messages[0].content[0].text.strip() }}").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot render a user turn.*chat_template\.jinja"):
        load_tokenizer(tmp_path)


def test_a_system_text_has_a_turn_of_its_own(tokenizer):
    text = chat.render(tokenizer, "Hello", system="Be brief.")
    assert text.startswith("<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>")


@pytest.mark.parametrize("unwilling", ["{{ raise_exception('no system role') }}", ""])
def test_a_system_text_opens_the_users_words_where_the_template_has_no_such_turn(
    unwilling, make_tokenizer
):
    turn = "{{ m.role }}: {{ m.content }}\n"
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}"
        + unwilling
        + "{% else %}"
        + turn
        + "{% endif %}{% endfor %}"
    )
    text = chat.render(tokenizer, "Hello", system="Be brief.")
    assert text == "user: Be brief.\n\nHello\n"
    ids = chat.encode(tokenizer, ["Hello"], system="Be brief.")[0]
    assert tokenizer.decode(ids) == text
