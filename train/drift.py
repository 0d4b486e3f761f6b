"""What training adds to each writer along the removed vectors: found once, then held, penalized and logged alike.

Of a LoRA update B A the factor B writes to the stream, so U^T dW = (U^T B) A needs no dW; of full training the weight
is held against the one it began with. What an edit left along the vectors (at strengths below 1, where norms are kept)
and what it adds to the stream is no part of this.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.architecture import PlacedWriter, Writer, architecture_of
from common.edits import Edit, as_stored, component_along, edited_writers
from common.errors import StageError
from train.adapter import adapters_of, factors, lora_layers, num_experts
from train.shards import full, replicated, sharding_gradients, summed


class Sharded(StageError):
    """This process holds an unknown part of a parameter."""


@dataclass(frozen=True)
class Drift(ABC):
    """What training adds to one writer along the vectors that were removed from it.

    Parameters are looked up when they are needed: sharding puts others in the place of those the model was made with.

    Attributes:
        writer: its name in the model.
        basis: the orthonormal vectors U [k, d_model] in float64.
        scale: |[W b]|_F sqrt(k / d_model): what the writer of the abliterated model writes along k vectors that are
            nothing special. The original's own |U^T W| is no file's that training reads, and 0 in unlucky cases.
    """

    writer: str
    basis: Tensor
    scale: float

    @abstractmethod
    def along(self) -> list[Tensor]:
        """U^T dW, and U^T db where there is a bias: differentiable, in float32 or wider, the same on every process.

        Raises:
            Sharded: if this process holds an unknown part of a parameter.
        """

    @abstractmethod
    def take_back(self) -> None:
        """Project what training added, so that nothing of it is left along the vectors; once it was stepped.

        Raises:
            Sharded: if this process holds an unknown part of a parameter.
        """

    def square(self) -> Tensor:
        """|U^T dW|^2 / scale^2, a number that is differentiable."""
        return torch.stack([part.square().sum() for part in self.along()]).sum() / self.scale**2


@dataclass(frozen=True)
class FactorDrift(Drift):
    """Of a LoRA layer: scaling (U^T B) A, each expert by itself.

    Attributes:
        layer: the layer.
        adapter: which of its adapters.
        shapes: of its factors A and B.
    """

    layer: LoraLayer
    adapter: str
    shapes: tuple[torch.Size, torch.Size]

    def along(self) -> list[Tensor]:
        """U^T dW [experts, k, d_in], and [k, 1] of a bias behind B."""
        reading, writing, bias = self._factors()
        written = _along(writing, self.basis)
        experts = num_experts(self.layer)
        # PEFT's order: B is [d_model, r, experts], A is [experts, r, d_in].
        read = full(sharding_gradients(reading)).to(written).reshape(experts, -1, reading.shape[-1])
        written = written.reshape(len(self.basis), -1, experts)
        scaling = self.layer.scaling[self.adapter]
        parts = [scaling * torch.einsum("kre,eri->eki", written, read)]
        return parts if bias is None else [*parts, scaling * _along(bias, self.basis)]

    def take_back(self) -> None:
        """Project the columns of B, and a bias behind it."""
        _, writing, bias = self._factors()
        for tensor in (writing, bias):
            if tensor is not None:
                by_input = _columns(tensor).detach().double().T
                basis = replicated(self.basis, by_input)
                held = by_input - summed(by_input @ basis.T) @ basis
                _columns(tensor).copy_(held.T)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A [r, d_in], B [d_model, r] and the bias [d_model] behind B, if there is one."""
        reading, writing, bias = factors(self.layer, self.adapter)
        for factor, shape in zip((reading, writing), self.shapes, strict=True):
            _require_whole(factor, shape)
        return reading, writing, bias


