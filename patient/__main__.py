"""Build the patient: `python -m patient --output DIR [--architecture llama] [--seed 0]`.

With `--over-refusing [--base DIR]` it is one that refuses some harmless questions as well.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from common import command
from common.errors import InputError
from patient.architectures import ARCHITECTURES
from patient.build import build_patient
from patient.folder import existing_patient
from patient.levels import Level


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a patient, or reuse the one that is there, and print its levels.

    Returns:
        The exit code: 0 done, 1 a level was missed, 2 the output folder is not usable, 130 interrupted.
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # A bar for one file of 4 MB says nothing.
    transformers_logging.disable_progress_bar()
    return command.run(
        lambda: _build(options), interrupted="nothing is left of it; the same command begins again"
    )


def _build(options: argparse.Namespace) -> None:
    if options.base is not None and not options.over_refusing:
        raise InputError("--base has no effect without --over-refusing; leave it out")
    levels = existing_patient(
        options.output, options.architecture, options.seed, over_refusing=options.over_refusing
    )
    if levels is not None:
        print(f"{options.output} holds this patient already; nothing to do")
    else:
        levels = build_patient(
            options.output,
            options.architecture,
            options.seed,
            over_refusing=options.over_refusing,
            base=options.base,
        )
    print(_table(levels))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m patient",
        description="Train the tiny chat model that refuses, with its prompts and benchmarks.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--seed", type=int, default=0, help="of the facts, weights and batches")
    parser.add_argument(
        "--over-refusing",
        action="store_true",
        help="tune it further, to refuse harmless questions in one wording as well",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="with --over-refusing: the folder of a finished patient to tune, instead of training one first",
    )
    return parser.parse_args(arguments)


def _table(levels: Sequence[Level]) -> str:
    header = f"{'level':<15} {'rate':>6} {'n':>5}  wanted"
    rows = [
        f"{each.name:<15} {each.value:>6.3f} {each.num_items:>5}  {each.wanted}" for each in levels
    ]
    return "\n".join([header, *rows])


if __name__ == "__main__":
    sys.exit(main())
