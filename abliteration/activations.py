"""Mean residual streams: all layers and end-of-instruction positions in one pass over the prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import chat, distributed, residual


@torch.inference_mode()
def mean_residual_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_positions: int,
    batch_size: int,
) -> Tensor:
    """The mean of resid_pre over prompts, in memory that does not grow with their number.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: at least one; the processes of the launch share them.
        num_positions: how many positions, counted from the end of the prompt.
        batch_size: prompts per forward pass.

    Returns:
        [layers, num_positions, d_model] in float64, the same on every process.
    """
    encoded = chat.encode(tokenizer, prompts)[distributed.rank() :: distributed.world_size()]
    encoded.sort(key=len)
    mean = residual.StreamingMean()
    starts = range(0, len(encoded), batch_size)
    for start in tqdm(
        starts, desc="residual stream", disable=not distributed.is_main(), leave=False
    ):
        pad_id = int(tokenizer.pad_token_id)
        ids, mask = chat.pad_left(encoded[start : start + batch_size], pad_id, model.device)
        with residual.reading(model, num_positions) as streams:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=chat.positions(mask),
                use_cache=False,
                logits_to_keep=1,
            )
        mean.add(torch.stack([stream.to(model.device) for stream in streams], dim=1))
    return _sum_over_processes(mean, model, num_positions) / len(prompts)


def _sum_over_processes(
    mean: residual.StreamingMean, model: PreTrainedModel, num_positions: int
) -> Tensor:
    total = mean.total
    if total is None:  # fewer prompts than processes
        config = model.config.get_text_config()
        total = torch.zeros(
            config.num_hidden_layers, num_positions, config.hidden_size, dtype=torch.float64
        )
    return distributed.sum_over_processes(total).cpu()
