"""Where each family of models writes to the residual stream, as data.

A *writer* is a module whose output is added to the residual stream: the embedding, the attention output
projection, the MLP down projection, the experts of a mixture. Its side is declared, never inferred from a
shape: an output projection is often square, and the wrong side damages the matrix without removing anything.

A *reader* only takes from the stream (queries, gates, routers, the unembedding) or works on a width of its own.
The map names both, so that a parameter it does not know is an error and not a writer that nobody edits.

Names are given as transformers 5 holds them in memory. Checkpoints may differ: there the experts of a mixture
are mostly one tensor each, and the text part of a vision-language model stands under another prefix.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import InputError

Layout = Literal["linear", "conv1d", "embedding", "experts", "experts_transposed"]
Component = Literal["embedding", "attention", "mlp"]
Part = Literal["weight", "bias"]


@dataclass(frozen=True)
class Writer:
    """One kind of writing module.

    Attributes:
        module: path inside the block, or inside the text model for what stands before the blocks.
        component: what it is part of.
        parameter: name of the weight inside the module.
        layout: `linear` [d_model, d_in], `conv1d` [d_in, d_model], `embedding` [rows, d_model],
            `experts` [experts, d_model, d_in], `experts_transposed` [experts, d_in, d_model].
        bias: name of the bias inside the module, if the module has one: [d_model], or [experts, d_model].
        post_norm: path inside the block of the RMS norm its output passes before it is added, if any.
        per_expert: path inside the block of one expert's weight on disk, with `{expert}` for its number; every
            such tensor is `linear`.
    """

    module: str
    component: Component
    parameter: str = "weight"
    layout: Layout = "linear"
    bias: str = "bias"
    post_norm: str | None = None
    per_expert: str | None = None


# In every mapped family the MLP of a block, router and experts included, is this one module.
MLP_MODULE = "mlp"
TOKENS = Writer("embed_tokens", "embedding", layout="embedding")


@dataclass(frozen=True)
class Architecture:
    """A family's map: every parameter of the model stands in it, with what it does to the residual stream.

    Attributes:
        writers: the writers of a block; a block need not hold all of them (dense and sparse layers).
        readers: paths inside a block of what writes nothing to the stream by itself.
        text: path of the text model, which holds the embeddings, the blocks and the final norm.
        text_on_disk: paths under which checkpoints hold the text model, the one transformers writes first.
        layers: path of the list of blocks inside the text model.
        embeddings: what writes to the stream before the first block, the token embedding first.
        final_norm: path of the last norm inside the text model.
        unembedding: path in the model of what turns the stream into logits.
        left_alone: paths in the model of what writes but is never edited, with the reason.
        norm_gain_offset: the gain of an RMS norm is `offset + weight` (1 for the Gemma family).
    """

    writers: tuple[Writer, ...]
    readers: tuple[str, ...]
    text: str = "model"
    text_on_disk: tuple[str, ...] = ("model",)
    layers: str = "layers"
    embeddings: tuple[Writer, ...] = (TOKENS,)
    final_norm: str = "norm"
    unembedding: str = "lm_head"
    left_alone: Mapping[str, str] = field(default_factory=dict, hash=False)
    norm_gain_offset: float = 0.0

    @property
    def blocks(self) -> str:
        """Path of the list of blocks in the model."""
        return f"{self.text}.{self.layers}"

    @property
    def embedding(self) -> str:
        """Path of the token embedding in the model."""
        return f"{self.text}.{self.embeddings[0].module}"


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ROUTED = ("mlp.gate", "mlp.experts.gate_up_proj")
SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
# Queries, keys and values through a narrow latent space (DeepSeek); small models have a plain q_proj.
LATENT = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj",
)

ATTENTION = Writer("self_attn.o_proj", "attention")
MLP = Writer("mlp.down_proj", "mlp")
DENSE = (ATTENTION, MLP)
SANDWICH = (
    Writer("self_attn.o_proj", "attention", post_norm="post_attention_layernorm"),
    Writer("mlp.down_proj", "mlp", post_norm="post_feedforward_layernorm"),
)
EXPERTS = Writer(
    "mlp.experts",
    "mlp",
    parameter="down_proj",
    layout="experts",
    per_expert="mlp.experts.{expert}.down_proj.weight",
)
SPARSE = (*DENSE, EXPERTS)

LLAMA = Architecture(DENSE, (*PRE_NORMS, *QKV, *GATE_UP))
QWEN3 = Architecture(DENSE, (*LLAMA.readers, *QK_NORMS))
GEMMA2 = Architecture(
    SANDWICH,
    ("input_layernorm", "pre_feedforward_layernorm", *QKV, *GATE_UP),
    norm_gain_offset=1.0,
)
GEMMA3 = Architecture(SANDWICH, (*GEMMA2.readers, *QK_NORMS), norm_gain_offset=1.0)
OLMO2 = Architecture(SANDWICH, (*QKV, *QK_NORMS, *GATE_UP))
PHI3 = Architecture(DENSE, (*PRE_NORMS, "self_attn.qkv_proj", "mlp.gate_up_proj"))
GPT2 = Architecture(
    (
        Writer("attn.c_proj", "attention", layout="conv1d"),
        Writer("mlp.c_proj", "mlp", layout="conv1d"),
    ),
    ("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc"),
    text="transformer",
    text_on_disk=("transformer", ""),  # the first GPT-2 checkpoints hold the bare text model
    layers="h",
    embeddings=(
        Writer("wte", "embedding", layout="embedding"),
        Writer("wpe", "embedding", layout="embedding"),
    ),
    final_norm="ln_f",
)
GPT_NEOX = Architecture(
    (Writer("attention.dense", "attention"), Writer("mlp.dense_4h_to_h", "mlp")),
    (*PRE_NORMS, "attention.query_key_value", "mlp.dense_h_to_4h"),
    text="gpt_neox",
    text_on_disk=("gpt_neox",),
    embeddings=(Writer("embed_in", "embedding", layout="embedding"),),
    final_norm="final_layer_norm",
)
MIXTRAL = Architecture(
    (
        ATTENTION,
        Writer(
            "mlp.experts",
            "mlp",
            parameter="down_proj",
            layout="experts",
            per_expert="block_sparse_moe.experts.{expert}.w2.weight",
        ),
    ),
    (*PRE_NORMS, *QKV, *ROUTED),
)
QWEN2_MOE = Architecture(
    # The experts last: what is added behind a block must not pass the gate of the shared expert.
    (*DENSE, Writer("mlp.shared_expert.down_proj", "mlp"), EXPERTS),
    (
        *LLAMA.readers,
        *ROUTED,
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert_gate",
    ),
)
QWEN3_MOE = Architecture(SPARSE, (*QWEN3.readers, *ROUTED))
SHARED_WRITERS = (*SPARSE, Writer("mlp.shared_experts.down_proj", "mlp"))
DEEPSEEK_V3 = Architecture(
    SHARED_WRITERS,
    (*PRE_NORMS, *LATENT, *GATE_UP, *ROUTED, *SHARED),
)
GLM4_MOE = Architecture(SHARED_WRITERS, (*QWEN3.readers, *ROUTED, *SHARED))
GPT_OSS = Architecture(
    (
        ATTENTION,
        Writer(
            "mlp.experts",
            "mlp",
            parameter="down_proj",
            layout="experts_transposed",
            bias="down_proj_bias",
        ),
    ),
    (
        *PRE_NORMS,
        *QKV,
        "self_attn.sinks",
        "mlp.router",
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj_bias",
    ),
)
GLM = Architecture(DENSE, (*PRE_NORMS, *QKV, "mlp.gate_up_proj"))
GLM4 = Architecture(
    (
        Writer("self_attn.o_proj", "attention", post_norm="post_self_attn_layernorm"),
        Writer("mlp.down_proj", "mlp", post_norm="post_mlp_layernorm"),
    ),
    GLM.readers,
)

IMAGES = "it writes at the positions of images only"


def _seeing(text: Architecture, on_disk: tuple[str, ...], *images: str) -> Architecture:
    """The map of a vision-language model: the text family's own, with what reads images left alone."""
    return Architecture(
        text.writers,
        text.readers,
        text="model.language_model",
        text_on_disk=on_disk,
        left_alone=dict.fromkeys(images, IMAGES),
        norm_gain_offset=text.norm_gain_offset,
    )


