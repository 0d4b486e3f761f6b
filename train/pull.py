"""The L2 pull: how far training has moved the weights from the abliterated model's, squared.

A low rank and a pull keep what no anchor covers: with neither, training may trade away whatever its prompts do not ask
for.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.recipe import Recipe
from train.adapter import adapters_of, factors, lora_layers, num_experts
from train.launch import launch_strategy
from train.shards import full, sharded


def check(recipe: Recipe) -> list[str]:
    """Why the weights of a training could not be pulled, found without loading one."""
    strategy = launch_strategy()
    if recipe.train.l2 is None or not strategy.shards_weights or strategy.name == "FSDP2":
        return []
    return [
        f"train.l2: {recipe.train.l2:g} cannot see how far the weights go where {strategy.name} flattens and shares "
        "out the parameters; launch with configs/fsdp2.yaml or configs/ddp.yaml, or leave it out"
    ]


class Distance:
    """Remembers where the weights are, and tells how far they have gone.

    LoRA factors A and B count through their product, which begins at 0 and is never made: with s the adapter's
    scaling |s B A|^2 = s^2 sum(B'B * AA'). All other trained parameters count through their own change, for which
    their values are kept: the whole model once more in full training, in shards once the model is.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a model, with or without a LoRA adapter, before its first step and before it is shared out."""
        self._adapters = [
            (layer, adapter) for _, layer in lora_layers(model) for adapter in adapters_of(layer)
        ]
        in_pairs = {id(factor) for adapted in self._adapters for factor in factors(*adapted)[:2]}
        self._places, self._start = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in in_pairs:
                path, _, attribute = name.rpartition(".")
                self._places.append((model.get_submodule(path), attribute))
                self._start.append(parameter.detach().clone())
        self.look_up()

    def look_up(self) -> None:
        """Find the parameters that steps change: before a forward pass, once the model is wrapped for training.

        Sharding puts others in the place of those the model was made with. Behind a forward pass FSDP 2 leaves some
        of them gathered, in the precision that it computes in, where small changes are rounded away.
        """
        self._factors = [factors(*adapted)[:2] for adapted in self._adapters]
        self._moved: list[Tensor] = [getattr(module, name) for module, name in self._places]
        for index, now in enumerate(self._moved):
            if not isinstance(self._start[index], DTensor):
                self._start[index] = sharded(self._start[index], now)

    def __call__(self) -> Tensor:
        """The scalar sum of squares over all trained weights, in float32 or wider, the same on every process.

        Gradients flow. To be called behind the forward pass: what comes last is differentiated first, and FSDP 2 adds
        its own gradients to those it finds without waiting for later ones.
        """
        terms = [
            _squared_product(a, b, layer.scaling[adapter], num_experts(layer))
            for (a, b), (layer, adapter) in zip(self._factors, self._adapters, strict=True)
        ]
        for now, then in zip(self._moved, self._start, strict=True):
            change = _wide(now) - _wide(then)
            terms.append(full(change.square().sum()))
        return torch.stack([term.cpu() for term in terms]).sum() if terms else torch.zeros(())


def _squared_product(a: Tensor, b: Tensor, scaling: float, experts: int) -> Tensor:
    """|scaling B A|^2 over all experts, from products of the size of the rank."""
    # As peft stores them: one expert's rows of A after the other's, the experts of B side by side for each rank.
    rows = _wide(full(a)).reshape(experts, -1, a.shape[-1])
    columns = _wide(full(b)).reshape(b.shape[0], -1, experts)
    inner = torch.einsum("dre,dse->ers", columns, columns)
    return scaling**2 * (inner * (rows @ rows.mT)).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
