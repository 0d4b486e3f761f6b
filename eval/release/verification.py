"""Is a release what it says it is: every file as it was published, and its weights base + edit + adapter?"""

import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from common import artifacts
from common.edits import SIDECAR, Edit, load_edit, save_edit
from common.errors import HealingError, InputError
from common.model import resolve
from common.shards import DTYPES, StoredTensor, buffer_for, read_shards, read_tensor
from common.stored_writers import additions_by_form, open_checkpoint
from eval.release import folder as release_folder
from eval.release.hashes import differing, digest_of, hash_tensor, hash_tensors
from eval.release.rebuilding import Parts, rebuild
from eval.release.reproduction import arithmetic, read_record

# A merged weight is one rounded sum: where another processor multiplies, its last digits may be others.
ROUNDINGS = 8
# What a damaged file makes of its reader, whose reasons the checksums have found already.
UNREADABLE = (
    HealingError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    MemoryError,
    OverflowError,
    pickle.UnpicklingError,
    yaml.YAMLError,
    SafetensorError,
)


@dataclass
class Findings:
    """What a verification found.

    Attributes:
        problems: what does not hold, each in a sentence.
        held: what was looked at and holds.
    """

    problems: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def verify(folder: Path, base: Path | None = None) -> Findings:
    """Hold a release against its checksums, its hashes, and what base, edit and adapter make.

    Args:
        folder: of the release.
        base: folder of the base model; None: the one its recipe names.

    Raises:
        InputError: if the folder is no release, or the base cannot be had.
    """
    if not (folder / release_folder.SUMS).is_file():
        raise InputError(
            f"{folder} holds no {release_folder.SUMS}, so it is no release of this program; name its folder"
        )
    findings = Findings()
    findings.problems += _file_problems(folder)
    if not findings.problems:
        names = release_folder.released_files(folder)
        findings.held.append(f"{len(names)} files are as {release_folder.SUMS} says")
    try:
        record = read_record(folder)
        edit = load_edit(folder / "edit.safetensors")
        _verify_weights(folder, record, findings)
        _verify_direction(folder, edit, findings)
        _verify_rebuilt(folder, edit, record, base, findings)
    except UNREADABLE as error:
        if not findings.problems:
            raise error if isinstance(error, HealingError) else _damaged(folder, error) from error
        # What the checksums have found explains it.
        findings.problems.append(f"it could not be looked at any further: {_first_line(error)}")
    return findings


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} is damaged, or of another version of this program ({_first_line(error)}); fetch it again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _file_problems(folder: Path) -> Iterator[str]:
    """What differs from SHA256SUMS, which is compared as a whole: a changed character in it counts too."""
    said = (folder / release_folder.SUMS).read_bytes().decode("utf-8", errors="replace")
    found = release_folder.checksums(folder)
    if said == found:
        return
    listed, present = _by_name(said), _by_name(found)
    yield from (f"{name} is missing" for name in sorted(set(listed) - set(present)))
    yield from (
        f"{name} is not in {release_folder.SUMS}" for name in sorted(set(present) - set(listed))
    )
    changed = sorted(name for name in {*listed} & {*present} if listed[name] != present[name])
    yield from (f"{name} is not the file that was published" for name in changed)
    if listed == present:
        yield f"{release_folder.SUMS} itself was changed"


def _by_name(sums: str) -> dict[str, str]:
    parts = (line.partition("  ") for line in sums.splitlines())
    return {name: digest for digest, _, name in parts}


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors"))


def _verify_weights(folder: Path, record: Mapping[str, Any], findings: Findings) -> None:
    expected = record["weights"]["tensors"]
    if digest_of(expected) != record["weights"]["digest"]:
        findings.problems.append(
            "reproduce/tensors.json contradicts itself: its digest is not that of its tensors"
        )
    if not _has_weights(folder):
        findings.held.append("no weights are in it: it is edit and adapter alone")
        return
    odd = differing(hash_tensors(folder), expected)
    if odd:
        findings.problems.append(
            f"{len(odd)} of {len(expected)} tensors are not those of reproduce/tensors.json: {_some(odd)}"
        )
    else:
        findings.held.append(f"{len(expected)} tensors are those of reproduce/tensors.json")


def _verify_direction(folder: Path, edit: Edit, findings: Findings) -> None:
    """The direction alone has to be the edit's, in both of its forms."""
    names = ("refusal_direction.safetensors", "refusal_dir.pth")
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        release_folder.write_direction(edit, Path(temporary))
        same = (folder / names[0]).read_bytes() == (Path(temporary) / names[0]).read_bytes()
    bare = torch.load(folder / names[1], weights_only=True)
    for name, is_same in (
        (names[0], same),
        (names[1], torch.equal(bare, edit.direction.to(torch.float32))),
    ):
        if not is_same:
            findings.problems.append(f"{name} is not the direction of edit.safetensors")


