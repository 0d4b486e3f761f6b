"""How far one model's next-token distributions are from another's, over whole answers.

The first token's divergence alone is zero wherever every answer opens alike, so whole answers are compared,
teacher-forced: both models read the same text.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common import chat

# A logit that no model has and no sum overflows with: 0 times -inf is no number.
RULED_OUT = -1e30


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of the distributions over the last axis, in nats.

    Args:
        p_logits: [..., vocab].
        q_logits: [..., vocab].

    Returns:
        [...] in float64, never negative; a token that p rules out (a logit of -inf) contributes nothing, one that
        only q rules out makes it infinite.
    """
    p = torch.log_softmax(p_logits.to(torch.float64), dim=-1)
    q = torch.log_softmax(q_logits.to(torch.float64), dim=-1)
    terms = torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q))
    return terms.sum(dim=-1).clamp_min(0.0)


def kl_to_each(p_logits: Tensor, q_logits: Iterable[Tensor]) -> Iterator[Tensor]:
    """KL(p || q) for one q after another, in float32: what p alone decides is computed once.

    Args:
        p_logits: [..., vocab].
        q_logits: tensors of that shape.

    Returns:
        For each [...] in nats, never negative. A token that p rules out contributes nothing, one that only q rules
        out makes it enormous.
    """
    p = _log_softmax(p_logits)
    weights = p.exp()
    for q in q_logits:
        yield torch.einsum("...v,...v->...", weights, p - _log_softmax(q)).clamp_min(0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, with a large number for infinity: 0 times infinity is no number."""
    return torch.log_softmax(logits.float().clamp_min(RULED_OUT), dim=-1)


def surprisal(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of tokens [...] under logits [..., vocab], in nats and float64; their mean is the cross-entropy."""
    logps = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return -logps.gather(-1, tokens[..., None])[..., 0]


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a text's n-grams that have occurred in it before, from 0 to 1; 0 for shorter texts.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, section 6 (seq-rep-4).
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def answer_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
) -> list[Tensor]:
    """As `trainable_answer_logits`, without gradients: one tensor [answer length, vocab] per row."""
    logits = trainable_answer_logits(model, prompts, answers, pad_id, model.device)
    return list(logits.split([len(answer) for answer in answers]))


def trainable_answer_logits(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> Tensor:
    """The logits that predict each token of each answer, in one forward pass.

    Args:
        model: a causal language model; one that is wrapped for training is called through its wrapper.
        prompts: token ids of each prompt.
        answers: token ids of each answer, at least one each.
        pad_id: id to pad with.
        device: where the model computes.

    Returns:
        [answer tokens, vocab], answer after answer.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = chat.pad_left(rows, pad_id, device)
    lengths = [len(answer) for answer in answers]
    # With the padding in front all answers end in the last column, so only these columns need logits.
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=chat.positions(mask),
        use_cache=False,
        logits_to_keep=max(lengths) + 1,
    ).logits
    last = logits.shape[1] - 1
    columns = torch.cat([torch.arange(last - length, last) for length in lengths])
    rows_of = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    # In one piece: the gradient of a slice is as large as what it was cut from, once for every row.
    return logits[rows_of.to(logits.device), columns.to(logits.device)]


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
