"""Apply a saved edit, turn it into an adapter, or look into it.

python -m abliteration apply --model SOURCE --edit FILE --output DIR
python -m abliteration adapter --model SOURCE --edit FILE --output DIR
python -m abliteration inspect FILE

Exit codes: 0 done, 1 it could not be finished, 2 a file or folder is not usable, 130 interrupted.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import command
from common.errors import InputError

if TYPE_CHECKING:  # torch comes late: a wrong command is told in a blink
    from common.checkpoint import Written
    from common.edits import Edit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("common").setLevel(logging.INFO)
    commands = {"apply": _apply, "adapter": _adapter, "inspect": _inspect}
    return command.run(
        lambda: commands[options.command](options),
        interrupted="the same command goes on where it stopped",
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m abliteration", description="Apply a saved edit outside of a recipe."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("apply", "write an edited copy of a model, tensor by tensor"),
        ("adapter", "write the edit as a LoRA adapter"),
    ):
        sub = commands.add_parser(name, help=what, description=f"{what.capitalize()}.")
        sub.add_argument("--model", required=True, help="folder or hub id of the source")
        sub.add_argument(
            "--edit",
            type=Path,
            required=True,
            help="an edit, or a direction (.safetensors, .pth, .pt)",
        )
        sub.add_argument("--output", type=Path, required=True, help="folder to make")
        sub.add_argument("--revision", help="of the hub id")
        sub.add_argument(
            "--strength", type=float, help="for a direction: share that is removed (default 1)"
        )
        sub.add_argument("--layer", type=int, help="for a file with a direction per layer")
    sub = commands.add_parser("inspect", help="print what an edit or direction file holds")
    sub.add_argument("file", type=Path)
    return parser.parse_args(arguments)


def _folder(options: argparse.Namespace) -> Path:
    if Path(options.model).is_dir():
        if options.revision is not None:
            raise InputError(
                f"--revision has no effect: {options.model} is a folder, not an id of the hub; leave it out"
            )
        return Path(options.model)
    from common.model import resolve  # noqa: PLC0415  # imports all of transformers' loading

    return resolve(options.model, options.revision)


def _apply(options: argparse.Namespace) -> None:
    from abliteration.direction_file import edit_of  # noqa: PLC0415
    from common.checkpoint import apply_to_checkpoint  # noqa: PLC0415

    source = _folder(options)
    edit = edit_of(options.edit, source, strength=options.strength, layer=options.layer)
    written = apply_to_checkpoint(source, edit, options.output)
    print("\n".join([f"{options.output}: the edited model", *_coverage_lines(written)]))


def _adapter(options: argparse.Namespace) -> None:
    from abliteration.direction_file import edit_of  # noqa: PLC0415
    from common.lora import save_adapter  # noqa: PLC0415

    source = _folder(options)
    edit = edit_of(options.edit, source, strength=options.strength, layer=options.layer)
    # A folder's path means nothing on another machine; without an address PEFT asks for the model.
    address = None if Path(options.model).is_dir() else options.model
    save_adapter(source, edit, options.output, address)
    print(f"{options.output}: the adapter")


def _inspect(options: argparse.Namespace) -> None:
    from abliteration.direction_file import about_of, read  # noqa: PLC0415
    from common.edits import Edit  # noqa: PLC0415

    found = read(options.file)
    if isinstance(found, Edit):
        print("\n".join(["kind: edit", *_about_lines(found.about), *_edit_lines(found)]))
        return
    lines = ["kind: direction", *_about_lines(about_of(options.file) or {})]
    for layer, vector in found.items():
        place = "" if layer == "-" else f" of layer {layer}"
        lines.append(f"vector{place}: d_model {len(vector)}, norm {float(vector.norm()):.6g}")
    print("\n".join(lines))


def _coverage_lines(written: Mapping[str, "Written"]) -> Iterator[str]:
    """How much of what the writers wrote along the removed vectors is left: overall, and where most."""
    if not written:
        return
    shares = {
        name: each.after / each.before if each.before else 0.0 for name, each in written.items()
    }
    name = max(shares, key=lambda name: shares[name])
    yield f"{len(written)} writers edited; left of what they wrote: at most {shares[name]:.3g} ({name})"


def _about_lines(about: Mapping[str, Any]) -> Iterator[str]:
    """What is known of where it comes from: layer, position and base model first."""
    first = [key for key in ("base_model", "layer", "position") if key in about]
    for key in [*first, *sorted(set(about) - set(first))]:
        yield f"{key.replace('_', ' ')}: {about[key]}"


def _edit_lines(edit: "Edit") -> Iterator[str]:
    shapes = sorted({len(vector) for vector in edit.vectors.values()})
    yield f"vectors: {len(edit.vectors)} of d_model {', '.join(map(str, shapes))}"
    odd = {name: float(v.norm()) for name, v in edit.vectors.items() if abs(v.norm() - 1) > 1e-6}
    yield from (f"  {name}: norm {norm:.6g}, not 1" for name, norm in odd.items())
    yield f"removals: {len(edit.removals)}"
    removals = {
        name: (", ".join(f"{strength:.4g}" for strength in removal.strengths), removal.keep_norm)
        for name, removal in edit.removals.items()
    }
    yield from _by_component(
        {
            name: s if keep == "none" else f"{s} ({keep} norms kept)"
            for name, (s, keep) in removals.items()
        }
    )
    yield f"additions: {len(edit.additions)}"
    yield from _by_component(
        {name: f"{a.amount:.6g} {a.vector}" for name, a in edit.additions.items()}
    )
    yield f"left alone: {len(edit.left_alone)}"
    yield from _by_component(edit.left_alone)


def _by_component(values: Mapping[str, str]) -> Iterator[str]:
    """Lines `component: layers 0-11 value, 12 value`, in the order they come in."""
    components: dict[str, list[tuple[int | None, str]]] = {}
    for name, value in values.items():
        match = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
        component, layer = (match[2], int(match[1])) if match else (name, None)
        components.setdefault(component, []).append((layer, value))
    for component, entries in components.items():
        yield f"  {component}: {', '.join(_runs(entries))}"


def _runs(entries: Sequence[tuple[int | None, str]]) -> Iterator[str]:
    """Consecutive layers with the same value, as one entry."""
    runs: list[tuple[list[int | None], str]] = []
    for layer, value in entries:
        last = runs[-1] if runs else None
        if last and layer is not None and last[0][-1] == layer - 1 and last[1] == value:
            last[0].append(layer)
        else:
            runs.append(([layer], value))
    for layers, value in runs:
        if layers[0] is None:
            yield value
        else:
            span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            yield f"layers {span}: {value}" if len(layers) > 1 else f"layer {span}: {value}"


if __name__ == "__main__":
    sys.exit(main())