LLAVA_ON_DISK = ("language_model.model", "model.language_model")
LLAVA_IMAGES = ("model.vision_tower", "model.multi_modal_projector")

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "gemma": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "glm": GLM,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "glm4": GLM4,
    "mixtral": MIXTRAL,
    "olmoe": Architecture((ATTENTION, EXPERTS), (*PRE_NORMS, *QKV, *QK_NORMS, *ROUTED)),
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "gemma3": _seeing(GEMMA3, LLAVA_ON_DISK, *LLAVA_IMAGES),
    "llava": _seeing(LLAMA, LLAVA_ON_DISK, *LLAVA_IMAGES),
    "qwen2_5_vl": _seeing(LLAMA, ("model", "model.language_model"), "model.visual"),
}

# Families with layers that carry a state from token to token: those layers are not mapped, and where several
# continuations share a row the state would carry one into the next.
RECURRENT = frozenset(
    {
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "glm5_next",
        "granitemoehybrid",
        "inkling",
        "inkling2",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
        "qwen4_exp",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    }
)


@dataclass(frozen=True)
class PlacedWriter:
    """A writer found in a model.

    Attributes:
        name: path of the module in the model.
        module: the module whose output is the contribution.
        parameter: name of its weight.
        layout: see `Writer`.
        component: see `Writer`.
        block: number of the block it stands in, or None before the first.
        bias_parameter: name of its bias, if it has one.
        post_norm: the norm behind it, or None.
        norm_gain_offset: see `Architecture`.
        tied: the weight is shared with the unembedding.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: Layout
    component: Component
    block: int | None = None
    bias_parameter: str = "bias"
    post_norm: nn.Module | None = None
    norm_gain_offset: float = 0.0
    tied: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight itself, in the layout's shape."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [d_model] or [experts, d_model] that is written with it, if the module has one."""
        bias: Tensor | None = getattr(self.module, self.bias_parameter, None)
        return bias

    @property
    def post_norm_gain(self) -> Tensor | None:
        """The gain [d_model] in float64 of the norm behind it, if there is one."""
        if self.post_norm is None:
            return None
        weight: Tensor = self.post_norm.weight  # type: ignore[assignment]  # a norm's weight is a tensor
        return self.norm_gain_offset + weight.detach().to(torch.float64)


