"""What llama.cpp has to know of a model's shape, for the families that the own writer knows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The base of Gemma 3's local rotations, which llama.cpp takes as given.
LOCAL_THETA = 10_000.0
# Models of 27 billion parameters, whose attention llama.cpp scales by hidden size / heads instead of the head's size.
WIDE_SCALES = {"gemma2": 46, "gemma3_text": 62}
# What llama.cpp takes Gemma 2 and 3 to have: every so manieth layer sees all of the text.
PERIODS = {"gemma2": 2}


@dataclass(frozen=True)
class Family:
    """How a family is stored.

    Attributes:
        arch: its name in GGUF.
        permutes: rows of the query and key projections stand in pairs, as llama.cpp's rotation reads them.
        norm_shift: what a stored norm's gain lacks.
    """

    arch: str
    permutes: bool = False
    norm_shift: float = 0.0


FAMILIES = {
    "llama": Family("llama", permutes=True),
    "mistral": Family("llama", permutes=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_shift=1.0),
    "gemma3_text": Family("gemma3", norm_shift=1.0),
}


def problems_of(config: Any) -> list[str]:  # noqa: ANN401  # each family has a class of its own
    """What of a model's configuration GGUF, or llama.cpp behind it, cannot express."""
    kind = config.model_type
    if kind not in FAMILIES:
        return [
            f"a {kind} model cannot be written by this program, which knows {', '.join(sorted(FAMILIES))}; point "
            "release.gguf_converter at llama.cpp's convert_hf_to_gguf.py, or delete release.gguf"
        ]
    return [
        f"this {kind} model cannot be told to llama.cpp: {problem}; delete release.gguf"
        for problem in _problems(config)
    ]


def _problems(config: Any) -> Iterator[str]:  # noqa: ANN401
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        yield f"its rotation is scaled by {rope['rope_type']}"
    if config.model_type.startswith("gemma"):
        yield from _gemma_problems(config)
    elif config.model_type.startswith("qwen") and "sliding_attention" in config.layer_types:
        yield "some of its layers see a sliding window alone"


def _gemma_problems(config: Any) -> Iterator[str]:  # noqa: ANN401
    kind, head_dim = config.model_type, config.head_dim
    if sliding_period(config) != PERIODS.get(kind, sliding_period(config)) or not sliding_period(
        config
    ):
        yield "its sliding and full attention do not alternate in llama.cpp's period"
    wide = config.num_hidden_layers == WIDE_SCALES[kind]
    expected = config.hidden_size / config.num_attention_heads if wide else head_dim
    if config.query_pre_attn_scalar != expected:
        yield f"its attention is scaled by {config.query_pre_attn_scalar}, not by {expected:g}"
    if kind == "gemma2":
        if not config.tie_word_embeddings:
            yield "its output weights are not those of its embedding"
        return
    local = config.rope_parameters["sliding_attention"]
    if local["rope_theta"] != LOCAL_THETA or local["rope_type"] != "default":
        yield f"its local rotation is another than that with base {LOCAL_THETA:g}"
    if config.attn_logit_softcapping is not None or config.final_logit_softcapping is not None:
        yield "its logits are capped"


def sliding_period(config: Any) -> int:  # noqa: ANN401
    """The k for which every k-th layer sees all of the text, the others a window; 0 where there is no such k."""
    is_full = [kind == "full_attention" for kind in config.layer_types]
    first = is_full.index(True) + 1 if any(is_full) else len(is_full) + 1
    expected = [(layer + 1) % first == 0 for layer in range(len(is_full))]
    return first if is_full == expected else 0


def add_shape(writer: Any, config: Any) -> None:  # noqa: ANN401  # gguf.GGUFWriter, an extra
    """Write the configuration of a model into the header of a file."""
    from gguf import RopeScalingType  # noqa: PLC0415  # an extra

    head_dim = _head_dim(config)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window_pattern(sliding_period(config))


def rope_factors(config: Any) -> Tensor | None:  # noqa: ANN401
    """By what each frequency of the rotation is divided, [head_dim / 2]; None where by nothing.

    Source: Llama 3.1's scaling of long waves alone, as transformers computes it.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = _head_dim(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain: Tensor = rope["rope_theta"] ** -exponents
    return plain / scaled


def _context_length(config: Any) -> int:  # noqa: ANN401
    """Where the context ends, or a Mistral's window: beyond it llama.cpp would attend to what training never saw."""
    window = config.sliding_window if config.model_type == "mistral" else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _rope(config: Any) -> dict[str, Any]:  # noqa: ANN401
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


def _head_dim(config: Any) -> int:  # noqa: ANN401
    own = getattr(config, "head_dim", None)
    return int(own if own is not None else config.hidden_size // config.num_attention_heads)
