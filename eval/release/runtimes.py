"""What a model card says of the files for other runtimes, each measured after loading it back."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.table import interval


def sections(runtimes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The card's section on GGUF files; none where there are none.

    Args:
        runtimes: the files, as in gguf/scores.json.
    """
    if not runtimes:
        return []
    return [
        "\n\n".join(
            [
                "## GGUF files",
                "For llama.cpp and what is built on it; `gguf/Modelfile` is Ollama's. Each was loaded back with "
                "transformers and held against the weights of this folder on their own answers (KL in nats per "
                "token), and its refusals were counted as those above.",
                _divergences(runtimes),
                *([_refusals(runtimes)] if runtimes[0]["refusal"] else []),
                *_differences(runtimes),
            ]
        )
    ]


def _divergences(runtimes: Sequence[Mapping[str, Any]]) -> str:
    heads = ("file", "MiB", "panel", "tokens", "mean KL", "p99 KL", "same top token")
    cells = [
        (
            file["file"],
            f"{file['bytes'] / 2**20:.1f}",
            row["name"],
            str(row["num_tokens"]),
            f"{row['mean_kl']:.2g}",
            f"{row['p99_kl']:.2g}",
            f"{row['top1_agreement']:.4f}",
        )
        for file in runtimes
        for row in file["divergence"]
    ]
    return _table(heads, cells)


def _refusals(runtimes: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        (file["file"], _panel(row), str(row["n"]), interval(row))
        for file in runtimes
        for row in file["refusal"]
    ]
    return _table(("file", "panel", "n", "refused"), cells)


def _panel(row: Mapping[str, Any]) -> str:
    return f"{row['name']} (harmless: over-refusal)" if row["harmless"] else str(row["name"])


def _differences(runtimes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"The tokenizer of `{file['file']}`, as transformers reads it, gives the same tokens on "
        f"{file['tokenizer']['same']} of {file['tokenizer']['n']} prompts."
        for file in runtimes
        if file["tokenizer"]["same"] < file["tokenizer"]["n"]
    ]


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
