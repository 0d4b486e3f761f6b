"""Ablation-preserving training: nothing that healing adds may write along the removed direction.

After every optimizer step (Adam leaves any subspace, so projecting gradients is not enough) what was added to a
writer is projected: of a LoRA update B A the factor B, of full training the change of the weight itself. What an
edit left along the direction (at strengths below 1, where norms are kept) stays as it is; what an edit adds to the
stream is no part of this: healing may add along it or against it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from common.architecture import PlacedWriter, Writer, architecture_of
from common.edits import Edit, as_stored, component_along, edited_writers, project
from common.errors import StageError

Projection = Callable[[], None]


class KeepAblated(TrainerCallback):
    """Projects the model after every optimizer step."""

    def __init__(self, projections: list[Projection]) -> None:
        """Take what to do after a step."""
        self.projections = projections

    def on_optimizer_step(
        self,
        args: TrainingArguments,  # the callback's signature
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take back what the step wrote along the direction."""
        with torch.no_grad():
            for projection in self.projections:
                projection()


def lora_projections(model: nn.Module, edit: Edit) -> list[Projection]:
    """What keeps a model with a LoRA adapter ablated.

    Writers from which nothing is removed at strength 0 are held too; an edit that only adds has nothing to hold.

    Args:
        model: a PeftModel.
        edit: the edit of the model below it.

    Raises:
        StageError: if the adapter changes a writer in a way that no projection of a factor can hold.
    """
    kinds = _kinds(model, edit)
    projections: list[Projection] = []
    accounted = []
    for path, layer in _lora_layers(model):
        name = _plain_name(path)
        if name not in edit.removals:
            continue
        if any(layer.use_dora.values()):
            raise StageError(
                f"train: DoRA rescales the rows of {name}, so its update cannot be kept off the removed direction; set "
                "train.adapter.use_dora to false, or train.keep_ablated to none"
            )
        if _reads_only(layer, kinds[name]):
            accounted.append(path)
        elif _writes_by_columns(layer, kinds[name]):
            accounted.append(path)
            projections += _factor_projections(layer, edit.basis(name))
    _require_no_other_writer(model, edit, kinds, accounted)
    return projections


def _factor_projections(layer: LoraLayer, basis: Tensor) -> list[Projection]:
    projections = []
    for factor in layer.lora_B.values():
        projections.append(_columns_projection(factor, "weight", basis))
        if factor.bias is not None:
            projections.append(_columns_projection(factor, "bias", basis))
    for adapter in layer.lora_embedding_B:
        projections.append(_columns_projection(layer.lora_embedding_B, adapter, basis))
    return projections


def full_projections(model: PreTrainedModel, edit: Edit) -> list[Projection]:
    """What keeps a fully trained model ablated; holds the gains of the norms behind edited writers still.

    Args:
        model: the abliterated model, before its first step.
        edit: its edit; writers from which nothing is removed at strength 0 are held too.
    """
    projections: list[Projection] = []
    for name, writer in edited_writers(model, edit).items():
        projections.append(_change_projection(writer, edit.basis(name)))
        if writer.bias is not None:
            projections.append(_bias_projection(writer, edit.basis(name)))
        if writer.post_norm is not None:
            # A trained gain would turn u = gain * v away from the vector that was removed.
            writer.post_norm.requires_grad_(False)
    return projections


def _columns_projection(owner: nn.Module, name: str, basis: Tensor) -> Projection:
    shape, basis = getattr(owner, name).shape, basis.to(getattr(owner, name).device)
    all_of_it = torch.ones(len(basis))

    def projection() -> None:
        weight = _whole(getattr(owner, name), shape)
        by_input = weight.detach().double().reshape(shape[0], -1).T
        weight.copy_(project(by_input, basis, all_of_it).T.reshape(shape))

    return projection


def _change_projection(writer: PlacedWriter, basis: Tensor) -> Projection:
    shape, due = writer.weight.shape, component_along(writer.weight, basis, writer.layout)
    basis = basis.to(writer.weight.device)

    def projection() -> None:
        weight = _whole(writer.weight, shape)
        excess = component_along(weight, basis, writer.layout) - due
        weight.copy_(weight.double() - as_stored(excess @ basis, writer.layout))

    return projection


def _bias_projection(writer: PlacedWriter, basis: Tensor) -> Projection:
    bias = writer.bias
    assert bias is not None
    shape, basis = bias.shape, basis.to(bias.device)
    due = bias.detach().double() @ basis.T

    def projection() -> None:
        bias = writer.bias
        assert bias is not None
        wide = _whole(bias, shape).detach().double()
        bias.copy_(wide - (wide @ basis.T - due) @ basis)

    return projection


def _whole(weight: Tensor, shape: torch.Size) -> Tensor:
    """The parameter itself, which sharding puts in the place of the one that the model was made with.

    Raises:
        StageError: if this process holds only a part of it.
    """
    if hasattr(weight, "device_mesh") or weight.shape != shape:
        raise StageError(
            "train: keep_ablated: hard cannot project sharded parameters yet; launch with one process "
            "or DDP (configs/ddp.yaml), or set train.keep_ablated to none"
        )
    return weight


def _require_no_other_writer(
    model: nn.Module, edit: Edit, kinds: Mapping[str, Writer], accounted: Sequence[str]
) -> None:
    """Fail if the adapter trains a writer, or the norm behind one, by other means than an accounted LoRA layer."""
    # A writer that the edit left alone (tied embeddings) has no projection either, so it may not be trained.
    norms = {
        name.removesuffix(kind.module) + kind.post_norm
        for name, kind in kinds.items()
        if kind.post_norm is not None
    }
    held = tuple(f"{module}." for module in {*edit.removals, *edit.left_alone, *norms})
    factors = tuple(f"{path}.lora_" for path in accounted)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name.startswith(factors):
            continue
        if _plain_name(name).startswith(held):
            raise StageError(
                f"train: the adapter trains {name}, by which the removed direction could come back and "
                "which no projection can hold; take it out of train.adapter, or set train.keep_ablated "
                "to none"
            )


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


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Every LoRA layer by its path; those of several parameters of one module stand inside each other."""
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def _plain_name(name: str) -> str:
    """The name that a module or parameter has in the model without the adapter."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    # A whole module that is trained beside the factors stands below its original's name.
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)
