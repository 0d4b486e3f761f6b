"""llama.cpp's own programs, where they are installed: its converter, and its quantizer in a package from PyPI."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from common.errors import StageError

# llama.cpp's file types, by their numbers in llama.h, and the package that can write them.
QUANTIZED = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
BINDING = "cyllama"


def has_binding() -> bool:
    """Whether llama.cpp can be called from here."""
    return importlib.util.find_spec(BINDING) is not None


def convert(converter: Path, folder: Path, target: Path, kind: str) -> None:
    """Write a file with llama.cpp's converter.

    Args:
        converter: path of convert_hf_to_gguf.py.
        folder: of a model.
        target: the file.
        kind: f32, f16, bf16 or q8_0.

    Raises:
        StageError: if it fails, with its last words.
    """
    command = [sys.executable, str(converter), str(folder), "--outfile", str(target)]
    done = subprocess.run(
        [*command, "--outtype", kind], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not target.is_file():
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise StageError(
            f"release.gguf_converter: {converter} did not write {target.name}:\n{words}\nDelete the key to use the own "
            "writer, or delete release.gguf"
        )


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write a K-quant of a file with full weights; llama.cpp chooses the type of each matrix.

    Args:
        source: in f32, f16 or bf16.
        target: the file.
        kind: of QUANTIZED.

    Raises:
        StageError: if llama.cpp refuses.
    """
    llama = importlib.import_module(f"{BINDING}.llama.llama_cpp")
    llama.disable_logging()
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype = QUANTIZED[kind]
    try:
        llama.model_quantize(str(source), str(target), settings)
    except RuntimeError as error:
        raise StageError(
            f"release.gguf: llama.cpp could not write {kind} ({error}); delete it from the list"
        ) from error
