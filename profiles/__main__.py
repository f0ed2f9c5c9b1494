"""`python -m profiles`: looks at profiles and merges them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible
from profiles.journal import journal_path
from profiles.store import ProfileStore, merge


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        text: str = arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def summary(path: Path) -> str:
    """How many rows of a profile there are of each GPU, model, source and status.

    Raises:
        DataError: the profile is refused, or not there.
    """
    if not path.exists() and not journal_path(path).exists():
        raise DataError(f"{path}: no such profile")
    frame = ProfileStore(path).records()
    counts = frame.groupby(["gpu", "model", "source", "status"]).size()
    return f"{path}: {len(frame)} rows" + (f"\n{counts.to_frame('rows').to_string()}" if len(frame) else "")


def _merge(arguments: argparse.Namespace) -> str:
    return f"{arguments.out}: {merge(arguments.profiles, arguments.out)} rows"


def _show(arguments: argparse.Namespace) -> str:
    return "\n".join(summary(path) for path in arguments.profiles)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m profiles", description="Look at profiles and merge them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="check profiles and say what is in them")
    show.set_defaults(run=_show)
    merging = commands.add_parser("merge", help="put the rows of several profiles into one; what it has is kept")
    merging.add_argument("--out", type=Path, required=True, metavar="FILE", help="the Parquet file to merge into")
    merging.set_defaults(run=_merge)
    for command in (show, merging):
        command.add_argument("profiles", type=Path, nargs="+", metavar="PROFILE", help="a profile's Parquet file")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
