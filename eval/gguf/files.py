"""The GGUF files of a release: what stands in their way, and how they are made."""

import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from common import artifacts
from common.edits import SIDECAR
from common.errors import InputError, StageError
from common.model import load_config, load_tokenizer
from common.recipe import Recipe
from common.shards import read_shards
from eval.gguf import runtimes
from eval.gguf.architecture import problems_of
from eval.gguf.modelfile import modelfile
from eval.gguf.vocabulary import read_vocabulary
from eval.gguf.writer import write

FOLDER = "gguf"
# Bytes of a number, for the room that a file takes.
NUM_BYTES = {
    **{"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07},
    **{"q6_k": 0.9, "q5_k_m": 0.8, "q4_k_m": 0.7},
}


def check(recipe: Recipe, base: Path) -> list[str]:
    """What would stop the files that a recipe asks for, found without loading a weight."""
    kinds = recipe.release.gguf
    return [f"release.gguf: {problem}" for problem in _problems(recipe, base)] if kinds else []


def _problems(recipe: Recipe, base: Path) -> Iterator[str]:
    if importlib.util.find_spec("gguf") is None:
        yield "the package gguf is not installed, which writes and reads the files; pip install gguf"
        return
    quantized = [kind for kind in recipe.release.gguf if kind in runtimes.QUANTIZED]
    if quantized and not runtimes.has_binding():
        yield (
            f"{', '.join(quantized)} can be written by llama.cpp alone, and {runtimes.BINDING}, which brings it, is "
            f"not installed; pip install {runtimes.BINDING}, or delete them"
        )
    config = load_config(base)
    if recipe.release.gguf_converter is not None:
        if not Path(recipe.release.gguf_converter).is_file():
            yield f"there is no converter at {recipe.release.gguf_converter}; correct release.gguf_converter"
        if config.model_type.removesuffix("_text") not in GGUF_SUPPORTED_ARCHITECTURES:
            yield (
                f"transformers cannot load a {config.model_type} file back, so nothing could be said of it; delete it"
            )
        return
    found = problems_of(config)
    yield from found
    if not found:
        try:
            read_vocabulary(AutoTokenizer.from_pretrained(base), config.vocab_size)
        except InputError as error:
            yield str(error).removeprefix("release.gguf: ")


def disk_bytes(recipe: Recipe, base: Path) -> int:
    """The room that the files take."""
    numbers = sum(math.prod(t.shape) for shard in read_shards(base) for t in shard.tensors)
    return int(numbers * sum(NUM_BYTES[kind] for kind in recipe.release.gguf))


def converter_hash(recipe: Recipe) -> str | None:
    """What the files depend on besides weights and settings."""
    converter = recipe.release.gguf_converter
    return None if converter is None else artifacts.hash_file(Path(converter))


def name_of(recipe: Recipe, kind: str) -> str:
    """A file's name, as hubs and Ollama read the type from it."""
    return f"{recipe.name}-{kind.upper()}.gguf"


def write_files(recipe: Recipe, folder: Path) -> None:
    """Write every type that the recipe asks for into the folder of a release, and Ollama's description of it.

    Raises:
        StageError: if the model adds something beside its weights, or a file cannot be written.
        InputError: if GGUF cannot express the model.
    """
    if (folder / SIDECAR).is_file():
        raise StageError(
            f"release.gguf: {SIDECAR} holds what the edit adds beside the weights, and no GGUF file can; delete "
            "release.gguf, or choose an edit that changes weights alone"
        )
    (folder / FOLDER).mkdir()
    for kind in recipe.release.gguf:
        target = folder / FOLDER / name_of(recipe, kind)
        if kind not in runtimes.QUANTIZED:
            _write_one(recipe, folder, target, kind)
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix=".gguf-") as temporary:
            full = Path(temporary) / "full.gguf"
            _write_one(recipe, folder, full, "f32")
            runtimes.quantize(full, target, kind)
    first = name_of(recipe, recipe.release.gguf[0])
    text = modelfile(load_tokenizer(folder), f"./{first}")
    artifacts.write_text(folder / FOLDER / "Modelfile", text)


def _write_one(recipe: Recipe, folder: Path, target: Path, kind: str) -> None:
    if recipe.release.gguf_converter is not None:
        runtimes.convert(Path(recipe.release.gguf_converter), folder, target, kind)
    else:
        write(folder, target, kind, recipe.name)
