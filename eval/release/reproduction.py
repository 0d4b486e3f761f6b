"""The folder `reproduce/`: what it takes to make a release again, and how to tell that it is the same one."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from common import artifacts, distributed
from common.model import identity_files
from common.recipe import Recipe, resolved
from eval.release import licences
from eval.release.hashes import RULE, digest_of, hash_tensors

FOLDER = "reproduce"
TENSORS = "tensors.json"
ENVIRONMENT = "environment.json"
LIBRARIES = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "numpy",
    "optuna",
    "peft",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)


def write_reproduction(
    recipe: Recipe,
    base: Path,
    weights: Mapping[str, str],
    results: Mapping[str, Any],
    portable: str,
    folder: Path,
) -> None:
    """Write recipe, versions, seed, hashes, and how to go about it.

    Args:
        recipe: the resolved recipe.
        base: folder of the base model.
        weights: hashes of the healed model's tensors.
        results: of the evaluation.
        portable: the recipe as YAML, without paths of this machine.
        folder: of the release.
    """
    place = folder / FOLDER
    place.mkdir()
    artifacts.write_text(place / "recipe.yaml", portable)
    artifacts.write_json(place / TENSORS, _tensors(recipe, base, weights))
    named = yaml.safe_load(portable)["model"]["name_or_path"]
    environment = {
        "seed": recipe.seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "arithmetic": arithmetic(),
        "fingerprints": results["provenance"]["fingerprints"],
        "data": dict(sorted(_data(resolved(recipe)))),
    }
    artifacts.write_json(place / ENVIRONMENT, environment)
    pins = "".join(f"{name}=={version}\n" for name, version in environment["versions"].items())
    artifacts.write_text(place / "requirements.txt", pins)
    artifacts.write_text(place / "README.md", _HOW.format(name=named))


def arithmetic() -> dict[str, str]:
    """What decides how sums are rounded: the same here and there means the same bits."""
    device = distributed.device()
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {"torch": torch.__version__, "device": device.type, "kind": kind}


def _tensors(recipe: Recipe, base: Path, weights: Mapping[str, str]) -> dict[str, Any]:
    own = hash_tensors(base)
    files = [file for file in identity_files(base) if file.suffix != ".safetensors"]
    files += licences.files(base)
    return {
        "rule": RULE,
        "dtype": recipe.model.dtype,
        "weights": {"digest": digest_of(weights), "tensors": dict(weights)},
        "base": {
            "digest": digest_of(own),
            "license": licences.of(base),
            "tensors": own,
            "files": {str(file.relative_to(base)): artifacts.hash_file(file) for file in files},
        },
    }


def _data(value: object) -> Iterator[tuple[str, str]]:
    """The content of the local files that a recipe names by `path`."""
    if isinstance(value, Mapping):
        path = value.get("path")
        if isinstance(path, str) and Path(path).is_file():
            name = Path(path).name if Path(path).is_absolute() else path
            yield name, artifacts.hash_file(Path(path))
        for inner in value.values():
            yield from _data(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _data(inner)


def read_record(folder: Path) -> dict[str, Any]:
    """What `tensors.json` of a release says, with the arithmetic it was made by under `arithmetic`.

    Raises:
        OSError, ValueError, KeyError: if a file is missing or damaged.
    """
    place = folder / FOLDER
    record: dict[str, Any] = json.loads((place / TENSORS).read_text(encoding="utf-8"))
    environment = json.loads((place / ENVIRONMENT).read_text(encoding="utf-8"))
    wanted = (record["weights"]["tensors"], record["base"]["tensors"], record["base"]["files"])
    if not all(isinstance(each, dict) for each in wanted):
        raise ValueError("its lists of hashes are no lists of hashes")
    return {**record, "arithmetic": environment["arithmetic"]}


_HOW = """\
# To make this release again

Is it what its makers published, and is it base + edit + adapter? In the folder of the project that made it:

```
python -m eval verify PATH/TO/THIS/RELEASE --base {name}
```

That reads the base, edits it, merges the adapter, and holds every tensor against `tensors.json`; then every file
against `SHA256SUMS`.

From nothing, with the data that the recipe names beside it:

```
pip install -r reproduce/requirements.txt
python train/run.py reproduce/recipe.yaml
```

- `recipe.yaml`: the resolved recipe; its paths are relative to the folder the command runs in.
- `environment.json`: versions, seed, fingerprints of the stages, content hashes of the data files, and what rounds
  sums (`arithmetic`). The same arithmetic gives the same bits; other processors give other last digits.
- `tensors.json`: a SHA-256 of every tensor, of these weights and of the base; `rule` says over what.
- `requirements.txt`: the versions, for pip.
"""