def _verify_rebuilt(
    folder: Path, edit: Edit, record: Mapping[str, Any], base: Path | None, findings: Findings
) -> None:
    adapter = folder / "adapter"
    if not adapter.is_dir():
        findings.held.append(
            "not rebuilt: all weights were trained, so there is no adapter that makes them out of the base"
        )
        return
    base = base if base is not None else _named_base(folder)
    odd = differing(hash_tensors(base), record["base"]["tensors"])
    if odd:
        findings.problems.append(
            f"{base} is not the base of this release: {len(odd)} tensors differ ({_some(odd)})"
        )
        return
    findings.held.append(f"{base} is the base that it was made from")
    for name, digest in record["base"]["files"].items():
        if not (base / name).is_file() or artifacts.hash_file(base / name) != digest:
            findings.problems.append(
                f"{base / name} is not the file that the release was made from"
            )
    _verify_sidecar(folder, edit, base, findings)
    _compare(folder, Parts(base, edit, adapter, record["dtype"]), record, findings)


def _named_base(folder: Path) -> Path:
    """The base that the recipe of a release names.

    Raises:
        InputError: if it cannot be had.
    """
    model = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["model"]
    try:
        return resolve(model["name_or_path"], model.get("revision"))
    except InputError as error:
        raise InputError(
            f"the base of this release cannot be had, so its weights cannot be made again ({error}); name its folder "
            "with --base"
        ) from error


def _verify_sidecar(folder: Path, edit: Edit, base: Path, findings: Findings) -> None:
    """What is added beside the weights has to be what the edit adds."""
    _, beside = additions_by_form(open_checkpoint(base), edit)
    if not beside and not (folder / SIDECAR).is_file():
        return
    with tempfile.TemporaryDirectory(prefix="verify-") as temporary:
        made = Path(temporary) / SIDECAR
        used = {a.vector: edit.vectors[a.vector] for a in beside.values()}
        save_edit(Edit(used, {}, beside, {}, edit.about), made)
        found = (folder / SIDECAR).read_bytes() if (folder / SIDECAR).is_file() else None
        if found != made.read_bytes():
            findings.problems.append(
                f"{SIDECAR} is not what edit.safetensors adds beside the weights"
            )


def _compare(folder: Path, parts: Parts, record: Mapping[str, Any], findings: Findings) -> None:
    """Make the weights again and hold their hashes against the recorded ones."""
    expected: dict[str, str] = record["weights"]["tensors"]
    stored = _stored(folder) if _has_weights(folder) else {}
    dtypes = {name: place.dtype for name, (_, place) in stored.items()} or _dtypes(parts, expected)
    found: dict[str, str] = {}
    distances: dict[str, float] = {}
    for name, tensor in rebuild(parts, dtypes):
        found[name] = hash_tensor(name, tensor)
        if found[name] != expected.get(name) and name in stored:
            distances[name] = _distance(tensor, *stored[name])
    odd = differing(found, expected)
    if not odd:
        findings.held.append(f"base, edit and adapter make the same {len(expected)} tensors")
        return
    rounded = [name for name in odd if distances.get(name, 2 * ROUNDINGS) <= ROUNDINGS]
    if len(rounded) == len(odd) and record["arithmetic"] != arithmetic():
        findings.held.append(
            f"base, edit and adapter make {len(expected) - len(odd)} of {len(expected)} tensors again; {len(odd)} "
            f"differ in their last digits alone, as they may: it was made by {_named(record['arithmetic'])}, this is "
            f"{_named(arithmetic())}"
        )
        return
    findings.problems.append(
        f"base, edit and adapter do not make these weights: {len(odd)} of {len(expected)} tensors differ "
        f"({_some(odd)}); the adapter, the edit or the weights are not those of this release"
    )


def _stored(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    return {
        tensor.name: (shard.path, tensor)
        for shard in read_shards(folder)
        for tensor in shard.tensors
    }


def _dtypes(parts: Parts, names: Mapping[str, str]) -> dict[str, str]:
    """The types of weights that are not there: the base's own, or the one that the recipe loads them as."""
    if parts.dtype == "auto":
        own = {t.name: t.dtype for shard in read_shards(parts.base) for t in shard.tensors}
        return {name: own.get(name, "") for name in names}
    wanted = next(key for key, dtype in DTYPES.items() if dtype == getattr(torch, parts.dtype))
    return dict.fromkeys(names, wanted)


def _distance(tensor: Tensor, path: Path, place: StoredTensor) -> float:
    """The largest difference of a tensor from a stored one, in roundings of its largest number."""
    if DTYPES.get(place.dtype) != tensor.dtype or place.shape != tuple(tensor.shape):
        return float("inf")
    with path.open("rb", buffering=0) as file:
        stored = read_tensor(file, place, buffer_for([place])).double()
    unit = torch.finfo(tensor.dtype).eps * float(stored.abs().max())
    return float((tensor.double() - stored).abs().max()) / unit if unit else float("inf")


def _named(how: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(how.items()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if names[3:] else "")
