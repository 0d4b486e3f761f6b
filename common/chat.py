"""Prompts as the model sees them: chat template, generation prompt, and exactly one beginning-of-sequence token.

Models that think aloud before they answer are asked with an empty thought, in every stage alike: a direction
found behind one opening of the answer is not the one behind another. `close_thinking` and `fix_date` amend the
template once, when a tokenizer is loaded, so that whoever uses the tokenizer sees the same prompt.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import InputError

Messages = list[dict[str, Any]]
# Renders messages with a template's text, with the generation prompt or without.
Render = Callable[[str, Messages, bool], str]

NO_THINKING = "{%- set enable_thinking = false %}"
# In place of the function that templates ask for the day: 1 January 2025, in the formats they use.
SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2025') | replace('%m', '01') "
    "| replace('%d', '01') | replace('%b', 'Jan') | replace('%B', 'January') }}{%- endmacro -%}"
)
# An empty thought of the harmony format (gpt-oss), and the opening of the answer behind it.
HARMONY_CLOSING = (
    "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
)


def render(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """One user turn and the opening of the answer, as text.

    Args:
        tokenizer: with a chat template.
        prompt: the user's words.
        system: words of a system turn; in front of the user's where the template refuses that role or drops
            it, as Gemma's own later templates do.
    """
    if system is not None:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        # A template says in this way that it takes no system role; any other fault shows again below.
        with contextlib.suppress(jinja2.TemplateError):
            (text,) = _render(tokenizer, [turns])
            if system.strip() in text:
                return text
        prompt = f"{system}\n\n{prompt}"
    return _render(tokenizer, [[{"role": "user", "content": prompt}]])[0]


def _render(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages]) -> list[str]:
    """Render many at once: what the template may see besides the words is prepared once for all of them."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    return cast("list[str]", texts)


def fix_date(template: str) -> str:
    """A chat template that writes the same date every day, where it writes one (Llama 3.2, gpt-oss).

    The prompts of a recipe would otherwise change overnight, between two stages even.
    """
    return (
        SAME_DAY + template if "strftime_now" in template and SAME_DAY not in template else template
    )


def close_thinking(template: str, render: Render) -> str:
    """A chat template whose generation prompt opens the answer itself, behind an empty thought.

    A switch named `enable_thinking` is set to false. A thought that is open still (DeepSeek-R1) is closed, and
    in the harmony format (gpt-oss) an empty analysis stands before the final channel. An answer that ends the
    conversation then begins with the generation prompt too, whatever the template does with it otherwise:
    training reads the context that generation sees.

    Args:
        template: Jinja text.
        render: how it is rendered.

    Returns:
        The amended text; the same text if the model does not think, or if it was amended before.
    """
    question: Messages = [{"role": "user", "content": "question"}]
    answered = [*question, {"role": "assistant", "content": "answer"}]
    amended = template
    if "enable_thinking" in template and NO_THINKING not in template:
        switched = NO_THINKING + template
        if render(switched, question, True) != render(template, question, True):
            amended = switched
    opening = render(amended, question, True)
    closing = _closing(template, opening)
    if amended == template and not closing:
        return template
    if closing or not render(amended, answered, False).startswith(opening):
        return _with_opening(amended, closing)
    return amended


def _closing(template: str, opening: str) -> str:
    """What is missing behind a generation prompt for the answer to begin."""
    if opening.rstrip().endswith("<think>"):
        return "\n</think>\n\n" if opening.endswith("\n") else "\n\n</think>\n\n"
    if opening.endswith("<|start|>assistant") and "<|channel|>" in template:
        return HARMONY_CLOSING
    return ""


def _with_opening(template: str, closing: str) -> str:
    """Wrap a template, so that generation prompts end in `closing` and a last answer stands behind one.

    What ends an answer is what the template puts behind a placeholder in its place; the answer's own words
    could occur there again.
    """
    closing, placeholder = json.dumps(closing), json.dumps("the-last-answer")
    return f"""\
{{%- macro unclosed(messages, add_generation_prompt) -%}}
{template}
{{%- endmacro -%}}
{{%- if add_generation_prompt -%}}
{{{{- unclosed(messages, true) + {closing} -}}}}
{{%- elif messages and messages[-1].role == "assistant" and messages[-1].content is string -%}}
{{%- set stand_in = {{"role": "assistant", "content": {placeholder}}} -%}}
{{{{- unclosed(messages[:-1], true) + {closing} + messages[-1].content -}}}}
{{{{- unclosed(messages[:-1] + [stand_in], false).split({placeholder})[-1] -}}}}
{{%- else -%}}
{{{{- unclosed(messages, false) -}}}}
{{%- endif -%}}"""


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system: str | None = None
) -> list[list[int]]:
    """Token ids of each prompt as one user turn with the opening of the answer, see `render`.

    Raises:
        InputError: if a rendered prompt holds two beginning-of-sequence tokens: the template and the tokenizer
            both add one, and every activation would be read off a text the model never saw.
    """
    if system is None:
        texts = _render(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])
    else:
        texts = [render(tokenizer, prompt, system) for prompt in prompts]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    for ids in encoded:
        if bos is not None and bos != tokenizer.eos_token_id and ids.count(bos) > 1:
            raise InputError(
                f"model: its chat template gives {ids.count(bos)} {tokenizer.bos_token!r} tokens in one prompt; "
                "correct chat_template.jinja so that it gives one"
            )
    return encoded


def num_instruction_end_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the template puts behind the user's words: the end-of-instruction positions.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 ("post-instruction tokens").
    """
    one, other = encode(tokenizer, ["a", "0"])
    common = 0
    while common < min(len(one), len(other)) and one[-1 - common] == other[-1 - common]:
        common += 1
    return max(common, 1)


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Stack token ids with the padding in front, so that the last position is a real token in every row.

    Returns:
        The ids and the attention mask, both [rows, longest].
    """
    longest = max(len(row) for row in rows)
    gaps = torch.tensor([longest - len(row) for row in rows])
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = (torch.arange(longest) >= gaps.unsqueeze(1)).long()
    return ids.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Position ids [rows, length] that begin with 0 at the first real token of each row.

    Raises:
        ValueError: if a row is padded on the right: its last position, which everything here reads, is no token.
    """
    if not mask[:, -1].all():
        raise ValueError("a row ends in padding; pad on the left, as pad_left does")
    return (mask.cumsum(dim=-1) - 1).clamp_min(0)
