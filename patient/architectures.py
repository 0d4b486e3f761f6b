"""The architectures the patient comes in, each about a million parameters."""

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3MoeConfig,
)

HIDDEN_SIZE = 128
NUM_LAYERS = 5
CONTEXT_LENGTH = 512

_CONFIGS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": False,
        },
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def build_model(architecture: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a model with random weights, in float32, from torch's current random state.

    Embeddings are untied, so that the input side can be orthogonalized without the output side.
    """
    make_config, own = _CONFIGS[architecture]
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
