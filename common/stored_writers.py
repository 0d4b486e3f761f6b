"""The writers of a checkpoint on disk: which stored tensors are whose, and whether an edit fits them.

Nothing is loaded: names, types and shapes are read from the headers, the rest from the configuration.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from common.architecture import (
    Architecture,
    DiskTensor,
    Layout,
    PlacedWriter,
    Writer,
    architecture_of,
    on_disk,
)
from common.edits import Addition, Edit
from common.errors import InputError
from common.shards import DTYPES, Shard, StoredTensor, buffer_for, read_shards, read_tensor

# Which axis of a stored weight is the residual stream's.
STREAM_AXIS: Mapping[Layout, int] = {
    "linear": -2,
    "conv1d": -1,
    "embedding": -1,
    "experts": -2,
    "experts_transposed": -1,
}


@dataclass(frozen=True)
class Placed:
    """A stored tensor that belongs to a writer.

    Attributes:
        shard: the file it lies in.
        stored: where in the file.
        place: which part of which writer it is.
    """

    shard: Shard
    stored: StoredTensor
    place: DiskTensor


@dataclass(frozen=True)
class Facts:
    """What an edit has to know of a model's configuration.

    Attributes:
        model_type: its family.
        num_blocks: how many blocks it has.
        d_model: width of the residual stream.
        is_tied: whether its embedding is its unembedding.
    """

    model_type: str
    num_blocks: int
    d_model: int
    is_tied: bool


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose weights are known by their headers.

    Attributes:
        folder: where it lies.
        facts: from its configuration.
        architecture: its family's map.
        shards: its weight files.
        writers: the stored tensors of every writer of the model, by the writer's name in memory.
    """

    folder: Path
    facts: Facts
    architecture: Architecture
    shards: list[Shard]
    writers: Mapping[str, list[Placed]]

    def weights(self, writer: str) -> list[Placed]:
        """The tensors that hold a writer's weight: one, or one per expert in their order."""
        found = [placed for placed in self.writers[writer] if placed.place.part == "weight"]
        return sorted(found, key=lambda placed: placed.place.expert or 0)

    def bias(self, writer: str) -> Placed | None:
        """The tensor that holds a writer's bias, if it has one."""
        found = [placed for placed in self.writers[writer] if placed.place.part == "bias"]
        return found[0] if found else None

    def kind(self, writer: str) -> Writer:
        """What the family's map says of a writer."""
        for block_writer in self.architecture.writers:
            if writer.startswith(self.architecture.blocks + "."):
                path = writer.removeprefix(self.architecture.blocks + ".").partition(".")[2]
                if path == block_writer.module:
                    return block_writer
        return next(
            each for each in self.architecture.embeddings if writer.endswith("." + each.module)
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read what there is to know of a model folder without its weights.

    Raises:
        InputError: if it is no model folder, its family is not mapped, it is quantized, or a file is damaged.
    """
    raw = _read_config(folder)
    _require_plain(folder, raw)
    facts = _facts(folder, raw)
    architecture = architecture_of(facts.model_type)
    shards = read_shards(folder)
    writers: dict[str, list[Placed]] = {}
    for shard in shards:
        for stored in shard.tensors:
            place = on_disk(architecture, stored.name)
            # Blocks beyond the last predict several tokens ahead; the model does not load them.
            if place is not None and _block(architecture, place.writer) < facts.num_blocks:
                writers.setdefault(place.writer, []).append(Placed(shard, stored, place))
    return Checkpoint(folder, facts, architecture, shards, writers)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if not isinstance(raw, dict):
        raise _unreadable(folder, f"it holds a {type(raw).__name__}, not an object")
    return raw


def _unreadable(folder: Path, why: object) -> InputError:
    first = (str(why).splitlines() or [""])[0][:200]
    return InputError(
        f"model: {folder} has no readable config.json ({first}); name a complete model folder"
    )


def _facts(folder: Path, raw: Mapping[str, Any]) -> Facts:
    """The facts as the file states them; what it leaves out only transformers' class of the family knows."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "tie_word_embeddings")
    if "text_config" not in raw and all(raw.get(name) is not None for name in names):
        return Facts(*(raw[name] for name in names))
    # Here, since importing it takes as long as editing some gigabytes.
    from transformers import AutoConfig  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    text = config.get_text_config()
    return Facts(
        config.model_type,
        text.num_hidden_layers,
        text.hidden_size,
        bool(getattr(config, "tie_word_embeddings", False)),
    )


def _require_plain(folder: Path, raw: Mapping[str, Any]) -> None:
    # Of the file itself: what transformers makes of a quantized configuration depends on the libraries installed.
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    if any(part.get("quantization_config") for part in parts):
        raise InputError(
            f"model: {folder} is quantized (quantization_config in config.json): an edit of packed weights gives "
            "garbage; name the full-precision source"
        )


def _block(architecture: Architecture, writer: str) -> int:
    rest = writer.removeprefix(architecture.blocks + ".")
    return int(rest.partition(".")[0]) if rest != writer else -1


def require_fit(checkpoint: Checkpoint, edit: Edit) -> None:
    """Check that an edit was made for a model like this one.

    Raises:
        InputError: naming the first thing that does not fit.
    """
    for problem in _problems(checkpoint, edit):
        raise InputError(f"{checkpoint.folder}: {problem}")


def _problems(checkpoint: Checkpoint, edit: Edit) -> Iterator[str]:
    made_for = edit.about.get("model_type")
    if made_for not in (None, checkpoint.facts.model_type):
        yield (
            f"the edit was made for the architecture {made_for!r}, this is {checkpoint.facts.model_type!r}; it "
            "fits only the architecture it was made for"
        )
    widths = sorted({len(vector) for vector in edit.vectors.values()})
    if widths != [checkpoint.facts.d_model]:
        yield (
            f"the edit's vectors have {', '.join(map(str, widths))} numbers, but the residual stream of this model "
            f"has d_model {checkpoint.facts.d_model}; the edit was made for another model"
        )
    yield from _naming_problems(checkpoint, edit)
    if checkpoint.architecture.embedding in edit.removals and checkpoint.facts.is_tied:
        yield (
            f"the edit changes {checkpoint.architecture.embedding}, which this model also uses as its unembedding; "
            "make the edit from this model, and it leaves tied embeddings alone"
        )
    for name in (*edit.removals, *edit.additions):
        yield from _storage_problems(checkpoint, name)


def _naming_problems(checkpoint: Checkpoint, edit: Edit) -> Iterator[str]:
    named = {*edit.removals, *edit.additions, *edit.left_alone}
    blocks = 1 + max(_block(checkpoint.architecture, name) for name in named) if named else 0
    if edit.removals and blocks not in (0, checkpoint.facts.num_blocks):
        yield (
            f"the edit was made for {blocks} layers, this model has {checkpoint.facts.num_blocks}; an edit fits only "
            "the depth it was made for"
        )
    missing = sorted(name for name in named if not checkpoint.writers.get(name))
    if missing:
        yield (
            f"the edit names {_some(missing)}, which the weight files do not hold; the checkpoint is incomplete, or "
            "the edit was made for another architecture"
        )
    unknown = sorted(set(checkpoint.writers) - named)
    # An addition needs one writer only; a removal that does not know them all leaves some unedited in silence.
    if edit.removals and unknown:
        yield (
            f"the weight files hold {_some(unknown)}, which the edit does not know, so they would go on writing "
            "what the edit removes; make the edit from this model"
        )


def _storage_problems(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    weights = checkpoint.weights(name)
    stored = [*weights, *(placed for placed in [checkpoint.bias(name)] if placed is not None)]
    for each in stored:
        if each.stored.dtype not in DTYPES:
            yield (
                f"{each.stored.name} is stored as {each.stored.dtype}, so it is packed or quantized; name the "
                f"full-precision source ({', '.join(DTYPES)})"
            )
        axis = STREAM_AXIS[each.place.layout] if each.place.part == "weight" else -1
        shape = each.stored.shape
        if len(shape) < -axis or shape[axis] != checkpoint.facts.d_model:
            yield (
                f"{each.stored.name} has shape {list(shape)}, which does not write to a stream of d_model "
                f"{checkpoint.facts.d_model} as {each.place.layout}; correct common/architecture.py"
            )
    experts = [placed.place.expert for placed in weights]
    wanted = (
        list(range(_num_experts(checkpoint))) if any(e is not None for e in experts) else [None]
    )
    if experts != wanted:
        yield (
            f"{name} is stored in {len(experts)} tensors where {len(wanted)} are expected; the checkpoint is "
            "incomplete: fetch it again"
        )


def _num_experts(checkpoint: Checkpoint) -> int:
    """Of the whole checkpoint, so that a layer that lacks one does not define how many there should be."""
    numbers = [
        placed.place.expert or 0 for stored in checkpoint.writers.values() for placed in stored
    ]
    return 1 + max(numbers)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")


def goes_into_bias(checkpoint: Checkpoint, writer: str) -> bool:
    """Whether a vector added to a writer's stored bias reaches the residual stream as it is.

    The bias of an expert is weighted by the router, and what lies before a norm is rescaled by it.
    """
    kind = checkpoint.kind(writer)
    is_one = kind.layout in ("linear", "conv1d")
    return checkpoint.bias(writer) is not None and is_one and kind.post_norm is None


def additions_by_form(
    checkpoint: Checkpoint, edit: Edit
) -> tuple[dict[str, Addition], dict[str, Addition]]:
    """The additions of an edit that biases can hold, and those that only hooks can make."""
    folded = {
        name: addition
        for name, addition in edit.additions.items()
        if goes_into_bias(checkpoint, name)
    }
    return folded, {name: a for name, a in edit.additions.items() if name not in folded}


def placed_writers(checkpoint: Checkpoint) -> list[PlacedWriter]:
    """The writers of a model as an edit is made for them, without the model: of their numbers only the norms' are read.

    Returns:
        In the order of `common.architecture.find_writers`. Their modules hold nothing.
    """
    architecture = checkpoint.architecture
    kinds = [*architecture.embeddings, *architecture.writers]

    def order(name: str) -> tuple[int, int]:
        return _block(architecture, name), kinds.index(checkpoint.kind(name))

    return [_place(checkpoint, name) for name in sorted(checkpoint.writers, key=order)]


def _place(checkpoint: Checkpoint, name: str) -> PlacedWriter:
    kind, block = checkpoint.kind(name), _block(checkpoint.architecture, name)
    return PlacedWriter(
        name,
        nn.Module(),
        kind.parameter,
        kind.layout,
        kind.component,
        block if block >= 0 else None,
        kind.bias,
        _read_norm(checkpoint, name, kind.post_norm) if kind.post_norm is not None else None,
        checkpoint.architecture.norm_gain_offset,
        tied=name == checkpoint.architecture.embedding and checkpoint.facts.is_tied,
    )


def _read_norm(checkpoint: Checkpoint, writer: str, post_norm: str) -> nn.Module:
    """The norm behind a writer, which stands in the same block."""
    within = f"{checkpoint.architecture.layers}.{_block(checkpoint.architecture, writer)}."
    stored = checkpoint.weights(writer)[0].stored.name
    name = f"{stored.partition(within)[0]}{within}{post_norm}.weight"
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            if tensor.name == name and tensor.dtype in DTYPES:
                norm = nn.Module()
                with shard.path.open("rb", buffering=0) as file:
                    norm.weight = nn.Parameter(read_tensor(file, tensor, buffer_for([tensor])))
                return norm
    raise InputError(
        f"{checkpoint.folder}: the norm {name} behind {writer} is not in the weight files, or is packed; name a "
        "complete full-precision checkpoint"
    )
