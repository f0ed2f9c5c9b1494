"""`python -m costmodel.evaluate`: how wrong the latency model is on groups it has not seen, beside its baselines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from costmodel.evaluation import evaluate
from costmodel.fit import read_profiles
from costmodel.groups import HeldOut
from costmodel.report import as_json, write_report
from profiles.atomic import require_writable
from profiles.errors import UserError
from profiles.interrupt import interruptible

MIN_FOLDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.folds < MIN_FOLDS:
        parser.error(f"--folds {arguments.folds}: at least {MIN_FOLDS}")
    try:
        profile = read_profiles(arguments.profile)
        require_writable(arguments.out)
        found = evaluate(
            profile,
            kinds=[HeldOut(kind) for kind in arguments.held_out],
            num_folds=arguments.folds,
            told=lambda text: print(f"held out by {text}", file=sys.stderr),
        )
        paths = write_report(found, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_json(found) if arguments.json else "\n".join(str(path) for path in paths))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m costmodel.evaluate",
        description="Cross-validate the latency model and its baselines with whole groups held out.",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="profiles (Parquet); what several measured is merged",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    kinds = [kind.value for kind in HeldOut]
    parser.add_argument(
        "--held-out", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=f"of {', '.join(kinds)}; all"
    )
    parser.add_argument("--folds", type=int, default=5, help="parts that the groups are held out in (default 5)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
