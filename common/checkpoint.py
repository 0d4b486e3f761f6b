"""A saved edit applied to the weights on disk, tensor by tensor: what does not change is copied byte by byte.

The output is built in a folder beside its place (`.NAME.partial`) with a journal of what is done, and is renamed
into place at the end. A killed run is gone on with, as far as the journal vouches for what lies there.

A file is taken over in the cheapest way that is safe: a link where nothing in it changes, else a clone that
shares its blocks with the source (where the file system can), else one sequential copy into which the edited
tensors are written as they pass.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from common import distributed
from common.artifacts import hash_data, require_disk
from common.edits import SIDECAR, Edit, edited_bias, save_edit
from common.errors import InputError, StageError
from common.journal import Journal, journaled
from common.shards import (
    DTYPES,
    INDEX,
    SINGLE,
    Shard,
    StoredTensor,
    buffer_for,
    bytes_of,
    read_exactly,
    read_tensor,
)
from common.slices import edit_in_place
from common.stored_writers import (
    Checkpoint,
    Placed,
    additions_by_form,
    open_checkpoint,
    require_fit,
)

# Each needs memory for the largest tensor that is edited in it.
SHARDS_AT_A_TIME = 2
# Rises when the same edit of the same files would give other bytes: then no partial folder is gone on with.
VERSION = 1
# Pieces that stay in a processor's cache between reading and writing.
COPY_BYTES = 1 << 18
KERNEL_BYTES = 16 << 20
FICLONE = 0x40049409  # linux/fs.h
CANNOT_CLONE = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EPERM,
}
# Weights in other forms would stay as they were, beside edited ones.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What a writer's weight writes along the vectors that are removed from it: |U W| over all of its tensors.

    Attributes:
        before: in the source.
        after: in the output, as it is stored there.
    """

    before: float
    after: float


def apply_to_checkpoint(source: Path, edit: Edit, output: Path) -> dict[str, Written]:
    """Write an edited copy of a model folder without loading the model.

    Args:
        source: a folder with safetensors weights, in one file or sharded; it is not changed.
        edit: made for the same architecture, depth and width.
        output: a folder that does not exist yet, or is empty. It appears when everything is done.

    Returns:
        Per writer that something is removed from: what it wrote along it before and after.

    Raises:
        InputError: if the edit does not fit the checkpoint, or the output is in use; nothing is written then.
        StageError: if there is no room, or a weight did not change although the edit removes something from it.
    """
    checkpoint = open_checkpoint(source)
    require_fit(checkpoint, edit)
    edit = replace(edit, removals={n: r for n, r in edit.removals.items() if not r.is_void})
    output = output.absolute()
    _require_free(output, source)
    folded, beside = additions_by_form(checkpoint, edit)
    if beside and (source / SIDECAR).is_file():
        raise InputError(
            f"{source / SIDECAR}: the model has additions of an earlier edit already; apply this edit to the model "
            "that one was made from"
        )
    partial = output.with_name(f".{output.name}.partial")
    with journaled(partial, _identity(checkpoint, edit)) as journal:
        folder = partial / "model"
        folder.mkdir(exist_ok=True)
        touched = _touched(checkpoint, replace(edit, additions=folded))
        _write_shards(checkpoint, replace(edit, additions=folded), touched, folder, journal)
        _require_change(edit, touched, journal)
        _copy_other_files(checkpoint, folder)
        if beside:
            used = {a.vector: edit.vectors[a.vector] for a in beside.values()}
            save_edit(Edit(used, {}, beside, {}, edit.about), folder / SIDECAR)
        _sync(folder)
        folder.rename(output)
        shutil.rmtree(partial)
    _sync(output.parent)
    return _written(edit, touched, journal)


