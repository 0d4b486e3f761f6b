"""The last stage: a folder to publish, made of what the others left, once every gate has passed."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import artifacts, distributed
from common.edits import SIDECAR, Edit, load_edit
from common.errors import GateError, InputError
from common.lora import save_adapter
from common.model import (
    auto_class,
    load_config,
    load_tokenizer,
    resolve,
    tokenizer_files,
    weight_files,
)
from common.recipe import Recipe
from common.stored_writers import additions_by_form, open_checkpoint
from eval.gguf import files as gguf_files
from eval.gguf import scores as gguf_scores
from eval.release import folder as release_folder
from eval.release import licences, publication
from eval.release.card import model_card
from eval.release.hashes import hash_tensors
from eval.release.leaderboards import write_leaderboards
from eval.release.loading import EXAMPLE, Loading, guard_example
from eval.release.reproduction import write_reproduction
from eval.results import missed
from eval.subjects import load_healed

VERSION = 3

logger = logging.getLogger(__name__)


def check(recipe: Recipe) -> list[str]:
    """What would stop this stage, found without loading a weight."""
    try:
        base = resolve(recipe.model.name_or_path, recipe.model.revision)
    except InputError as error:
        return [str(error)]
    problems = []
    if not tokenizer_files(base):
        problems.append(f"model: {base} has no tokenizer files to release; add them")
    release = recipe.release
    problems += gguf_files.check(recipe, base)
    if release.form == "adapter" and recipe.train.adapter is None:
        problems.append(
            "release.form: adapter needs an adapter, but train.adapter is null, so all weights are trained; give "
            "train.adapter, or release the full weights"
        )
    if release.push_to_hub is not None:
        wrong = licences.name_problem(release.push_to_hub, release.license, release.license_name)
        problems += [f"release.push_to_hub: {wrong}"] if wrong else []
    return problems


def inputs(recipe: Recipe) -> dict[str, object]:
    """What the result depends on besides the earlier stages: the card's own settings, and the recipe it ships."""
    return {
        "settings": recipe.release.model_dump(mode="json", exclude={"gguf_converter"}),
        "gguf_converter": gguf_files.converter_hash(recipe),
        "recipe": artifacts.hash_text(release_folder.portable_recipe(recipe)),
    }


def disk_bytes(recipe: Recipe) -> int:
    """The room that the release takes: the full weights, which an adapter's release needs for a while too."""
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    weights = sum(file.stat().st_size for file in weight_files(base))
    return weights + gguf_files.disk_bytes(recipe, base)


def run(recipe: Recipe, folder: Path, upstream: Mapping[str, Path], tracker: wandb.Run) -> None:
    """Write the release, and upload it where the recipe names a repository.

    Args:
        recipe: the resolved recipe.
        folder: of this stage.
        upstream: folders of the finished stages `abliteration`, `train` and `eval`.
        tracker: this stage's wandb run.

    Raises:
        GateError: if the evaluation missed a gate.
        StageError: if the release would hold a path of this machine, or must not be uploaded as it is.
    """
    results = json.loads((upstream["eval"] / "results.json").read_text(encoding="utf-8"))
    if not results["accept"]["passed"]:
        raise GateError("\n".join(missed(results)))
    if distributed.is_main():
        _write(recipe, folder, upstream, results)
    distributed.barrier()
    runtimes = gguf_scores.score(recipe, folder) if recipe.release.gguf else []
    if distributed.is_main():
        _describe(recipe, folder, upstream, results, runtimes)
        files = [folder / name for name in release_folder.released_files(folder)]
        num_bytes = sum(file.stat().st_size for file in files)
        tracker.summary.update({"files": len(files), "bytes": num_bytes})
        logger.info("release: %d files, %.1f MiB", len(files), num_bytes / 2**20)
        if recipe.release.push_to_hub is not None:
            address = publication.publish(folder, recipe.release.push_to_hub)
            logger.info("release: uploaded to %s", address)
    distributed.barrier()


def _write(
    recipe: Recipe, folder: Path, upstream: Mapping[str, Path], results: Mapping[str, Any]
) -> None:
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    edit = load_edit(upstream["abliteration"] / "edit.safetensors")
    release_folder.empty(folder)
    weights = _write_weights(recipe, base, edit, folder, upstream)
    release_folder.write_tokenizer(base, folder)
    release_folder.write_direction(edit, folder)
    shutil.copyfile(upstream["abliteration"] / "edit.safetensors", folder / "edit.safetensors")
    _write_evidence(folder, upstream["eval"], results)

    portable = release_folder.portable_recipe(recipe)
    artifacts.write_text(folder / "recipe.yaml", portable)
    write_reproduction(recipe, base, weights, results, portable, folder)
    if recipe.release.gguf:
        gguf_files.write_files(recipe, folder)


