"""The files of a release besides its card; the same inputs give the same bytes."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from common import artifacts
from common.edits import SIDECAR, Edit
from common.errors import StageError
from common.model import tokenizer_files
from common.recipe import Recipe, dump, resolved
from common.schema import LABELS
from eval.release import licences

# transformers would write files of 50 GB, which hubs and file systems refuse.
SHARD_SIZE = "5GB"
SUMS = "SHA256SUMS"
ITEMS = "items.jsonl"
# The store's own record of the stage, written when the release is finished; it is not published.
NOT_RELEASED = frozenset({SUMS, artifacts.MANIFEST})
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TEXT_SUFFIXES = frozenset({".html", ".json", ".jsonl", ".yaml", ".md", ".jinja", ".py", ".txt"})
HASHED = "sha256:"


def empty(folder: Path) -> None:
    """Remove what an attempt that did not end has left, which the checksums would otherwise cover."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the full weights and configurations."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def write_tokenizer(base: Path, folder: Path) -> None:
    """Copy the base's tokenizer, template, processor and licence.

    Byte for byte: saving a loaded tokenizer again would keep what loading changed (its padding side, a template that
    opens answers behind an empty thought).
    """
    for file in [*tokenizer_files(base), *licences.files(base)]:
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_items(source: Path, folder: Path) -> None:
    """Write what every model did on every item, with hashes in place of all texts.

    Whoever has the data can tell which answers were the same; whoever has not learns none of them.
    """
    artifacts.write_jsonl(
        folder / ITEMS,
        [
            {
                **row,
                "id": _without_texts(row["id"]),
                "cluster": _without_texts(row["cluster"]),
                "details": _without_texts(row["details"]),
            }
            for row in artifacts.read_jsonl(source)
        ],
    )


def _without_texts(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, Mapping):
        return {key: _without_texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_texts(inner) for inner in value]
    if isinstance(value, str) and value not in LABELS:  # the class of an answer is no text
        return HASHED + artifacts.hash_text(value)
    return value


def write_additions(abliterated: Path, folder: Path) -> None:
    """Copy what the edited model adds to the stream where no weight can hold it; healing has not changed it."""
    if (abliterated / SIDECAR).is_file():
        shutil.copyfile(abliterated / SIDECAR, folder / SIDECAR)


def write_adapter(adapter: Path, folder: Path) -> None:
    """Copy an adapter without the path of the model it was trained on.

    Its base is the abliterated model, which is not at any address: base and edit together are.
    Without an address PEFT asks for a model instead of loading a wrong one.
    """
    folder.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = None
    if isinstance(settings.get("target_modules"), list):
        # PEFT keeps them in a set, whose order changes between processes.
        settings["target_modules"].sort()
    artifacts.write_json(folder / "adapter_config.json", settings)


def write_direction(edit: Edit, folder: Path) -> None:
    """Write the refusal direction alone, for owners of the base model, in the two forms in use.

    `refusal_direction.safetensors` says in its metadata where the direction was found;
    `refusal_dir.pth` is the bare tensor, as notebooks of this field load it.
    """
    direction = edit.direction.to(torch.float32).contiguous()
    about = dict(edit.about) | {"dtype": "float32", "is_unit_vector": True}
    # One metadata key: with two or more, safetensors writes them in an order that changes between
    # processes.
    metadata = {"refusal_direction": json.dumps(about, sort_keys=True)}
    save_file({"direction": direction}, folder / "refusal_direction.safetensors", metadata=metadata)
    torch.save(direction, folder / "refusal_dir.pth")


def portable_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with the paths of this machine made relative to the folder the command ran in."""

    def portable(value: Any) -> Any:  # noqa: ANN401  # any JSON value
        if isinstance(value, Mapping):
            return {key: portable(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [portable(inner) for inner in value]
        if not isinstance(value, str) or not Path(value).is_absolute():
            return value
        here = Path.cwd()
        return (
            str(Path(value).relative_to(here))
            if Path(value).is_relative_to(here)
            else Path(value).name
        )

    return dump(Recipe.model_validate(portable(resolved(recipe))))


def released_files(folder: Path) -> list[str]:
    """The names of all files of a release that its checksums cover, sorted; not what the hub or git add to a copy."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if str(name) not in NOT_RELEASED and not name.parts[0].startswith((".git", ".cache"))
    )


def checksums(folder: Path) -> str:
    """What SHA256SUMS has to say of a folder as it is."""
    return "".join(
        f"{artifacts.hash_file(folder / name)}  {name}\n" for name in released_files(folder)
    )


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over all files, sorted; `sha256sum -c SHA256SUMS` checks them."""
    artifacts.write_text(folder / SUMS, checksums(folder))


def require_portable(folder: Path, machine_paths: Iterable[Path]) -> None:
    """Hold a release against the paths of this machine.

    Raises:
        StageError: naming the file that holds one.
    """
    forbidden = {str(path) for path in machine_paths if len(path.parts) > 1}
    for file in sorted(folder.rglob("*")):
        if file.suffix not in TEXT_SUFFIXES or file.name == "tokenizer.json":
            continue
        text = file.read_text(encoding="utf-8")
        for path in forbidden:
            if path in text:
                raise StageError(
                    f"release: {file.name} holds a path of this machine ({path}); name inputs by "
                    f"relative paths or "
                    "hub ids in the recipe"
                )