def edited_tensors(source: Path, edit: Edit) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The tensors of a model folder as an edit leaves them, one at a time; nothing is written.

    Args:
        source: a folder with safetensors weights.
        edit: made for the same architecture, depth and width.

    Yields:
        Where each lies in the source, and the tensor: a view of a buffer that the next one overwrites.

    Raises:
        InputError: if the edit does not fit the checkpoint, or a tensor is packed.
    """
    checkpoint = open_checkpoint(source)
    require_fit(checkpoint, edit)
    edit = replace(edit, removals={n: r for n, r in edit.removals.items() if not r.is_void})
    folded, _ = additions_by_form(checkpoint, edit)
    edit = replace(edit, additions=folded)
    touched = _touched(checkpoint, edit)
    for shard in checkpoint.shards:
        buffer = buffer_for(shard.tensors)
        with shard.path.open("rb", buffering=0) as file:
            for stored in shard.tensors:
                if stored.dtype not in DTYPES:
                    raise InputError(
                        f"model: {shard.path}: {stored.name} is stored as {stored.dtype}; name the full-precision "
                        f"source ({', '.join(DTYPES)})"
                    )
                tensor = read_tensor(file, stored, buffer)
                if stored.name in touched[shard.name]:
                    _edit_tensor(tensor, touched[shard.name][stored.name], edit)
                yield stored, tensor


def _require_free(output: Path, source: Path) -> None:
    if output.resolve().is_relative_to(source.resolve()):
        raise InputError(f"output: {output} lies in the model's own folder; name another one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"output: {output} exists already; name a folder that does not, or remove this one"
        )


def _identity(checkpoint: Checkpoint, edit: Edit) -> str:
    """What the bytes of the output depend on; of the source, what a change of it would change."""
    states = [(shard.name, shard.path.stat()) for shard in checkpoint.shards]
    return hash_data(
        {
            "version": VERSION,
            "source": [[name, state.st_size, state.st_mtime_ns] for name, state in states],
            "vectors": {name: vector.tolist() for name, vector in edit.vectors.items()},
            "removals": {name: vars(removal) for name, removal in edit.removals.items()},
            "additions": {name: vars(addition) for name, addition in edit.additions.items()},
        }
    )


def _touched(checkpoint: Checkpoint, edit: Edit) -> dict[str, dict[str, Placed]]:
    """The tensors that an edit changes, by shard and by their names there."""
    touched: dict[str, dict[str, Placed]] = {shard.name: {} for shard in checkpoint.shards}
    for name in {**edit.removals, **edit.additions}:
        bias = checkpoint.bias(name)
        weights = checkpoint.weights(name) if name in edit.removals else []
        for placed in [*weights, *([bias] if bias is not None else [])]:
            touched[placed.shard.name][placed.stored.name] = placed
    return touched


def _write_shards(
    checkpoint: Checkpoint,
    edit: Edit,
    touched: Mapping[str, Mapping[str, Placed]],
    folder: Path,
    journal: Journal,
) -> None:
    """Write every shard that is not finished yet, some at a time: one waits for the disk while another computes."""
    with (
        tqdm(
            total=sum(shard.num_bytes for shard in checkpoint.shards),
            desc="apply",
            unit="B",
            unit_scale=True,
            disable=not distributed.is_main(),
        ) as bar,
        _threads_as_before(),
        ThreadPoolExecutor(max_workers=SHARDS_AT_A_TIME) as pool,
    ):

        def write(shard: Shard) -> None:
            for size in _write_shard(shard, touched[shard.name], edit, folder, journal):
                bar.update(size)

        written = [pool.submit(write, shard) for shard in checkpoint.shards]
        try:
            for shard in written:
                shard.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _threads_as_before() -> Iterator[None]:
    """Give torch its threads back: the slices of a weight are edited on one, and each thread sets that for all."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_shard(
    shard: Shard, touched: Mapping[str, Placed], edit: Edit, folder: Path, journal: Journal
) -> Iterator[int]:
    """Write a shard as far as it is not there; yields the sizes of the pieces as they are done."""
    target = folder / shard.name
    if shard.name not in journal.begun or not target.exists():
        target.unlink(missing_ok=True)
        journal.begin(shard.name, _take_over(shard, target, is_edited=bool(touched)))
    if shard.name in journal.finished or journal.begun[shard.name] == "link":
        yield shard.num_bytes
        return
    buffer = buffer_for([placed.stored for placed in touched.values()])
    with shard.path.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as file:
        yield from _write_regions(shard, touched, edit, source, file, journal, buffer)
        os.fsync(file.fileno())
    journal.finish(shard.name)


def _take_over(shard: Shard, target: Path, *, is_edited: bool) -> str:
    """Begin a shard of the output: `link` and `clone` give it whole, `copy` gives an empty file.

    An edited shard is never linked: writing through the link would change the source.
    """
    source = shard.path.resolve()  # the hub's cache holds links
    if not is_edited:
        with contextlib.suppress(OSError):  # another file system, or one without links: copy below
            target.hardlink_to(source)
            return "link"
    with source.open("rb") as original, target.open("wb") as file:
        try:
            fcntl.ioctl(file, FICLONE, original.fileno())
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
            require_disk(target.parent, shard.num_bytes, f"the edited copy of {shard.name}")
            return "copy"
    return "clone"


def _write_regions(
    shard: Shard,
    touched: Mapping[str, Placed],
    edit: Edit,
    source: BinaryIO,
    file: BinaryIO,
    journal: Journal,
    buffer: Tensor,
) -> Iterator[int]:
    """Write what is not there yet, front to back; yields the sizes of the pieces as they are done.

    A copy grows at its end only, so that all of an unedited region is there as far as the file reaches; a clone
    has its full size. An edited tensor is there when the journal says so.
    """
    there = file.seek(0, os.SEEK_END)
    regions = list(_regions(shard, touched))
    done = journal.steps[shard.name]
    waiting = [placed for _, _, placed in regions if placed and placed.stored.name not in done]

    def edited(placed: Placed) -> tuple[float, float]:
        return _edit_tensor(read_tensor(source, placed.stored, buffer), placed, edit)

    # One tensor is edited while what stands before it is copied.
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(edited, waiting[0]) if waiting else None
        for begin, end, placed in regions:
            if placed is None:
                yield min(there, end) - min(there, begin)
                yield from _copy(source, file, max(begin, min(there, end)), end)
                continue
            if waiting and placed is waiting[0]:
                assert ahead is not None
                before, after = ahead.result()
                _write_at(file, begin, bytes_of(buffer[: end - begin]))
                journal.step(shard.name, placed.stored.name, before=before, after=after)
                del waiting[0]
                ahead = pool.submit(edited, waiting[0]) if waiting else None
            yield end - begin


