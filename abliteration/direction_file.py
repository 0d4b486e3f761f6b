"""Directions by themselves, as notebooks and tools of this field save them, and the plain edit that removes one.

Read are `refusal_direction.safetensors` of a release, and the pickles `refusal_dir.pth` and `direction.pt`: a
tensor [d_model] or [1, d_model], or one per layer as a tensor [layers, d_model], a list or a dictionary.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abliteration.edits import orthogonalize
from abliteration.placement import Direction
from common.edits import Edit, load_edit
from common.errors import InputError
from common.recipe import Orthogonalize
from common.stored_writers import open_checkpoint, placed_writers

METADATA = "refusal_direction"


def read(path: Path) -> Edit | dict[str, Tensor]:
    """What a file holds: an edit, or directions [d_model] by the layer they are said to be of.

    Raises:
        InputError: if it can be read as neither.
    """
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); name an edit or a direction"
        ) from error
    if not is_safetensors:
        return _by_layer(path, _load_pickle(path))
    about = about_of(path)
    return load_edit(path) if about is None else _by_layer(path, _load_tensor(path))


def about_of(path: Path) -> Mapping[str, Any] | None:
    """What a release says of its direction; None if the file is none.

    Raises:
        InputError: if what it says is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (OSError, SafetensorError):
        return None
    try:
        return None if text is None else dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: what it says of itself cannot be read; fetch it again"
        ) from error


def edit_of(
    path: Path, model: Path, *, strength: float | None = None, layer: int | None = None
) -> Edit:
    """The edit in a file; for a file that holds a direction, the edit that removes it from a model.

    Args:
        path: an edit or a direction.
        model: the folder of the model it is for.
        strength: of the edit, 1 if not given; a saved edit has strengths of its own.
        layer: which direction to take, where the file has one per layer.

    Raises:
        InputError: if the file is neither, or a setting has no effect.
    """
    found = read(path)
    if isinstance(found, Edit):
        if strength is not None or layer is not None:
            raise InputError(
                f"--strength and --layer have no effect: {path} is an edit, which has both already; leave them out"
            )
        return found
    name, vector = _choose(path, found, layer)
    checkpoint = open_checkpoint(model)
    if len(vector) != checkpoint.facts.d_model:
        raise InputError(
            f"{path} holds a direction of {len(vector)} numbers, but the residual stream of {model} has d_model "
            f"{checkpoint.facts.d_model}; it was measured on another model"
        )
    if strength is not None and not 0 < strength < math.inf:
        raise InputError(
            f"--strength is {strength:g}, but a share above 0 belongs there; 1 removes all"
        )
    settings = Orthogonalize(name="orthogonalize", strength=1.0 if strength is None else strength)
    about = {"layer": name, "edit": settings.name, "strength": settings.strength}
    about |= {"model_type": checkpoint.facts.model_type, **(about_of(path) or {})}
    direction = Direction(vector[None], 0, torch.zeros(1, len(vector), dtype=torch.float64))
    return orthogonalize.build(direction, placed_writers(checkpoint), settings, about)


def _choose(path: Path, found: Mapping[str, Tensor], layer: int | None) -> tuple[str, Tensor]:
    if len(found) == 1 and layer is None:
        return next(iter(found.items()))
    if layer is None:
        raise InputError(
            f"{path} holds {len(found)} directions ({', '.join(found)}); choose one with --layer"
        )
    if str(layer) not in found:
        raise InputError(f"{path} has no direction of layer {layer}, only {', '.join(found)}")
    return str(layer), found[str(layer)]


def _load_tensor(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise InputError(
                f"{path} holds {len(names)} tensors where a direction is one; save it alone"
            )
        tensor: Tensor = file.get_tensor(names[0])
    return tensor


def _load_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} cannot be loaded: it is damaged, or a pickle with more in it than tensors, which is not loaded "
            "because it could run code; save the bare tensor with torch.save"
        ) from error


def _by_layer(path: Path, content: object) -> dict[str, Tensor]:
    """Directions [d_model] in float64 by layer; `-` stands for that of a file that does not say."""
    if isinstance(content, Tensor):
        squeezed = content.squeeze() if content.ndim > 1 else content
        pairs = [("-", squeezed)] if squeezed.ndim == 1 else list(enumerate(content))
    elif isinstance(content, Mapping):
        pairs = list(content.items())
    elif isinstance(content, list | tuple):
        pairs = list(enumerate(content))
    else:
        pairs = []
    found = {_layer(key): _vector(path, value) for key, value in pairs}
    if not found or len(found) < len(pairs):
        raise InputError(
            f"{path} holds no direction: a tensor [d_model], or one per layer, was expected (found "
            f"{type(content).__name__})"
        )
    return found


def _layer(key: object) -> str:
    """The layer in a key such as 12, "layer_12" or ("resid_pre", 12)."""
    numbers = re.findall(r"\d+", str(key))
    return str(int(numbers[-1])) if numbers else str(key)


def _vector(path: Path, value: object) -> Tensor:
    vector = value.squeeze() if isinstance(value, Tensor) and value.ndim > 1 else value
    if not isinstance(vector, Tensor) or vector.ndim != 1 or not vector.is_floating_point():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{path} holds {shape} where a direction [d_model] was expected; choose one layer and position, and "
            "save its tensor alone"
        )
    vector = vector.detach().to(torch.float64)
    if not torch.isfinite(vector).all() or vector.norm() == 0:
        raise InputError(f"{path} holds a direction that is zero or not finite; measure it again")
    return vector
