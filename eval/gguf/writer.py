"""Writes a folder of transformers as one GGUF file, tensor by tensor; the same folder gives the same bytes.

The names, numbers and types are those of the `gguf` package, which llama.cpp's authors keep.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from common.errors import InputError, StageError
from common.model import load_config
from eval.gguf.architecture import FAMILIES, Family, add_shape, problems_of, rope_factors
from eval.gguf.vocabulary import add_vocabulary, read_vocabulary

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, where it is read from, its shape, and how it is stored."""

    name: str
    source: str
    shape: tuple[int, ...]
    qtype: Any  # gguf.GGMLQuantizationType


def write(folder: Path, target: Path, kind: str, name: str) -> None:
    """Write the weights, the configuration and the tokenizer of a folder.

    Args:
        folder: of a causal language model, as `save_pretrained` leaves it.
        target: the file.
        kind: one of TYPES: what matrices are stored in; vectors stay in float32, and a row that Q8_0's blocks do not
            divide in float16. f16 holds weights that were stored in float16 exactly and those in bfloat16 to 3e-8;
            of those in float32 it loses up to one part in 2048 each, where f32 loses nothing.
        name: of the model.

    Raises:
        InputError: if GGUF cannot express the model or its tokenizer.
        StageError: if a weight lies beyond the type's range.
    """
    import gguf  # noqa: PLC0415  # an extra

    config = load_config(folder)
    problems = problems_of(config)
    if problems:
        raise InputError("\n".join(f"release.gguf: {problem}" for problem in problems))
    family = FAMILIES[config.model_type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)

    with contextlib.closing(gguf.GGUFWriter(target, family.arch)) as writer:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[TYPES[kind]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, config)
        add_vocabulary(writer, vocabulary, tokenizer)
        entries = list(_entries(folder, family, config, kind))
        for entry in entries:
            _add_info(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_stored(_read(folder, entry, family, config), entry))


def _entries(folder: Path, family: Family, config: Any, kind: str) -> Iterator[Entry]:  # noqa: ANN401  # each family has a class of its own
    """Every tensor of a folder under its name in GGUF, in the order of the shards."""
    import gguf  # noqa: PLC0415  # an extra

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    factors = rope_factors(config)
    if factors is not None:
        yield Entry(ROPE_FREQS, "", tuple(factors.shape), gguf.GGMLQuantizationType.F32)
    for source, shape in _shapes(folder):
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"release.gguf: {source} has no name in GGUF for {config.model_type}; delete release.gguf"
            )
        yield Entry(name, source, shape, _type_of(shape, kind))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in _weights(folder):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, tuple(opened.get_slice(name).get_shape())


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _type_of(shape: tuple[int, ...], kind: str) -> Any:  # noqa: ANN401  # gguf.GGMLQuantizationType
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415  # an extra

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[kind.upper()]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _add_info(writer: Any, entry: Entry) -> None:  # noqa: ANN401  # gguf.GGUFWriter
    from gguf import GGML_QUANT_SIZES  # noqa: PLC0415  # an extra

    block, block_bytes = GGML_QUANT_SIZES[entry.qtype]
    num_bytes = math.prod(entry.shape) // block * block_bytes
    # With any type but bytes the writer takes the shape as that of the numbers.
    writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), num_bytes, entry.qtype)


def _read(folder: Path, entry: Entry, family: Family, config: Any) -> Tensor:  # noqa: ANN401
    """A tensor in float32, as llama.cpp wants it."""
    if entry.name == ROPE_FREQS:
        factors = rope_factors(config)
        assert factors is not None
        return factors
    tensor = _find(folder, entry.source).to(torch.float32)
    if family.permutes and ".attn_q." in entry.name:
        return paired(tensor, config.num_attention_heads)
    if family.permutes and ".attn_k." in entry.name:
        return paired(tensor, config.num_key_value_heads)
    return tensor + family.norm_shift if "norm" in entry.name else tensor


def _find(folder: Path, name: str) -> Tensor:
    for file in _weights(folder):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118  # it is no dictionary
                tensor: Tensor = opened.get_tensor(name)
                return tensor
    raise KeyError(name)


def paired(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection [heads * head size, ...] with the two that are rotated together side by side.

    transformers rotates row i of a head with row i + half; llama.cpp's rotation for this family rows 2 i and 2 i + 1.
    """
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _stored(tensor: Tensor, entry: Entry) -> NDArray[Any]:
    """A tensor's numbers as they are written.

    Raises:
        StageError: if one is not finite there.
    """
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415  # an extra

    values = tensor.contiguous().numpy()
    is_f16 = entry.qtype in (GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0)
    # Q8_0 keeps the scale of a block in float16: its largest number is 127 of them.
    limit = float(np.finfo(np.float16).max) * (
        127 if entry.qtype == GGMLQuantizationType.Q8_0 else 1
    )
    if not np.isfinite(values).all() or (is_f16 and np.abs(values).max(initial=0) > limit):
        raise StageError(
            f"release: {entry.source} holds numbers that {entry.qtype.name} cannot; ask for bf16 or f32 in release.gguf"
        )
    found: NDArray[Any] = quants.quantize(values, entry.qtype)
    return found
