"""The weights of a checkpoint as they lie on disk: which bytes of which file are whose.

A safetensors file is eight bytes with the length of its header, the header (JSON), and the tensors' bytes. An
edit keeps dtypes and shapes, so the header and every offset stay valid, and a tensor is replaced by writing
other bytes in its place. Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What can be edited as it lies on disk. Other types are packed: their bytes are no numbers by themselves.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        dtype: its type, as safetensors names it.
        shape: its shape.
        begin: offset of its first byte in the file.
        end: offset behind its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """How many bytes it takes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: where it lies.
        num_bytes: its size.
        tensors: what it holds, in the order of their offsets.
    """

    path: Path
    num_bytes: int
    tensors: tuple[StoredTensor, ...]

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.name


def read_shards(folder: Path) -> list[Shard]:
    """The files that hold a checkpoint's weights, found as transformers finds them; only headers are read.

    Raises:
        InputError: if there are none, one is missing, or one is damaged.
    """
    if (folder / SINGLE).is_file():
        return [read_shard(folder / SINGLE)]
    if not (folder / INDEX).is_file():
        raise InputError(
            f"model: {folder} holds neither {SINGLE} nor {INDEX}; name a complete folder with safetensors weights"
        )
    return [read_shard(folder / name) for name in sorted(set(_weight_map(folder / INDEX).values()))]


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        named: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model: {index} is damaged, so it is not known which weight files there should be; fetch it again"
        ) from error
    missing = sorted(name for name in set(named.values()) if not (index.parent / name).is_file())
    if missing:
        raise InputError(
            f"model: {index.parent} lacks {missing[0]}, which its index names; fetch it"
        )
    return named


def read_shard(path: Path) -> Shard:
    """The layout of one file, from its header.

    Raises:
        InputError: if the file is damaged or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise InputError(f"model: {path} is truncated or no safetensors file; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = tuple(
            sorted(
                (_tensor(name, entry, LENGTH_BYTES + length) for name, entry in header.items()),
                key=lambda tensor: (tensor.begin, tensor.end),
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model: {path} has a damaged header; fetch it again") from error
    end = LENGTH_BYTES + length
    for tensor in tensors:
        if tensor.begin != end or tensor.end < tensor.begin:
            raise InputError(
                f"model: {path}: {tensor.name} does not follow the tensor before it; fetch it again"
            )
        end = tensor.end
    if end != size:
        raise InputError(
            f"model: {path} has {size} bytes where its header promises {end}: it is truncated or damaged; fetch it "
            "again"
        )
    return Shard(path, size, tensors)


def _tensor(name: str, entry: Mapping[str, Any], origin: int) -> StoredTensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError
    return StoredTensor(name, dtype, shape, origin + begin, origin + end)


def read_tensor(file: BinaryIO, stored: StoredTensor, buffer: Tensor) -> Tensor:
    """Read one tensor.

    Args:
        file: its file, unbuffered.
        stored: where it lies; of one of `DTYPES`.
        buffer: [at least num_bytes] uint8, which the tensor is read into: one buffer serves all tensors.

    Returns:
        The tensor: a view of the buffer.

    Raises:
        InputError: if the file has become shorter.
    """
    own = buffer[: stored.num_bytes]
    read_exactly(file, stored.begin, bytes_of(own))
    return own.view(DTYPES[stored.dtype]).reshape(stored.shape)


def read_exactly(file: BinaryIO, offset: int, into: memoryview) -> None:
    """Fill a piece of memory with a file's bytes from an offset on.

    Raises:
        InputError: if the file ends before.
    """
    while len(into):
        count = os.preadv(file.fileno(), [into], offset)
        if count == 0:
            raise InputError(f"model: {file.name} ended while it was read; is it being changed?")
        into, offset = into[count:], offset + count


def buffer_for(tensors: Sequence[StoredTensor]) -> Tensor:
    """A buffer [bytes] uint8 that the largest of some tensors fits into."""
    size = max((tensor.num_bytes for tensor in tensors), default=0)
    memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # reading into small pages took three times as long
    return torch.frombuffer(memory, dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer since Python 3.12
