"""The last stage: a folder to publish, made of what the others left, once every gate has passed."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import wandb
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import artifacts, distributed
from common.edits import load_edit
from common.errors import GateError, InputError
from common.model import (
    auto_class,
    load_config,
    load_tokenizer,
    resolve,
    tokenizer_files,
    weight_files,
)
from common.recipe import Recipe
from eval.release import folder as release_folder
from eval.release.card import model_card
from eval.results import missed
from eval.subjects import load_healed

VERSION = 2

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    try:
        base = resolve(recipe.model.name_or_path, recipe.model.revision)
    except InputError as error:
        return [str(error)]
    has_tokenizer = bool(tokenizer_files(base))
    return [] if has_tokenizer else [f"model: {base} has no tokenizer files to release; add them"]


def inputs(recipe: Recipe) -> dict[str, object]:
    """What the result depends on besides the earlier stages: the card's own settings, and the recipe it ships."""
    return {
        "settings": recipe.release.model_dump(mode="json"),
        "recipe": artifacts.hash_text(release_folder.portable_recipe(recipe)),
    }


def disk_bytes(recipe: Recipe) -> int:
    """The room that the release takes: the full weights."""
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    return sum(file.stat().st_size for file in weight_files(base))


def run(recipe: Recipe, folder: Path, upstream: Mapping[str, Path], tracker: wandb.Run) -> None:
    """Write the release.

    Args:
        recipe: the resolved recipe.
        folder: of this stage.
        upstream: folders of the finished stages `abliteration`, `train` and `eval`.
        tracker: this stage's wandb run.

    Raises:
        GateError: if the evaluation missed a gate.
        StageError: if the release would hold a path of this machine.
    """
    results = json.loads((upstream["eval"] / "results.json").read_text(encoding="utf-8"))
    if not results["accept"]["passed"]:
        raise GateError("\n".join(missed(results)))
    if distributed.is_main():
        _write(recipe, folder, upstream)
        files = [file for file in folder.rglob("*") if file.is_file()]
        num_bytes = sum(file.stat().st_size for file in files)
        tracker.summary.update({"files": len(files), "bytes": num_bytes})
        logger.info("release: %d files, %.1f MiB", len(files), num_bytes / 2**20)
    distributed.barrier()


def _write(recipe: Recipe, folder: Path, upstream: Mapping[str, Path]) -> None:
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    edit_path = upstream["abliteration"] / "edit.safetensors"
    adapter = upstream["train"] / "adapter"
    edit = load_edit(edit_path)

    release_folder.empty(folder)
    release_folder.write_model(load_healed(recipe, upstream), base, folder)
    release_folder.write_additions(upstream["abliteration"] / "model", folder)
    if adapter.is_dir():
        release_folder.write_adapter(adapter, folder / "adapter")
    release_folder.write_direction(edit, folder)
    shutil.copyfile(edit_path, folder / "edit.safetensors")
    shutil.copyfile(upstream["eval"] / "results.json", folder / "results.json")
    artifacts.write_text(folder / "recipe.yaml", release_folder.portable_recipe(recipe))

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    healing = json.loads((upstream["train"] / "summary.json").read_text(encoding="utf-8"))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    card = model_card(recipe, edit, results, healing, files, task=_task(base), thinks=_thinks(base))
    artifacts.write_text(folder / "README.md", card)
    release_folder.require_portable(
        folder, [Path.cwd(), Path.home(), *(path.resolve() for path in upstream.values())]
    )
    release_folder.write_checksums(folder)


def _task(base: Path) -> str:
    """The pipeline of transformers that takes the model by its folder."""
    causal = auto_class(load_config(base)) is AutoModelForCausalLM
    return "text-generation" if causal else "image-text-to-text"


def _thinks(base: Path) -> bool:
    """Whether every stage asked the model otherwise than its own template does: behind an empty thought."""
    own = AutoTokenizer.from_pretrained(base).get_chat_template()
    return own != load_tokenizer(base).get_chat_template()
