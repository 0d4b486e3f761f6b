"""A release's weights made again from the base, the edit and the adapter.

Where every trained matrix is a stored tensor of the base, this goes tensor by tensor: read, edited, merged, given
away. Where memory and disk name or cut weights differently (fused experts, vision-language models), or the adapter is
more than pairs of A and B, the whole model is made as the release stage makes it, in a temporary folder.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common import distributed
from common.artifacts import require_disk
from common.checkpoint import apply_to_checkpoint, edited_tensors
from common.edits import Edit
from common.errors import InputError
from common.lora import ROOT
from common.model import auto_class, load_config, weight_files
from common.shards import DTYPES, buffer_for, read_shards, read_tensor
from eval.subjects import load_merged

ADAPTER = "adapter_model.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a release is made of.

    Attributes:
        base: folder of the base model.
        edit: of stage one.
        adapter: folder of stage two's adapter.
        dtype: of the recipe: what the weights are loaded as.
    """

    base: Path
    edit: Edit
    adapter: Path
    dtype: str


def rebuild(parts: Parts, dtypes: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a release by their names on disk.

    Args:
        parts: of the release.
        dtypes: type of each tensor that is expected, by name, as safetensors names types.

    Yields:
        Name and tensor; the tensor may be overwritten by the next one.

    Raises:
        InputError: if the edit or the adapter does not fit the base.
    """
    layers = _layers(parts)
    stored = {tensor.name for shard in read_shards(parts.base) for tensor in shard.tensors}
    if layers is None or stored != set(dtypes) or not {f"{n}.weight" for n in layers} <= stored:
        logger.info("verify: the whole model is made, since its weights cannot be made one by one")
        yield from _whole(parts)
        return
    for place, tensor in edited_tensors(parts.base, parts.edit):
        cast = tensor.to(DTYPES[dtypes[place.name]])
        layer = layers.get(place.name.removesuffix(".weight"))
        yield place.name, cast if layer is None else _merged(layer, cast)


def _layers(parts: Parts) -> dict[str, Linear] | None:
    """The adapter's layers with their A and B, by module, over a model without weights; None for other forms.

    Raises:
        InputError: if the adapter cannot be read, or does not fit the base.
    """
    try:
        tensors = load_file(parts.adapter / ADAPTER)
        config = PeftConfig.from_pretrained(str(parts.adapter))
        if any(not name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors):
            return None
        with init_empty_weights():
            whole = auto_class(load_config(parts.base)).from_config(load_config(parts.base))
            model = get_peft_model(whole, config).get_base_model()
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{parts.adapter}: the adapter cannot be read, or does not fit the base ({error}); fetch it again, or name "
            "the base that the release was made from"
        ) from error
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    names = {f"{ROOT}{name}.lora_{side}.weight" for name in layers for side in "AB"}
    if any(type(layer) is not Linear for layer in layers.values()) or names != set(tensors):
        return None
    for name, layer in layers.items():
        for side in "AB":
            own = tensors[f"{ROOT}{name}.lora_{side}.weight"]
            # As PEFT loads an adapter in half precision.
            wide = own if own.dtype == torch.float64 else own.float()
            weight = nn.Parameter(wide.to(distributed.device()), requires_grad=False)
            getattr(layer, f"lora_{side}")["default"].weight = weight
    return layers


def _merged(layer: Linear, weight: Tensor) -> Tensor:
    """A weight with A and B of its layer in it, by PEFT's own arithmetic."""
    module = layer.get_base_layer()
    if module.weight.shape != weight.shape:
        raise InputError(
            f"the adapter was made for weights of shape {list(module.weight.shape)}, the base stores "
            f"{list(weight.shape)}; name the base that the release was made from"
        )
    empty = module.weight
    module.weight = nn.Parameter(weight.to(distributed.device()), requires_grad=False)
    try:
        layer.merge(safe_merge=True)
        merged: Tensor = module.weight.data.cpu()
        return merged
    finally:
        module.weight = empty
        layer.merged_adapters.clear()


def _whole(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    size = 2 * sum(file.stat().st_size for file in weight_files(parts.base))
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        room = Path(temporary)
        require_disk(room, size, "the model that is made again")
        apply_to_checkpoint(parts.base, parts.edit, room / "edited")
        model = load_merged(room / "edited", parts.adapter, parts.dtype)
        model.save_pretrained(room / "whole")
        del model
        for shard in read_shards(room / "whole"):
            buffer = buffer_for(shard.tensors)
            with shard.path.open("rb", buffering=0) as file:
                for stored in shard.tensors:
                    yield stored.name, read_tensor(file, stored, buffer)
