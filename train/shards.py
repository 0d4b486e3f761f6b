"""Parameters that FSDP 2 shares out between processes: DTensors. What is whole already is given back as it is.

DeepSpeed's ZeRO-3 leaves empty parameters in their place, which nothing here can read: only counted are they.
"""

from typing import Any, Final

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from transformers.integrations.deepspeed import deepspeed_config

ZERO3: Final = 3


def keep_wrap_policy(accelerator: Accelerator) -> None:
    """Let FSDP 2 gather an adapted model block by block, as the launch configuration says.

    transformers puts PEFT's policy in the configured one's place, which is FSDP 1's: accelerate's FSDP 2 does not know
    it and shares the model out as one piece, which every forward pass gathers whole.
    """
    if not _is_fsdp2(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    policy, prepare = plugin.auto_wrap_policy, accelerator.prepare

    def prepare_by_blocks(*args: Any, **settings: Any) -> Any:  # noqa: ANN401  # accelerate's
        plugin.auto_wrap_policy = policy
        return prepare(*args, **settings)

    accelerator.prepare = prepare_by_blocks


def share_out(accelerator: Accelerator, model: nn.Module) -> None:
    """Put a model into its shards for a forward pass before training; the trainer will find it so."""
    if _is_fsdp2(accelerator):
        fsdp2_prepare_model(accelerator, model)
    share_out_by_zero3(accelerator, model)


def share_out_by_zero3(accelerator: Accelerator, model: nn.Module) -> None:
    """Under ZeRO-3, share a model out one parameter at a time: DeepSpeed's engine would move it to the GPU whole."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != ZERO3 or is_zero3(model):
        return
    import deepspeed  # noqa: PLC0415  # only who launches it has it

    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed has shared a model's parameters out."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def numel(parameter: Tensor) -> int:
    """How many numbers a parameter has over all processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _is_fsdp2(accelerator: Accelerator) -> bool:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.fsdp_version == 2  # of FSDP


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, where and in what precision `like` is."""
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    if not isinstance(like, DTensor):
        return tensor
    everywhere: list[Placement] = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False)


def summed(tensor: Tensor) -> Tensor:
    """Parts of a sum on several processes, added up; shards stay where they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = [Replicate() if isinstance(p, Partial) else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)


def sharding_gradients(tensor: Tensor) -> Tensor:
    """The same; a gradient that flows back is sharded as it is, which FSDP takes for granted."""
    return (
        tensor.redistribute(placements=tensor.placements) if isinstance(tensor, DTensor) else tensor
    )


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has, the part that it has of `like`; in another precision if that has one."""
    whole = replicated(tensor, like)
    if isinstance(whole, DTensor) and isinstance(like, DTensor):
        part: Tensor = whole.redistribute(placements=like.placements)
        return part
    return whole
