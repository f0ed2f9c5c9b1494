"""`python -m costmodel.fit`: learns a latency model from profiles and saves it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from costmodel import features, model_file
from costmodel.groups import HeldOut, group_labels
from costmodel.model import LatencyModel
from costmodel.model_file import FittedModel
from costmodel.sessions import usable
from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible
from profiles.journal import journal_path
from profiles.records import Source
from profiles.store import ProfileStore


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    started = time.perf_counter()
    try:
        rows = usable(read_profiles(arguments.profile))
        fitted = fit(rows, seed=arguments.seed)
        model_file.write(arguments.out, fitted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: latency model of {fitted.gpu} from {described(rows)}, {seconds:.1f} s")
    return 0


def fit(rows: pd.DataFrame, *, seed: int = 0) -> FittedModel:
    """A model of a profile's finished rows (`sessions.usable`); intervals are calibrated for shapes never seen.

    Raises:
        DataError: too few rows.
    """
    if len(rows) < MIN_ROWS:
        raise DataError(f"{len(rows)} finished rows: a latency model needs at least {MIN_ROWS}")
    shapes = group_labels(rows, HeldOut.SHAPE).astype(str)
    groups = shapes if len(np.unique(shapes)) > 1 else group_labels(rows, HeldOut.LOAD).astype(str)
    model = LatencyModel(random_state=seed).fit(
        features.of_profile(rows),
        rows["latency_us"].to_numpy(dtype=np.float64),
        groups=groups if len(np.unique(groups)) > 1 else None,
    )
    uniform = rows[rows["schemes"].map(lambda names: len(set(names)) == 1)]
    by_scheme = uniform.groupby(uniform["schemes"].map(lambda names: names[0]))["config"]
    return FittedModel(
        model=model,
        gpu=str(rows["gpu"].iloc[0]),
        configs={str(scheme): tuple(sorted(set(configs))) for scheme, configs in by_scheme},
        num_rows=len(rows),
    )


MIN_ROWS = 50


def described(rows: pd.DataFrame) -> str:
    """How many launches, and that they are predictions where they are."""
    is_measured = (rows["source"] == Source.MEASURED.value).all()
    return f"{len(rows)} launches{'' if is_measured else ', predicted, none of them measured'}"


def read_profiles(paths: Sequence[Path]) -> pd.DataFrame:
    """The rows of several profiles, one after the other. DataError: one is refused, or not there."""
    for path in paths:
        if not path.exists() and not journal_path(path).exists():
            raise DataError(f"{path}: no such profile")
    return pd.concat([ProfileStore(path).records() for path in paths], ignore_index=True)


def seed_number(text: str) -> int:
    """What `--seed` takes. ValueError or ArgumentTypeError, of which argparse makes a sentence."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: it must not be negative")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m costmodel.fit", description="Learn the latency model of a GPU from profiles."
    )
    parser.add_argument("--profile", type=Path, nargs="+", required=True, metavar="FILE", help="profiles (Parquet)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model's file (.npz)")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of what is drawn while fitting (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