@dataclass(frozen=True)
class WeightDrift(Drift):
    """Of a writer that is trained as it is.

    Attributes:
        placed: the writer.
        shapes: of its weight and, if it has one, its bias.
        due: what it wrote along the vectors before training [..., d_in, k], and its bias [rows, k].
    """

    placed: PlacedWriter
    shapes: tuple[torch.Size, ...]
    due: tuple[Tensor, ...]

    def along(self) -> list[Tensor]:
        """U^T dW [..., d_in, k], and U^T db [rows, k]."""
        parts = []
        for tensor, due in zip(self._by_input(), self.due, strict=True):
            wide = sharding_gradients(tensor.to(_wide(tensor.dtype)))
            written = full(wide @ replicated(self.basis, wide).T)
            parts.append(written - due.to(written))
        return parts

    def take_back(self) -> None:
        """Take the change along the vectors out of weight and bias."""
        for tensor, due in zip(self._by_input(), self.due, strict=True):
            wide = tensor.detach().double()
            basis = replicated(self.basis, wide)
            excess = summed(wide @ basis.T)
            excess = excess - replicated(due, excess)
            tensor.copy_(wide - excess @ basis)

    def _by_input(self) -> list[Tensor]:
        """The weight as [..., d_in, d_model], and the bias [rows, d_model]: views of the parameters."""
        weight, bias = self.placed.weight, self.placed.bias
        stored = [weight] if bias is None else [weight, bias]
        for tensor, shape in zip(stored, self.shapes, strict=True):
            _require_whole(tensor, shape)
        return [as_stored(weight, self.placed.layout), *map(_rows, stored[1:])]


def weight_drifts(model: nn.Module, edit: Edit) -> list[Drift]:
    """What full training adds to the writers that something is removed from, at strength 0 too.

    Args:
        model: the abliterated model, before its first step.
        edit: its edit.
    """
    drifts: list[Drift] = []
    for name, writer in edited_writers(model, edit).items():
        basis, stored = edit.basis(name), [writer.weight]
        due = [component_along(writer.weight, basis, writer.layout)]
        if (bias := writer.bias) is not None:
            due.append(_rows(bias.detach().double()) @ basis.to(bias.device).T)
            stored.append(bias)
        shapes = tuple(tensor.shape for tensor in stored)
        drifts.append(WeightDrift(name, basis, _scale(stored, basis), writer, shapes, tuple(due)))
    return drifts


def lora_drifts(model: nn.Module, edit: Edit) -> tuple[list[Drift], list[str]]:
    """What an adapter adds to the writers that something is removed from, at strength 0 too.

    Args:
        model: a PeftModel.
        edit: the edit of the model below it.

    Returns:
        One drift per adapted writer, and sentences about what else the adapter changes of a writer, or of the norm
        behind one: nothing here sees that.
    """
    kinds = _kinds(model, edit)
    drifts: list[Drift] = []
    for path, layer in lora_layers(model):
        name = _plain_name(path)
        if name not in kinds or not _is_seen(layer, kinds[name]):
            continue
        base = layer.get_base_layer()
        basis = edit.basis(name)
        scale = _scale(_stored(base, kinds[name]), basis)
        for adapter in adapters_of(layer):
            reading, writing, _ = factors(layer, adapter)
            shapes = (reading.shape, writing.shape)
            drifts.append(FactorDrift(name, basis, scale, layer, adapter, shapes))
    return drifts, unseen_changes(model, edit)


def unseen_changes(model: nn.Module, edit: Edit) -> list[str]:
    """Sentences about what an adapter changes of an edited writer, or of the norm behind one, that no drift sees.

    Args:
        model: a PeftModel; no weight of it is read.
        edit: what is removed from which writers counts, and along which vectors does not.
    """
    kinds = _kinds(model, edit)
    problems, accounted = [], []
    for path, layer in lora_layers(model):
        name = _plain_name(path)
        if name not in kinds:
            continue
        if any(layer.use_dora.values()):
            accounted.append(path)
            problems.append(
                f"DoRA rescales the rows of {name}, so its update cannot be kept off the removed direction; set "
                "train.adapter.use_dora to false"
            )
        elif _reads_only(layer, kinds[name]) or _is_seen(layer, kinds[name]):
            accounted.append(path)
    return problems + _other_ways(model, edit, kinds, accounted)


def residual(drifts: Sequence[Drift]) -> float:
    """The largest |U^T dW| / scale over writers: 1 is what chance puts there in the writer's whole weight.

    Returns:
        nan if this process holds an unknown part of a parameter: what is only watched must not stop a training.
    """
    try:
        with torch.no_grad():
            return math.sqrt(max(float(drift.square()) for drift in drifts))
    except Sharded:
        return math.nan


def _along(tensor: Tensor, basis: Tensor) -> Tensor:
    """U^T of a tensor [d_model, n] or [d_model], in float32 or wider, whole on every process: [k, n]."""
    wide = sharding_gradients(_columns(tensor).to(_wide(tensor.dtype)))
    return full(replicated(basis, wide) @ wide)