@dataclass(frozen=True)
class DiskTensor:
    """A tensor of a checkpoint that is a writer's, or a part of one.

    Attributes:
        writer: name of the writer in memory (`PlacedWriter.name`).
        part: weight or bias.
        layout: layout of the weight as it is stored; one expert by itself is `linear`.
        expert: number of the expert, where each is stored by itself.
    """

    writer: str
    part: Part
    layout: Layout
    expert: int | None = None


def architecture_of(model_type: str) -> Architecture:
    """Look up a family by the `model_type` of its configuration.

    Raises:
        InputError: if the family is not mapped; editing it blindly could miss writers or take the wrong side.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    mapped = ", ".join(sorted(ARCHITECTURES))
    if model_type.removesuffix("_text") in RECURRENT:
        raise InputError(
            f"model: the architecture {model_type!r} has layers with a recurrent state (state space, linear "
            f"attention or convolution), which are not supported; use a model of one of {mapped}"
        )
    raise InputError(
        f"model: the architecture {model_type!r} is not mapped, so it is not known where it writes to the "
        f"residual stream; use one of {mapped}, or add it to common/architecture.py"
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a causal language model, first to last."""
    blocks = model.get_submodule(_architecture(model).blocks)
    return list(blocks.children())


def find_writers(model: nn.Module) -> list[PlacedWriter]:
    """Every writer of a causal language model: the embeddings first, then block by block.

    Raises:
        InputError: if the family is not mapped, a block lacks a writer where the map expects one, or the model
            has a parameter that the map does not know: it could write what an edit removes.
    """
    architecture = _architecture(model)
    text = model.get_submodule(architecture.text)
    unembedding = model.get_output_embeddings()  # type: ignore[operator]  # any causal LM has it
    placed = [
        replace(writer, tied=unembedding is not None and unembedding.weight is writer.weight)
        for writer in _place(architecture, architecture.embeddings, text, architecture.text)
    ]
    for index, block in enumerate(find_blocks(model)):
        prefix = f"{architecture.blocks}.{index}"
        placed += _place(architecture, architecture.writers, block, prefix, index)
    _require_every_parameter_known(model, placed)
    _require_both_components(model, placed)
    return placed


def on_disk(architecture: Architecture, tensor_name: str) -> DiskTensor | None:
    """Whose a tensor of a checkpoint is, by its name alone.

    Blocks beyond the model's last (layers that predict several tokens ahead, which transformers does not load)
    are attributed too: their writers are in no edit.

    Args:
        architecture: the family's map.
        tensor_name: the tensor's name in a safetensors file.

    Returns:
        The writer it belongs to, or None if it is no writer's.
    """
    for pattern, stored in _disk_patterns(architecture):
        match = pattern.fullmatch(tensor_name)
        if match is not None:
            groups = match.groupdict()
            expert = groups.get("expert")
            return replace(
                stored,
                writer=stored.writer.format(block=groups.get("block")),
                expert=None if expert is None else int(expert),
            )
    return None


