"""Ablation-preserving training: nothing that healing adds may write along the removed direction.

After every optimizer step (Adam leaves any subspace, so projecting gradients is not enough) what was added to a
writer is projected: of a LoRA update B A the factor B, of full training the change of the weight itself.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from common.architecture import PlacedWriter, architecture_of
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

    Args:
        model: a PeftModel.
        edit: the edit of the model below it.

    Raises:
        StageError: if the adapter changes a writer in a way that no projection of a factor can hold.
    """
    layers = _lora_layers(model)
    projections: list[Projection] = []
    for name in edit.removals:
        module = layers.get(name)
        if module is None:
            continue
        if any(module.use_dora.values()):
            raise StageError(
                f"train: DoRA rescales the rows of {name}, so its update cannot be kept off the removed direction; set "
                "train.adapter.use_dora to false, or train.keep_ablated to none"
            )
        basis = edit.basis(name)
        for factor in module.lora_B.values():
            projections.append(_columns_projection(factor, "weight", basis))
            if factor.bias is not None:
                projections.append(_columns_projection(factor, "bias", basis))
        projections += [
            _columns_projection(module.lora_embedding_B, adapter, basis)
            for adapter in module.lora_embedding_B
        ]
    _require_no_other_writer(model, edit)
    return projections


def full_projections(model: PreTrainedModel, edit: Edit) -> list[Projection]:
    """What keeps a fully trained model ablated; holds the gains of the norms behind edited writers still.

    Args:
        model: the abliterated model, before its first step.
        edit: its edit.
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


def _require_no_other_writer(model: nn.Module, edit: Edit) -> None:
    """Fail if the adapter trains a writer, or the norm behind one, by other means than a LoRA factor."""
    layers, held = _lora_layers(model), _held_modules(model, edit)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = _plain_name(name)
        owner = next((module for module in held if plain.startswith(module + ".")), None)
        if owner is not None and (
            owner in edit.left_alone or ".lora_" not in name or _is_expert(layers.get(owner))
        ):
            raise StageError(
                f"train: the adapter trains {name}, by which the removed direction could come back and "
                "which no projection can hold; take it out of train.adapter, or set train.keep_ablated "
                "to none"
            )


def _held_modules(model: nn.Module, edit: Edit) -> set[str]:
    """The writers and the norms behind the edited ones, by name.

    A writer that the edit left alone (tied embeddings) has no projection either, so it may not be trained.
    """
    writers = architecture_of(str(model.config.model_type)).writers  # type: ignore[union-attr]  # a PeftModel
    norms = {
        name.removesuffix(writer.module) + writer.post_norm
        for name in edit.removals
        for writer in writers
        if writer.post_norm is not None and name.endswith("." + writer.module)
    }
    return {*edit.removals, *edit.left_alone, *norms}


def _is_expert(layer: LoraLayer | None) -> bool:
    return layer is not None and not isinstance(layer.get_base_layer(), nn.Linear | nn.Embedding)


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Every LoRA layer by the name that its module has in the model without the adapter."""
    # Only the wrappers: the wrapped module below each would have the same plain name.
    return {
        _plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    # A whole module that is trained beside the factors stands below its original's name.
    return re.sub(r"\.modules_to_save\.[^.]+", "", name)
