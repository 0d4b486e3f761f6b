"""Look after studies and the store of finished stages.

python -m train study NAME [--output-dir runs]
python -m train store [list | prune [--yes]] [--output-dir runs]

Exit codes: 0 done, 2 a study or folder is not usable, 130 interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from common import command
from common.artifacts import Store
from common.errors import InputError

# Seconds between two looks at a study that is at work.
PAUSE = 2.0
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    commands = {"study": _study, "store": _store}
    return command.run(
        lambda: commands[options.command](options),
        interrupted="a study that is at work goes on; the same command shows it again",
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Look after studies and the store of finished stages."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser(
        "study", help="show how far a study is; in a terminal, until it is done"
    )
    study.add_argument("name", help="of the study")
    store = commands.add_parser("store", help="list finished stages, or remove what nothing uses")
    store.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    store.add_argument(
        "--yes", action="store_true", help="prune: remove, instead of telling what would be"
    )
    for sub in (study, store):
        sub.add_argument(
            "--output-dir", type=Path, default=Path("runs"), help="of the recipes (default: runs)"
        )
    return parser.parse_args(arguments)


def _study(options: argparse.Namespace) -> None:
    """Print how a study is; in a terminal again and again, in place."""
    from train import study_progress as progress  # noqa: PLC0415  # imports Optuna

    folder = options.output_dir / options.name
    recipe, section = progress.load(folder)
    is_live, drawn = sys.stdout.isatty(), 0
    while True:
        records = progress.read(recipe, section, folder)
        lines = progress.lines(recipe, section, folder, records)
        # Up to where the last picture began, and nothing of it stays.
        sys.stdout.write((f"\x1b[{drawn}F\x1b[0J" if drawn else "") + "\n".join(lines) + "\n")
        sys.stdout.flush()
        if not is_live or progress.is_done(folder):
            return
        drawn = len(lines)
        time.sleep(PAUSE)


def _store(options: argparse.Namespace) -> None:
    from train import store  # noqa: PLC0415  # beside the other command's imports

    place = Store(options.output_dir)
    if not place.root.is_dir():
        raise InputError(
            f"{place.root}: there is no store; name the recipes' output_dir with --output-dir"
        )
    if options.action == "prune":
        _prune(place, remove=options.yes)
        return
    if options.yes:
        raise InputError("--yes has no effect on list; delete it, or write prune --yes")
    everything = store.entries(place)
    for kept in everything:
        state = "whole" if kept.entry.complete else "not done"
        used = ", ".join(kept.users) or "used by nothing"
        print(
            f"{kept.entry.stage:<13} {kept.entry.folder.name[:12]}  {_size(kept.num_bytes)}  {_age(kept.age)}  "
            f"{state:<8}  {used}"
        )
    for name, num_bytes in store.shared(place).items():
        print(f"{name:<13} {'shared':<12}  {_size(num_bytes)}")
    total = sum(kept.num_bytes for kept in everything) + sum(store.shared(place).values())
    print(f"{len(everything)} stages, {_size(total).strip()} in {place.root}")


def _prune(place: Store, *, remove: bool) -> None:
    from train import store  # noqa: PLC0415  # see above

    pruned = store.prune(place, remove=remove)
    for kept in pruned:
        print(f"{kept.entry.stage:<13} {kept.entry.folder.name[:12]}  {_size(kept.num_bytes)}")
    total = _size(sum(kept.num_bytes for kept in pruned)).strip()
    if remove:
        print(f"removed {len(pruned)} stages, {total}")
    else:
        print(f"{len(pruned)} stages, {total}, are used by nothing; `prune --yes` removes them")


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / GIB:7.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:7.2f} MiB"
    )


def _age(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} old"


if __name__ == "__main__":
    sys.exit(main())