@cache
def _disk_patterns(architecture: Architecture) -> list[tuple[re.Pattern[str], DiskTensor]]:
    """Every form of a writer's name on disk; the writer's own holds `{block}` for the number of its block."""
    text = "|".join(re.escape(path + ".") if path else "" for path in architecture.text_on_disk)
    block = re.escape(architecture.layers) + r"\.(?P<block>\d+)\."
    patterns = []
    for writers, place, home in (
        (architecture.embeddings, "", architecture.text),
        (architecture.writers, block, architecture.blocks + ".{block}"),
    ):
        for writer in writers:
            name = f"{home}.{writer.module}"
            forms: list[tuple[str, DiskTensor]] = [
                (f"{writer.module}.{writer.parameter}", DiskTensor(name, "weight", writer.layout)),
                (f"{writer.module}.{writer.bias}", DiskTensor(name, "bias", writer.layout)),
            ]
            if writer.per_expert is not None:
                forms.append((writer.per_expert, DiskTensor(name, "weight", "linear")))
            for form, stored in forms:
                path = re.escape(form).replace(re.escape("{expert}"), r"(?P<expert>\d+)")
                patterns.append((re.compile(f"(?:{text}){place}{path}"), stored))
    return patterns


def _architecture(model: nn.Module) -> Architecture:
    return architecture_of(model.config.model_type)  # type: ignore[union-attr,arg-type]  # a PreTrainedModel


def _place(
    architecture: Architecture,
    writers: tuple[Writer, ...],
    parent: nn.Module,
    prefix: str,
    block: int | None = None,
) -> Iterator[PlacedWriter]:
    modules = dict(parent.named_modules())
    for writer in writers:
        module = modules.get(writer.module)
        if module is None or not isinstance(getattr(module, writer.parameter, None), Tensor):
            continue
        yield PlacedWriter(
            f"{prefix}.{writer.module}",
            module,
            writer.parameter,
            writer.layout,
            writer.component,
            block,
            writer.bias,
            modules[writer.post_norm] if writer.post_norm is not None else None,
            architecture.norm_gain_offset,
        )


def _require_every_parameter_known(model: nn.Module, placed: list[PlacedWriter]) -> None:
    known = _known_paths(_architecture(model), len(find_blocks(model)))
    for writer in placed:
        known |= _paths_of(writer)
    unknown = [name for name, _ in model.named_parameters() if not _is_below(name, known)]
    if unknown:
        raise InputError(
            f"model: {', '.join(unknown[:3])}{' ...' if unknown[3:] else ''}: not mapped for the architecture "
            f"{model.config.model_type!r}, so it may write to the residual stream what the edit removes; "  # type: ignore[union-attr]  # a PreTrainedModel
            "name it in common/architecture.py as a writer, as a reader, or as left alone with the reason"
        )


def _known_paths(architecture: Architecture, num_blocks: int) -> set[str]:
    """The paths in a model of everything that is mapped as no writer: readers, norms, what is left alone."""
    norms = [writer.post_norm for writer in architecture.writers if writer.post_norm is not None]
    return {
        architecture.unembedding,
        f"{architecture.text}.{architecture.final_norm}",
        *architecture.left_alone,
        *(
            f"{architecture.blocks}.{block}.{path}"
            for path in (*architecture.readers, *norms)
            for block in range(num_blocks)
        ),
    }


def _paths_of(writer: PlacedWriter) -> set[str]:
    """What a writer accounts for: its module, or only its own parameters where the module holds readers too."""
    if writer.layout in ("experts", "experts_transposed"):
        return {f"{writer.name}.{writer.parameter}", f"{writer.name}.{writer.bias_parameter}"}
    return {writer.name}


def _is_below(name: str, paths: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in paths for length in range(len(parts), 0, -1))


def _require_both_components(model: nn.Module, placed: list[PlacedWriter]) -> None:
    found = {(writer.block, writer.component) for writer in placed}
    for block in range(len(find_blocks(model))):
        for component in ("attention", "mlp"):
            if (block, component) not in found:
                raise InputError(
                    f"model: block {block} holds no {component} writer, which every block of the architecture "
                    f"{model.config.model_type!r} is mapped with; such a model is not supported"  # type: ignore[union-attr]  # a PreTrainedModel
                )
