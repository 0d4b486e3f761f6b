"""LoRA adapters: a trained one merged, and a saved edit as one, exact, at the rank of the vectors that are removed.

For a writer with weight W, orthonormal vectors U [k, d_model] and strengths s the change of the weight is
-U^T diag(s) U W, so A = U W and B = -U^T diag(s) hold it at rank k. A is read off the checkpoint, tensor by
tensor. PEFT has a form for each layout: A and B of a module (linear, conv1d), of an embedding, and of a fused
parameter (`target_parameters`), whose A and B hold all experts.

Biases change too. PEFT has one switch for all modules of an adapter: `lora_bias` adds a bias behind B, but can
only be merged, and only be used at all, where every module is linear and has one. Elsewhere the adapter carries
the edited biases themselves (`bias: lora_only`). They replace the model's when it is loaded, and stay when it is
disabled, as PEFT's documentation of that setting says.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from common import distributed
from common.architecture import Layout
from common.artifacts import write_json
from common.edits import Edit, edited_bias
from common.errors import InputError, StageError
from common.shards import buffer_for, read_tensor
from common.slices import experts_of, slices_of, writes_last
from common.stored_writers import (
    Checkpoint,
    Placed,
    additions_by_form,
    open_checkpoint,
    require_fit,
)

ROOT = "base_model.model."


def save_adapter(source: Path, edit: Edit, output: Path, base_model: str | None = None) -> None:
    """Write an edit of a checkpoint as an adapter folder that `PeftModel.from_pretrained` loads.

    Args:
        source: the model's folder; only the tensors that the edit changes are read.
        edit: made for the same architecture, depth and width.
        output: a folder that does not exist yet, or is empty.
        base_model: the address PEFT finds the model under when none is given.

    Raises:
        InputError: if the edit has no adapter form, does not fit the checkpoint, or the output is in use.
    """
    checkpoint = open_checkpoint(source)
    require_fit(checkpoint, edit)
    edit = replace(edit, removals={n: r for n, r in edit.removals.items() if not r.is_void})
    _require_form(checkpoint, edit)
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"output: {output} exists already; name a folder that does not, or remove this one"
        )
    tensors = _tensors(checkpoint, edit)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"output: {partial} cannot be made ({error.strerror}); name a folder you may write"
        ) from error
    _write_config(checkpoint, edit, partial, base_model)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    partial.rename(output)


def merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """A model with a saved adapter merged into its weights; the model that is given is used up.

    Raises:
        StageError: if merging gives weights that are not finite.
    """
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise StageError(
            f"the adapter in {adapter} cannot be merged ({error}); train again at a lower "
            "train.trainer.learning_rate"
        ) from error
    assert isinstance(merged, PreTrainedModel)
    return merged


def _require_form(checkpoint: Checkpoint, edit: Edit) -> None:
    if not edit.is_low_rank():
        raise InputError(
            "the edit keeps the norms of the weights, which changes them at full rank, so no adapter can hold it; "
            "apply it to the weights instead"
        )
    _, beside = additions_by_form(checkpoint, edit)
    if beside:
        raise InputError(
            f"the edit adds a vector beside {next(iter(beside))}, which has no bias that could hold it, and an "
            "adapter has no other place for a constant; apply it to the weights instead"
        )
    if not edit.removals and not edit.additions:
        raise InputError("the edit changes nothing, so there is no adapter to make")


def _changed(edit: Edit) -> list[str]:
    return sorted({*edit.removals, *edit.additions})


def _is_fused(layout: Layout) -> bool:
    return layout in ("experts", "experts_transposed")


def _biases_behind_b(checkpoint: Checkpoint, edit: Edit) -> bool:
    """Whether every module of the adapter is linear and has a bias, so that `lora_bias` can be used and merged."""
    return all(
        checkpoint.kind(name).layout in ("linear", "conv1d") and checkpoint.bias(name) is not None
        for name in _changed(edit)
    )


def _replaces_biases(checkpoint: Checkpoint, edit: Edit) -> bool:
    return not _biases_behind_b(checkpoint, edit) and any(
        checkpoint.bias(name) is not None and not _is_fused(checkpoint.kind(name).layout)
        for name in _changed(edit)
    )


def _rank(edit: Edit) -> int:
    """One rank for all: where fewer vectors are removed, the rest of A and B is 0."""
    return max([1, *(len(removal.vectors) for removal in edit.removals.values())])


def _write_config(checkpoint: Checkpoint, edit: Edit, folder: Path, base_model: str | None) -> None:
    parameters = list(_target_parameters(checkpoint, edit))
    modules = [
        name
        for name in _changed(edit)
        if not any(parameter.startswith(name + ".") for parameter in parameters)
    ]
    config = LoraConfig(
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=_rank(edit),
        lora_alpha=_rank(edit),  # their quotient scales B A: 1
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=any(checkpoint.kind(name).layout == "conv1d" for name in modules),
        lora_bias=_biases_behind_b(checkpoint, edit),
        bias="lora_only" if _replaces_biases(checkpoint, edit) else "none",
    )
    config.save_pretrained(str(folder))
    # PEFT keeps the modules in a set, whose order changes between processes.
    path = folder / "adapter_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, settings | {"target_modules": modules})


def _target_parameters(checkpoint: Checkpoint, edit: Edit) -> Iterator[str]:
    """What PEFT is told by the parameter's name instead of the module's."""
    has_experts = any(_is_fused(writer.layout) for writer in checkpoint.architecture.writers)
    for name in _changed(edit):
        kind = checkpoint.kind(name)
        if _is_fused(kind.layout):
            yield f"{name}.{kind.parameter}"
            if checkpoint.bias(name) is not None:
                yield f"{name}.{kind.bias}"
        elif has_experts and name.endswith(".down_proj"):
            # A module of this name PEFT takes for an expert of transformers 4, and looks for it elsewhere.
            yield f"{name}.{kind.parameter}"


@torch.no_grad()
def _tensors(checkpoint: Checkpoint, edit: Edit) -> dict[str, Tensor]:
    """The adapter's tensors, by PEFT's names."""
    names = _changed(edit)
    stored = [placed for name in names for placed in checkpoint.writers[name]]
    buffer = buffer_for([placed.stored for placed in stored])
    tensors: dict[str, Tensor] = {}
    bar = tqdm(
        total=sum(placed.stored.num_bytes for placed in stored),
        desc="adapter",
        unit="B",
        unit_scale=True,
        disable=not distributed.is_main(),
    )
    with bar:
        for name in names:
            kind, bias = checkpoint.kind(name), checkpoint.bias(name)
            inner, outer = _factors(checkpoint, edit, name, buffer)
            if kind.layout == "embedding":
                tensors[f"{ROOT}{name}.lora_embedding_A"] = inner
                tensors[f"{ROOT}{name}.lora_embedding_B"] = outer
            elif _is_fused(kind.layout):
                tensors |= _fused(checkpoint, edit, name, inner, outer, buffer)
            else:
                tensors[f"{ROOT}{name}.lora_A.weight"] = inner
                tensors[f"{ROOT}{name}.lora_B.weight"] = outer
                if bias is not None:
                    tensors |= _bias(checkpoint, edit, name, _read(bias, buffer))
            bar.update(sum(placed.stored.num_bytes for placed in checkpoint.writers[name]))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read(placed: Placed, buffer: Tensor) -> Tensor:
    with placed.shard.path.open("rb", buffering=0) as file:
        return read_tensor(file, placed.stored, buffer)


def _removed(checkpoint: Checkpoint, edit: Edit, name: str) -> tuple[Tensor, Tensor]:
    """The vectors [rank, d_model] that are removed from a writer and their strengths [rank]; zeros fill them up."""
    basis = torch.zeros(_rank(edit), checkpoint.facts.d_model, dtype=torch.float64)
    strengths = torch.zeros(_rank(edit), dtype=torch.float64)
    if name in edit.removals:
        own = edit.basis(name)
        basis[: len(own)], strengths[: len(own)] = own, edit.strengths(name)
    return basis, strengths


def _factors(
    checkpoint: Checkpoint, edit: Edit, name: str, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """A [experts * rank, d_in] with the experts one after the other, and B [d_model, rank]."""
    basis, strengths = _removed(checkpoint, edit, name)
    parts = []
    for placed in checkpoint.weights(name):
        weight = _read(placed, buffer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for matrix in experts_of(weight, placed.place.layout):
            parts.append(_along(matrix, basis, placed.place.layout).to(dtype))
    return torch.cat(parts), (-basis.T * strengths).to(parts[0].dtype)


def _along(matrix: Tensor, basis: Tensor, layout: Layout) -> Tensor:
    """U W [rank, d_in] of a weight as it is stored, in float64."""
    parts = slices_of(matrix)
    if writes_last(layout):
        return torch.cat([part.double() @ basis.T for part in parts]).T
    along = basis.new_zeros(len(basis), matrix.shape[1])
    for own, part in zip(basis.split(len(parts[0]), dim=1), parts, strict=True):
        along.addmm_(own, part.double())
    return along


def _fused(
    checkpoint: Checkpoint, edit: Edit, name: str, inner: Tensor, outer: Tensor, buffer: Tensor
) -> dict[str, Tensor]:
    """The tensors of fused experts: in B the number of the expert runs fastest. The last target wraps the first."""
    outer = outer.repeat_interleave(len(inner) // _rank(edit), dim=1)
    bias = checkpoint.bias(name)
    if bias is None:
        return {f"{ROOT}{name}.lora_A.weight": inner, f"{ROOT}{name}.lora_B.weight": outer}
    basis, strengths = _removed(checkpoint, edit, name)
    written = _read(bias, buffer).double() @ basis.T
    return {
        f"{ROOT}{name}.base_layer.lora_A.weight": inner,
        f"{ROOT}{name}.base_layer.lora_B.weight": outer,
        # A bias [experts, d_model] is to PEFT a matrix of its own.
        f"{ROOT}{name}.lora_A.weight": basis.to(inner.dtype),
        f"{ROOT}{name}.lora_B.weight": (-written * strengths).to(inner.dtype),
    }


def _bias(checkpoint: Checkpoint, edit: Edit, name: str, bias: Tensor) -> dict[str, Tensor]:
    """What becomes of a bias [d_model]: its change, or where PEFT has no place for that, the whole."""
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    edited = wide
    if name in edit.removals:
        edited = edited_bias(edited, edit.basis(name), edit.strengths(name))
    if name in edit.additions:
        addition = edit.additions[name]
        edited = (edited.double() + addition.amount * edit.vectors[addition.vector]).to(wide.dtype)
    if _biases_behind_b(checkpoint, edit):
        return {f"{ROOT}{name}.lora_B.bias": edited - wide}
    return {f"{ROOT}{name}.base_layer.bias": edited.to(bias.dtype, copy=True)}
