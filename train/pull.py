"""The L2 pull: how far training has moved the weights from the abliterated model's, squared.

A low rank and a pull keep what no anchor covers: with neither, training may trade away whatever its prompts do not ask
for.
"""

from collections.abc import Callable, Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Distance = Callable[[], Tensor]


def distance_from(model: nn.Module) -> Distance:
    """Remember where the weights are, and give a function that tells how far they have gone.

    LoRA factors A and B count through their product, which begins at 0 and is never made: with s the adapter's
    scaling |s B A|^2 = s^2 sum(B'B * AA'). All other trained parameters count through their own change, for which
    their values are kept: the whole model once more in full training.

    Args:
        model: before its first step, with or without a LoRA adapter.

    Returns:
        A function that gives the scalar sum of squares over all trained weights, in float32 or wider. Gradients flow.
    """
    factors = [pair for layer in _lora_layers(model) for pair in _factors(layer)]
    in_pairs = {id(factor) for one, other, *_ in factors for factor in (one, other)}
    start = [
        (parameter, parameter.detach().clone())
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in in_pairs
    ]

    def distance() -> Tensor:
        terms = [_squared_product(*pair) for pair in factors]
        terms += [(_wide(now) - _wide(then)).square().sum() for now, then in start]
        return torch.stack([term.cpu() for term in terms]).sum() if terms else torch.zeros(())

    return distance


def _lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _factors(layer: LoraLayer) -> Iterator[tuple[nn.Parameter, nn.Parameter, float, int]]:
    """Trained factors A [experts * r, d_in] and B [d_out, r * experts], with their scaling and experts."""
    experts = int(getattr(layer, "num_experts", 1))
    for adapter, factor in layer.lora_A.items():
        yield factor.weight, layer.lora_B[adapter].weight, layer.scaling[adapter], experts
    for adapter, factor in layer.lora_embedding_A.items():
        yield factor, layer.lora_embedding_B[adapter], layer.scaling[adapter], experts


def _squared_product(a: Tensor, b: Tensor, scaling: float, experts: int) -> Tensor:
    """|scaling B A|^2 over all experts, from products of the size of the rank."""
    # As peft stores them: one expert's rows of A after the other's, the experts of B side by side for each rank.
    rows = _wide(a).reshape(experts, -1, a.shape[-1])
    columns = _wide(b).reshape(b.shape[0], -1, experts)
    inner = torch.einsum("dre,dse->ers", columns, columns)
    return scaling**2 * (inner * (rows @ rows.mT)).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
