"""Hashes of single tensors: two folders with the same ones hold the same model, however it was cut into files.

A saved model and its reloaded twin can be cut into files at other places, so sums of files alone do not say whether
two releases hold the same weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from common import artifacts
from common.shards import DTYPES, bytes_of, read_exactly, read_shards

RULE = (
    "SHA-256 of the tensor's name, dtype and shape as a JSON list, followed by its bytes as safetensors stores them; "
    "digest: SHA-256 of the JSON of all of them, sorted by name"
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def hash_tensor(name: str, tensor: Tensor) -> str:
    """The hash of a tensor in memory, of one of safetensors' floating-point types."""
    digest = _begin(name, _NAMES[tensor.dtype], list(tensor.shape))
    digest.update(bytes_of(tensor.detach().cpu().contiguous().reshape(-1)))
    return digest.hexdigest()


def hash_tensors(folder: Path) -> dict[str, str]:
    """The hashes of all tensors of a model folder, by name; nothing is kept in memory.

    Raises:
        InputError: if it holds no weights, or a file is damaged.
    """
    found = {}
    for shard in read_shards(folder):
        with shard.path.open("rb", buffering=0) as file:
            for stored in shard.tensors:
                digest = _begin(stored.name, stored.dtype, stored.shape)
                for offset in range(stored.begin, stored.end, artifacts.BLOCK_BYTES):
                    block = bytearray(min(artifacts.BLOCK_BYTES, stored.end - offset))
                    read_exactly(file, offset, memoryview(block))
                    digest.update(block)
                found[stored.name] = digest.hexdigest()
    return dict(sorted(found.items()))


def digest_of(tensors: Mapping[str, str]) -> str:
    """One hash for all of them."""
    return artifacts.hash_data(dict(tensors))


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Names of the tensors that are not the same on both sides, or only on one."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def _begin(name: str, dtype: str, shape: Sequence[int]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