def _describe(
    recipe: Recipe,
    folder: Path,
    upstream: Mapping[str, Path],
    results: Mapping[str, Any],
    runtimes: Sequence[Mapping[str, Any]],
) -> None:
    """Write what is said of the files, and the checksums over all of them."""
    if runtimes:
        artifacts.write_json(folder / gguf_scores.SCORES, {"files": runtimes})
    base = resolve(recipe.model.name_or_path, recipe.model.revision)
    edit = load_edit(upstream["abliteration"] / "edit.safetensors")
    _write_words(recipe, base, edit, folder, upstream, results, runtimes)
    release_folder.require_portable(
        folder, [Path.cwd(), Path.home(), *(path.resolve() for path in upstream.values())]
    )
    release_folder.write_checksums(folder)


def _write_weights(
    recipe: Recipe, base: Path, edit: Edit, folder: Path, upstream: Mapping[str, Path]
) -> dict[str, str]:
    """Write weights or what makes them out of the base's; returns the hashes of the healed model's tensors."""
    adapter = upstream["train"] / "adapter"
    if adapter.is_dir():
        release_folder.write_adapter(adapter, folder / "adapter")
    release_folder.write_additions(upstream["abliteration"] / "model", folder)
    if recipe.release.form == "full":
        release_folder.write_model(load_healed(recipe, upstream), folder)
        return hash_tensors(folder)
    if _has_adapter_form(base, edit):
        save_adapter(base, edit, folder / "edit_adapter")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as temporary:
        release_folder.write_model(load_healed(recipe, upstream), Path(temporary))
        return hash_tensors(Path(temporary))


def _has_adapter_form(base: Path, edit: Edit) -> bool:
    """Whether PEFT can apply the edit too: low rank, and nothing that only hooks can add."""
    _, beside = additions_by_form(open_checkpoint(base), edit)
    return edit.is_low_rank() and not beside


def _write_evidence(folder: Path, evaluation: Path, results: Mapping[str, Any]) -> None:
    shutil.copyfile(evaluation / "results.json", folder / "results.json")
    release_folder.write_items(evaluation / "items.jsonl", folder)
    write_leaderboards(results, folder)
    report = evaluation / "report.html"
    if report.is_file():
        shutil.copyfile(report, folder / "report.html")


def _write_words(
    recipe: Recipe,
    base: Path,
    edit: Edit,
    folder: Path,
    upstream: Mapping[str, Path],
    results: Mapping[str, Any],
    runtimes: Sequence[Mapping[str, Any]],
) -> None:
    """Write the card, the notices, and the example of a guard."""
    duties = licences.duties_of(recipe.release.license, recipe.release.license_name)
    base_name = str(edit.about["base_model"])
    artifacts.write_text(folder / licences.NOTICE, licences.notice(base, base_name, duties))
    task, how = _task(base), _loading(recipe, folder)
    artifacts.write_text(folder / EXAMPLE.name, guard_example(how, base_name, task))
    healing = json.loads((upstream["train"] / "summary.json").read_text(encoding="utf-8"))
    files = release_folder.released_files(folder)
    card = model_card(
        recipe,
        edit,
        results,
        healing,
        files,
        loading=how,
        task=task,
        thinks=_thinks(base),
        runtimes=runtimes,
    )
    artifacts.write_text(folder / "README.md", card)


def _loading(recipe: Recipe, folder: Path) -> Loading:
    if recipe.release.form == "adapter":
        return "adapters" if (folder / "edit_adapter").is_dir() else "edited"
    return "hooked" if (folder / SIDECAR).is_file() else "weights"


def _task(base: Path) -> str:
    """The pipeline of transformers that takes the model by its folder."""
    causal = auto_class(load_config(base)) is AutoModelForCausalLM
    return "text-generation" if causal else "image-text-to-text"


def _thinks(base: Path) -> bool:
    """Whether every stage asked the model otherwise than its own template does: behind an empty thought."""
    own = AutoTokenizer.from_pretrained(base).get_chat_template()
    return own != load_tokenizer(base).get_chat_template()
