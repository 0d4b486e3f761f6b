"""How far a model is from itself when its prompts are put into other batches: the floor under every divergence.

Kernels add in an order that depends on the shape of the batch. In bfloat16 that moves probabilities by amounts
one can see; a divergence of an edit below this floor is not an effect of the edit.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliteration.selection import next_token_logits
from common.divergence import kl_divergence


def self_divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
) -> float:
    """Mean KL between the next-token distributions of a model in batches and of the same model prompt by prompt.

    Args:
        model: the unedited model.
        tokenizer: its tokenizer.
        prompts: at least one; a few dozen are enough.
        batch_size: prompts per forward pass, as they are measured elsewhere; for 1, pairs are the other batches.

    Returns:
        Nats per prompt, never negative; 0 up to rounding in float32.
    """
    usual = next_token_logits(model, tokenizer, prompts, batch_size)
    other = next_token_logits(model, tokenizer, prompts, 1 if batch_size > 1 else 2)
    return float(kl_divergence(usual, other).mean())
