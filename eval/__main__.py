"""What is done with what a run has left: its models talked to, runs compared, a release verified or published.

python -m eval chat RUN [--system TEXT] [--max-new-tokens N] [--prompt TEXT]
python -m eval compare RESULTS... [--markdown]
python -m eval verify RELEASE [--base FOLDER]
python -m eval publish RELEASE [--repo-id OWNER/NAME] [--base FOLDER] [--dry-run | --upload [--public]]

Exit codes: 0 done, 1 it does not hold or could not be finished, 2 a file or folder is not usable, 130 interrupted.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import command
from common.errors import InputError, StageError
from eval import chat, runs_table


@dataclass(frozen=True)
class Command:
    """A subcommand: what it is for, its arguments, and what does it."""

    what: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    _quieten()
    return command.run(
        lambda: COMMANDS[options.command].run(options),
        interrupted="the same command begins again",
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Talk to a run's models, compare runs, verify or publish.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, its in COMMANDS.items():
        sub = commands.add_parser(name, help=its.what, description=f"{its.what.capitalize()}.")
        its.add_arguments(sub)
    return parser.parse_args(arguments)


def _quieten() -> None:
    """Our own lines on the screen; of the libraries only what is an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("eval", "common"):
        logging.getLogger(name).setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def _release_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", type=Path, help="folder of the release")
    parser.add_argument(
        "--base",
        type=Path,
        help="folder of the base model (default: as the release's recipe names it)",
    )


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    _release_arguments(parser)
    parser.add_argument("--repo-id", help="owner/name on the hub")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print files, sizes and calls, upload nothing (default)",
    )
    how.add_argument("--upload", action="store_true", help="upload, into a private repository")
    parser.add_argument("--public", action="store_true", help="with --upload: into a public one")


def _verify(options: argparse.Namespace) -> None:
    from common import distributed  # noqa: PLC0415  # torch comes late: a wrong command is told in a blink
    from eval.release.verification import verify  # noqa: PLC0415

    _require_folders(options)
    distributed.start()
    findings = verify(options.release, options.base)
    print("\n".join(f"holds    {line}" for line in findings.held))
    if findings.problems:
        raise StageError("\n".join(f"DIFFERS  {line}" for line in findings.problems))
    print(f"{options.release}: verified")


def _publish(options: argparse.Namespace) -> None:
    from eval.release import publication  # noqa: PLC0415

    _require_folders(options)
    if options.public and not options.upload:
        raise InputError("--public has no effect without --upload; add that, or leave it out")
    if options.repo_id is not None and not re.fullmatch(r"[\w.\-]+/[\w.\-]+", options.repo_id):
        raise InputError(f"--repo-id: {options.repo_id} is no id of the form owner/name")
    if options.upload and options.repo_id is None:
        raise InputError("--upload needs --repo-id OWNER/NAME")
    problems = publication.problems_of(options.release, options.repo_id, options.base)
    if problems:
        raise StageError("\n".join(f"PROBLEM  {line}" for line in problems))
    print("\n".join(publication.plan(options.release, options.repo_id, public=options.public)))
    if not options.upload:
        print("\nno problems; nothing was uploaded (--upload does that)")
        return
    address = publication.publish(
        options.release, options.repo_id, public=options.public, base=options.base
    )
    print(f"\nuploaded to {address}")


def _require_folders(options: argparse.Namespace) -> None:
    for name in ("release", "base"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise InputError(f"{name}: {folder} is no folder")


COMMANDS = {
    "verify": Command(
        "check that base, edit and adapter make a release", _release_arguments, _verify
    ),
    "chat": Command("talk to the models of a run", chat.add_arguments, chat.run),
    "compare": Command("put several runs in one table", runs_table.add_arguments, runs_table.run),
    "publish": Command("check a release and upload it to the hub", _publish_arguments, _publish),
}


if __name__ == "__main__":
    sys.exit(main())
