"""A model in shards as accelerate's FSDP 2 puts it there, which it does not on a CPU by itself."""

import functools
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.distributed.fsdp import update_fsdp_plugin_peft

from train.shards import keep_wrap_policy


def shard(model: nn.Module, mesh: DeviceMesh, computed_in: torch.dtype | None = None) -> None:
    """Share a model out over the processes of a mesh of one dimension with a name, as `configs/fsdp2.yaml` does."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=computed_in),
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names),
        mixed_precision="no",
        is_main_process=True,
    )
    accelerator.prepare = functools.partial(fsdp2_prepare_model, accelerator)
    keep_wrap_policy(accelerator)
    if isinstance(model, PeftModel):
        update_fsdp_plugin_peft(model, accelerator)
    accelerator.prepare(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be in shards, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
