"""Where each family of models writes to the residual stream, as data.

A *writer* is a module whose output is added to the residual stream: the embedding, the attention output
projection, the MLP down projection, the experts of a mixture. Its side is declared, never inferred from a
shape: an output projection is often square, and the wrong side damages the matrix without removing anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.errors import InputError

Layout = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True)
class Writer:
    """One kind of writing module inside a block.

    Attributes:
        module: path inside the block.
        parameter: name of the weight inside the module.
        layout: `linear` [d_model, d_in], `embedding` [vocab, d_model], `experts` [experts, d_model, d_in].
        post_norm: path inside the block of the RMS norm its output passes before it is added, if any.
    """

    module: str
    parameter: str = "weight"
    layout: Layout = "linear"
    post_norm: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A family's map: its blocks, its embedding, the writers of a block, and the form of its norms' gain.

    Attributes:
        blocks: path of the list of blocks in the model.
        embedding: path of the token embedding.
        writers: the writers of one block; a block need not hold all of them (dense and sparse layers).
        norm_gain_offset: the gain of an RMS norm is `offset + weight` (1 for the Gemma family).
    """

    writers: tuple[Writer, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm_gain_offset: float = 0.0


DENSE = (Writer("self_attn.o_proj"), Writer("mlp.down_proj"))
SANDWICH = (
    Writer("self_attn.o_proj", post_norm="post_attention_layernorm"),
    Writer("mlp.down_proj", post_norm="post_feedforward_layernorm"),
)
SPARSE = (*DENSE, Writer("mlp.experts", parameter="down_proj", layout="experts"))

ARCHITECTURES = {
    "llama": Architecture(DENSE),
    "mistral": Architecture(DENSE),
    "qwen2": Architecture(DENSE),
    "qwen3": Architecture(DENSE),
    "phi3": Architecture(DENSE),
    "gemma2": Architecture(SANDWICH, norm_gain_offset=1.0),
    "gemma3_text": Architecture(SANDWICH, norm_gain_offset=1.0),
    "olmo2": Architecture(SANDWICH),
    "mixtral": Architecture(SPARSE),
    "qwen3_moe": Architecture(SPARSE),
}


@dataclass(frozen=True)
class PlacedWriter:
    """A writer found in a model.

    Attributes:
        name: path of the module in the model.
        module: the module whose output is the contribution.
        parameter: name of its weight.
        layout: see `Writer`.
        post_norm: the norm behind it, or None.
        norm_gain_offset: see `Architecture`.
        tied: the weight is shared with the unembedding.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: Layout
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
        """The bias [d_model] that is written with it, if the module has one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def post_norm_gain(self) -> Tensor | None:
        """The gain [d_model] in float64 of the norm behind it, if there is one."""
        if self.post_norm is None:
            return None
        weight: Tensor = self.post_norm.weight  # type: ignore[assignment]  # a norm's weight is a tensor
        return self.norm_gain_offset + weight.detach().to(torch.float64)


def architecture_of(model_type: str) -> Architecture:
    """Look up a family by the `model_type` of its configuration.

    Raises:
        InputError: if the family is not mapped; editing it blindly could miss writers or take the wrong side.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model: the architecture {model_type!r} is not mapped, so it is not known where it writes to the "
            f"residual stream; use one of {', '.join(sorted(ARCHITECTURES))}, or add it to "
            "common/architecture.py"
        )
    return ARCHITECTURES[model_type]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a causal language model, first to last."""
    blocks = model.get_submodule(_architecture(model).blocks)
    return list(blocks.children())


def find_writers(model: nn.Module) -> list[PlacedWriter]:
    """Every writer of a causal language model: the embedding first, then block by block.

    Raises:
        InputError: if the family is not mapped, or a block holds no writer where the map expects one.
    """
    architecture = _architecture(model)
    embedding = model.get_submodule(architecture.embedding)
    unembedding = model.get_output_embeddings()  # type: ignore[operator]  # any causal LM has it
    tied = unembedding is not None and unembedding.weight is embedding.weight
    placed = [PlacedWriter(architecture.embedding, embedding, "weight", "embedding", tied=tied)]
    for index, block in enumerate(find_blocks(model)):
        found = list(_writers_of_block(architecture, block, f"{architecture.blocks}.{index}"))
        if len(found) < 2:
            raise InputError(
                f"model: block {index} holds {len(found)} of the writers that its architecture is mapped with "
                f"({', '.join(writer.module for writer in architecture.writers)}); correct common/architecture.py"
            )
        placed.extend(found)
    return placed


def _architecture(model: nn.Module) -> Architecture:
    return architecture_of(model.config.model_type)  # type: ignore[union-attr,arg-type]  # a PreTrainedModel


def _writers_of_block(
    architecture: Architecture, block: nn.Module, prefix: str
) -> Iterator[PlacedWriter]:
    modules = dict(block.named_modules())
    for writer in architecture.writers:
        module = modules.get(writer.module)
        if module is None or not isinstance(getattr(module, writer.parameter, None), Tensor):
            continue
        yield PlacedWriter(
            f"{prefix}.{writer.module}",
            module,
            writer.parameter,
            writer.layout,
            modules[writer.post_norm] if writer.post_norm is not None else None,
            architecture.norm_gain_offset,
        )