def _regions(
    shard: Shard, touched: Mapping[str, Placed]
) -> Iterator[tuple[int, int, Placed | None]]:
    """The bytes of a shard in order: edited tensors, and all there is between them, the header included."""
    end = 0
    for stored in shard.tensors:
        if stored.name in touched:
            if end < stored.begin:
                yield end, stored.begin, None
            yield stored.begin, stored.end, touched[stored.name]
            end = stored.end
    if end < shard.num_bytes:
        yield end, shard.num_bytes, None


def _edit_tensor(tensor: Tensor, placed: Placed, edit: Edit) -> tuple[float, float]:
    """Edit a stored tensor in place; returns |U W|^2 of a weight before and after, and zeros for a bias."""
    name, layout = placed.place.writer, placed.place.layout
    removal, addition = edit.removals.get(name), edit.additions.get(name)
    if placed.place.part == "weight":
        assert removal is not None
        return edit_in_place(
            tensor, edit.basis(name), edit.strengths(name), removal.keep_norm, layout
        )
    if removal is not None:
        tensor.copy_(edited_bias(tensor, edit.basis(name), edit.strengths(name)))
    if addition is not None:
        tensor.copy_(tensor.double() + addition.amount * edit.vectors[addition.vector])
    return 0.0, 0.0


def _copy(source: BinaryIO, file: BinaryIO, begin: int, end: int) -> Iterator[int]:
    """Copy a range of bytes to the same place; yields the sizes of the pieces."""
    while begin < end:
        count = _copy_in_kernel(source, file, begin, min(KERNEL_BYTES, end - begin))
        if not count:
            piece = memoryview(bytearray(min(COPY_BYTES, end - begin)))
            read_exactly(source, begin, piece)
            _write_at(file, begin, piece)
            count = len(piece)
        yield count
        begin += count


def _copy_in_kernel(source: BinaryIO, file: BinaryIO, offset: int, size: int) -> int:
    """Let the system copy, which saves the way through this process; returns 0 where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), file.fileno(), size, offset, offset)
    except OSError as error:
        if error.errno not in CANNOT_CLONE:
            raise
        return 0


def _write_at(file: BinaryIO, offset: int, data: memoryview) -> None:
    while len(data):
        # In pieces: one call for all of a large tensor took six times as long (ext4, 1 GB).
        count = os.pwrite(file.fileno(), data[:COPY_BYTES], offset)
        data, offset = data[count:], offset + count


def _copy_other_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy configuration, tokenizer, template, licence and what else there is that holds no weights."""
    for path in sorted(checkpoint.folder.iterdir()):
        target = folder / path.name
        if path.name.startswith(".") or path.name in {shard.name for shard in checkpoint.shards}:
            continue
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        if any(_holds_weights(file, checkpoint) for file in files):
            logger.info("%s is not copied: it holds weights, which would stay unedited", path.name)
        elif path.is_dir():
            shutil.copytree(path, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, target)


def _holds_weights(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a file holds weights, or the list of weights of a checkpoint in another form."""
    if path.name == SIDECAR:
        return False
    if path.name.endswith(".index.json"):
        return path.name != INDEX or [shard.name for shard in checkpoint.shards] == [SINGLE]
    return path.suffix in (".safetensors", *OTHER_WEIGHTS)


def _require_change(
    edit: Edit, touched: Mapping[str, Mapping[str, Placed]], journal: Journal
) -> None:
    changed = {
        placed.place.writer
        for shard, tensors in touched.items()
        for name, placed in tensors.items()
        if journal.steps[shard][name]["before"] != journal.steps[shard][name]["after"]
    }
    for name, removal in edit.removals.items():
        # Mirrored, at strength 2, as much is written along the vectors as before: that tells nothing.
        if name not in changed and abs(1 - removal.strengths[0]) != 1:
            raise StageError(
                f"{name} did not change under the edit, so it still writes what it wrote; its side or layout in "
                "common/architecture.py is wrong, or the direction is not one of this model's"
            )


def _written(
    edit: Edit, touched: Mapping[str, Mapping[str, Placed]], journal: Journal
) -> dict[str, Written]:
    squares = {name: [0.0, 0.0] for name in edit.removals}
    for shard, tensors in touched.items():
        for name, placed in tensors.items():
            if placed.place.writer in squares:
                step = journal.steps[shard][name]
                squares[placed.place.writer][0] += step["before"]
                squares[placed.place.writer][1] += step["after"]
    return {
        name: Written(math.sqrt(before), math.sqrt(after))
        for name, (before, after) in squares.items()
    }


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
