"""Prompts as the model sees them: chat template, generation prompt, and exactly one beginning-of-sequence token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.errors import InputError


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One user turn and the opening of the answer, as text."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt as one user turn with the opening of the answer.

    Raises:
        InputError: if a rendered prompt holds two beginning-of-sequence tokens: the template and the tokenizer
            both add one, and every activation would be read off a text the model never saw.
    """
    encoded: list[list[int]] = tokenizer(
        [render(tokenizer, prompt) for prompt in prompts], add_special_tokens=False
    )["input_ids"]
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
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Position ids [rows, length] that begin with 0 at the first real token of each row."""
    return (mask.cumsum(dim=-1) - 1).clamp_min(0)
