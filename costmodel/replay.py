"""`python -m costmodel.replay`: tuning replayed over a recorded profile, without a GPU: how fast guided measuring finds
what an exhaustive sweep found, against random order, a grid and Optuna's TPE.

Regret is over all launches: how much slower the configuration chosen for a launch is than its best recorded one. A
strategy with a model chooses the best by measurement or prediction; one without takes a launch's best measured
configuration, or where none was measured the analytic core's pick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import optuna
import pandas as pd

from costmodel import features
from costmodel.evaluation import launch_ids, usable
from costmodel.fit import read_profiles
from costmodel.guide import Candidates, Policy, best_rows
from profiles.atomic import replacing
from profiles.errors import DataError, UserError

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """After `num_measured` measurements, `seconds` of GPU and compiler time by the policy's costs."""

    strategy: str
    num_measured: int
    share: float
    seconds: float
    regret_mean: float
    regret_p99: float


Strategy = Callable[[Candidates, Array, Policy], Iterator[Codes]]
"""Yields batches of rows to measure, from what it measured before."""


def guided(candidates: Candidates, latency_us: Array, policy: Policy) -> Iterator[Codes]:
    """The policy's own choice."""
    measured = np.zeros(len(latency_us), dtype=np.bool_)
    while len(rows := policy.next(candidates, measured, np.where(measured, latency_us, np.nan))):
        yield rows
        measured[rows] = True


def random_order(candidates: Candidates, latency_us: Array, policy: Policy) -> Iterator[Codes]:
    """All rows, by lot."""
    rows = np.random.default_rng(policy.seed).permutation(len(latency_us))
    for start in range(0, len(rows), policy.batch):
        yield rows[start : start + policy.batch]


def grid(candidates: Candidates, latency_us: Array, policy: Policy) -> Iterator[Codes]:
    """Evenly spaced rows of the table, finer and finer."""
    size = 1 << int(np.ceil(np.log2(max(2, len(latency_us)))))
    bits = int(np.log2(size))
    reversed_bits = np.asarray([int(f"{row:0{bits}b}"[::-1], 2) for row in range(size)])
    rows = reversed_bits[reversed_bits < len(latency_us)]
    for start in range(0, len(rows), policy.batch):
        yield rows[start : start + policy.batch]


def tpe(candidates: Candidates, latency_us: Array, policy: Policy) -> Iterator[Codes]:
    """Optuna's TPE, a study a launch, each asked in turn."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    order = np.random.default_rng(policy.seed).permutation(np.unique(candidates.launches))
    rows_of = {launch: np.flatnonzero(candidates.launches == launch) for launch in order}
    studies = {
        launch: optuna.create_study(sampler=optuna.samplers.TPESampler(seed=policy.seed + int(launch)))
        for launch in order
    }
    batch: list[int] = []
    for _ in range(max(len(rows) for rows in rows_of.values())):
        for launch in order:
            trial = studies[launch].ask()
            index = trial.suggest_categorical("config", list(range(len(rows_of[launch]))))
            row = int(rows_of[launch][index])
            studies[launch].tell(trial, float(latency_us[row]))
            batch.append(row)
            if len(batch) == policy.batch:
                yield np.asarray(batch, dtype=np.int64)
                batch = []
    if batch:
        yield np.asarray(batch, dtype=np.int64)


STRATEGIES: dict[str, tuple[Strategy, bool]] = {
    "guided": (guided, True),
    "random, with the model": (random_order, True),
    "random": (random_order, False),
    "grid": (grid, False),
    "TPE (Optuna)": (tpe, False),
}
"""(what it measures, whether the model chooses in the end)."""


def replay(rows: pd.DataFrame, name: str, policy: Policy, *, max_share: float = 0.25, points: int = 12) -> list[Point]:
    """The curve of a strategy over a profile's finished rows, up to a share of all measurements.

    Raises:
        DataError: no launch was measured with two configurations.
    """
    y, candidates = rows["latency_us"].to_numpy(dtype=np.float64), candidates_of(rows)
    if len(np.unique(candidates.launches)) == len(y):
        raise DataError("nothing to replay: no launch was measured with two configurations")
    strategy, with_model = STRATEGIES[name]
    limit = int(max_share * len(y))
    checkpoints = iter(np.unique(np.geomspace(policy.batch, max(limit, policy.batch), points).astype(int)))
    measured = np.zeros(len(y), dtype=np.bool_)
    core = np.log(candidates.features["latency_us"].to_numpy(dtype=np.float64))
    best = y[best_rows(y, candidates.launches)]
    curve, wanted = [], next(checkpoints)
    for batch in strategy(candidates, y, policy):
        measured[batch] = True
        count = int(measured.sum())
        if count < wanted:
            continue
        if with_model:
            estimate, _ = policy.estimate(candidates, measured, np.where(measured, y, np.nan))
        else:
            # Far below any other, so that a launch's measured rows come before the core's picks.
            estimate = np.where(measured, np.log(y) - 100.0, core)
        regret = y[best_rows(estimate, candidates.launches)] / best - 1.0
        kernels = len(np.unique(candidates.kernels[measured]))
        curve.append(
            Point(
                strategy=name,
                num_measured=count,
                share=count / len(y),
                seconds=count * policy.measure_seconds + kernels * policy.compile_seconds,
                regret_mean=float(regret.mean()),
                regret_p99=float(np.quantile(regret, 0.99)),
            )
        )
        if count >= limit:
            break
        wanted = next((each for each in checkpoints if each > count), limit)
    return curve


def candidates_of(rows: pd.DataFrame) -> Candidates:
    """A profile's rows as candidates."""
    names = [
        f"{config} {'+'.join(sorted(set(used)))}" for config, used in zip(rows["config"], rows["schemes"], strict=True)
    ]
    return Candidates(
        features=features.of_profile(rows),
        launches=launch_ids(rows),
        kernels=np.asarray(pd.factorize(np.asarray(names))[0], dtype=np.int64),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        rows = usable(read_profiles(arguments.profile))
        curves = [
            point
            for name in STRATEGIES
            for point in replay(rows, name, Policy(seed=arguments.seed), max_share=arguments.max_share)
        ]
        try:
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps([asdict(point) for point in curves], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{arguments.out}: cannot be written ({error.strerror or error})") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for point in curves:
        print(
            f"{point.strategy:24} {point.num_measured:6} measured ({100 * point.share:5.1f}%)  {point.seconds:7.1f} s"
            f"  regret {100 * point.regret_mean:6.2f}%  p99 {100 * point.regret_p99:6.2f}%"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m costmodel.replay", description="Replay tuning over a profile.")
    parser.add_argument("--profile", type=Path, nargs="+", required=True, metavar="FILE", help="profiles (Parquet)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the curves, as JSON")
    parser.add_argument("--max-share", type=float, default=0.25, help="of all rows, to measure at most (default 0.25)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
