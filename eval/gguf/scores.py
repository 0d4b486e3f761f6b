"""What a GGUF file is worth: loaded back, and held against the released weights on the recipe's own panels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common import chat
from common.errors import StageError
from common.model import load_config, load_model, load_tokenizer
from common.prompts import load_prompts
from common.recipe import Divergence, Recipe
from common.statistics import wilson
from eval.benchmarks import Loaded, Subject, component
from eval.gguf.files import FOLDER, name_of
from eval.gguf.reading import load
from eval.items import Item

SCORES = f"{FOLDER}/scores.json"
# Harmless prompts that are compared on where the recipe measures no divergence.
NUM_PROMPTS = 64


def score(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Load every GGUF file of a release back and score it; the processes of the launch share the work.

    Args:
        recipe: the resolved recipe.
        folder: of the release, with its weights.

    Returns:
        For each file its size, the share of prompts that its tokenizer reads as the release's does, its divergence
        from the released weights on their own answers, and its refusals.

    Raises:
        StageError: if a file cannot be loaded back.
    """
    tokenizer = load_tokenizer(folder)
    panels = _panels(recipe, tokenizer)
    released = load_model(folder, dtype=recipe.model.dtype)
    config = load_config(folder)
    for panel in panels:
        if _is(panel, "divergence"):
            # Its own answers are the text that the files are compared on.
            panel.score(Subject("original", released, released))
    found = []
    for kind in recipe.release.gguf:
        file = folder / FOLDER / name_of(recipe, kind)
        subject = Subject("healed", load(file, config, released.dtype), released)
        found.append(
            {
                "file": f"{FOLDER}/{file.name}",
                "type": kind,
                "bytes": file.stat().st_size,
                "tokenizer": _tokenizer_row(recipe, file, tokenizer),
                "divergence": [_divergence_row(p, subject) for p in panels if _is(p, "divergence")],
                "refusal": [_refusal_row(p, subject) for p in panels if _is(p, "refusal")],
            }
        )
    return found


def _panels(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Loaded]:
    """The recipe's panels of divergence and refusal; harmless prompts where it has none of the former."""
    specs = [spec for spec in recipe.eval.benchmarks if spec.name in ("divergence", "refusal")]
    if not any(spec.name == "divergence" for spec in specs):
        specs.append(_harmless(recipe))
    size = recipe.eval.batch_size
    return [p for s in specs for p in component(s.name).load(s, tokenizer, batch_size=size)]


def _harmless(recipe: Recipe) -> Divergence:
    prompts = recipe.abliteration.prompts.harmless
    if prompts.slice is None:
        prompts = prompts.model_copy(update={"slice": f":{NUM_PROMPTS}"})
    return Divergence(name="divergence", panel="harmless", prompts=prompts)


def _is(panel: Loaded, kind: str) -> bool:
    return panel.row.kind == kind


def _divergence_row(panel: Loaded, subject: Subject) -> dict[str, Any]:
    items = panel.score(subject)
    values = np.concatenate([item.details["kl"] for item in items])
    agreements = sum(item.details["top1_agreements"] for item in items)
    return {
        "name": panel.row.name,
        "num_tokens": len(values),
        "mean_kl": float(values.mean()),
        "p99_kl": float(np.quantile(values, 0.99)),
        "top1_agreement": agreements / len(values),
    }


def _refusal_row(panel: Loaded, subject: Subject) -> dict[str, Any]:
    items: Sequence[Item] = panel.score(subject)
    refused = sum(item.value for item in items)
    interval = wilson(refused, len(items))
    return {
        "name": panel.row.name,
        "n": len(items),
        "harmless": panel.row.about["harmless"],
        "value": refused / len(items),
        "low": interval.low,
        "high": interval.high,
    }


def _tokenizer_row(
    recipe: Recipe, file: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """On how many harmless prompts the file's tokenizer, as transformers reads it, gives the release's tokens."""
    try:
        own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise StageError(
            f"release: the tokenizer of {file.name} cannot be loaded back ({str(error)[:200]}); delete release.gguf"
        ) from error
    texts = [chat.render(tokenizer, prompt) for prompt in load_prompts(_harmless(recipe).prompts)]

    def ids(of: PreTrainedTokenizerBase) -> list[list[int]]:
        found: list[list[int]] = of(texts, add_special_tokens=False)["input_ids"]
        return found

    same = sum(a == b for a, b in zip(ids(own), ids(tokenizer), strict=True))
    return {"n": len(texts), "same": same}