def _scale(stored: Sequence[Tensor], basis: Tensor) -> float:
    norms = [
        torch.linalg.vector_norm(tensor.detach(), dtype=_wide(tensor.dtype)) for tensor in stored
    ]
    square = sum(float(full(norm)) ** 2 for norm in norms)
    # A writer that writes nothing has no scale of its own.
    return math.sqrt(square * basis.shape[0] / basis.shape[1]) or 1.0


def _stored(base: nn.Module, kind: Writer) -> list[Tensor]:
    """The weight that an adapter stands on, out of its 4 or 8 bits, and the bias beside it."""
    is_module = kind.parameter == "weight"
    weight = dequantize_module_weight(base) if is_module else getattr(base, kind.parameter)
    bias = getattr(base, kind.bias, None)
    return [weight] if bias is None else [weight, bias]


def _require_whole(tensor: Tensor, shape: torch.Size) -> None:
    """Fail if this process holds an unknown part of a parameter; a DTensor has the shape of the whole."""
    if tensor.shape != shape:
        raise Sharded(
            "train: keep_ablated cannot project sharded parameters of this kind (DeepSpeed ZeRO-3, FSDP 1); launch "
            "with one process, DDP (configs/ddp.yaml) or FSDP 2, or set train.keep_ablated to none"
        )


def _rows(bias: Tensor) -> Tensor:
    return bias.reshape(-1, bias.shape[-1])


def _columns(factor: Tensor) -> Tensor:
    return factor.reshape(len(factor), -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _other_ways(
    model: nn.Module, edit: Edit, kinds: Mapping[str, Writer], accounted: Sequence[str]
) -> list[str]:
    """What the adapter trains of writers, or of norms behind them, by other means than an accounted LoRA layer."""
    # A writer that the edit left alone (tied embeddings) has no vectors either, so it may not be trained.
    norms = {
        name.removesuffix(kind.module) + kind.post_norm
        for name, kind in kinds.items()
        if kind.post_norm is not None
    }
    held = tuple(f"{module}." for module in {*edit.removals, *edit.left_alone, *norms})
    factors = tuple(f"{path}.lora_" for path in accounted)
    return [
        f"the adapter trains {name}, by which the removed direction could come back and which no projection can "
        "hold; take it out of train.adapter"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not name.startswith(factors)
        and _plain_name(name).startswith(held)
    ]


def _kinds(model: nn.Module, edit: Edit) -> dict[str, Writer]:
    """What the family's map says of each writer that something is removed from."""
    architecture = architecture_of(str(model.config.model_type))  # type: ignore[union-attr]  # a PeftModel
    writers = (*architecture.writers, *architecture.embeddings)
    return {
        name: next(writer for writer in writers if name.endswith(f".{writer.module}"))
        for name in edit.removals
    }


def _reads_only(layer: LoraLayer, kind: Writer) -> bool:
    """Whether a layer adapts a parameter beside the writer's own, such as the gates of experts."""
    return isinstance(layer, ParamWrapper) and layer.parameter_name not in (
        kind.parameter,
        kind.bias,
    )


def _is_seen(layer: LoraLayer, kind: Writer) -> bool:
    """Whether what a layer adds to a writer is the product of its factors, with columns in the residual stream."""
    return (
        not any(layer.use_dora.values())
        and not _reads_only(layer, kind)
        and _writes_by_columns(layer, kind)
    )


def _writes_by_columns(layer: LoraLayer, kind: Writer) -> bool:
    """Whether the columns of the factor B lie in the residual stream.

    So they do for a module, and for a parameter that PEFT reads as [d_model, d_in]: each expert has columns of its own.
    """
    base = layer.get_base_layer()
    if not isinstance(layer, ParamWrapper):
        return isinstance(base, nn.Linear | nn.Embedding | Conv1D)
    transposed = bool(getattr(base, "is_transposed", False))
    seen_as = {"linear": False, "experts": False, "experts_transposed": True}
    return layer.parameter_name == kind.parameter and seen_as.get(kind.layout) == transposed


def _plain_name(name: str) -> str:
    """The name that a module or parameter has in the model without the adapter."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    # A whole module that is trained beside the factors stands below its original's name.
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)
