"""`python -m costmodel.replay`: tuning replayed over a recorded profile, without a GPU: how fast guided measuring finds
what an exhaustive sweep found, against random order, a grid and Optuna's TPE.

Each model of the profile is tuned by itself, as if it were new: the base of guided measuring is fitted on the other
models' rows. Regret is over all launches of the model: how much slower the configuration chosen for a launch is than
its best recorded one. A strategy with a model chooses the best by measurement or prediction; one without takes a
launch's best measured configuration, or the analytic core's pick where fewer than two were measured. Seconds are
`guide.Costs`: every strategy pays for the kernels, weights and inputs that its batches need.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from costmodel import worth_check
from costmodel.fit import read_profiles, seed_number
from costmodel.guide import Belief, Candidates, Guide, best_rows
from costmodel.recorded import Recorded, recorded
from costmodel.replay_report import markdown, plot
from costmodel.sessions import usable
from profiles.atomic import replacing, require_writable
from profiles.errors import DataError, UserError
from profiles.interrupt import interruptible

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
MIN_BATCH, MAX_SHARE = 8, 0.12
GOAL = 0.01
"""The expected regret at which guided measuring stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """After `num_measured` measurements of a model's candidates (`share` of them), and `seconds` of GPU and compiler.

    `expected_regret` is what the strategy itself thinks its mean regret is; None without a model.
    """

    strategy: str
    model: str
    num_launches: int
    num_measured: int
    share: float
    seconds: float
    regret_mean: float
    regret_p99: float
    expected_regret: float | None


Strategy = Callable[[Recorded, int, int], Iterator[tuple[Codes, Belief | None]]]
"""Given a model, a batch's size and a seed: yields what it has chosen to measure next, and what it believed before."""


def guided(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """The guide's own choice, from the other models' measurements."""
    yield from _guided(data, data.guide(batch))


def guided_without_profile(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """The guide's own choice, from the analytic core: no other model was ever measured on this GPU."""
    yield from _guided(data, data.guide(batch, with_base=False))


def _guided(data: Recorded, guide: Guide) -> Iterator[tuple[Codes, Belief | None]]:
    measured = np.zeros(len(data.latency_us), dtype=np.bool_)
    while True:
        belief = guide.believe(measured, np.where(measured, data.latency_us, np.nan))
        rows = guide.next(belief)
        yield rows, belief
        if not len(rows):
            return
        measured[rows] = True


def random_with_model(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """All rows, by lot; the model chooses in the end."""
    guide, measured = data.guide(batch), np.zeros(len(data.latency_us), dtype=np.bool_)
    for rows, _ in random_order(data, batch, seed):
        yield rows, guide.believe(measured, np.where(measured, data.latency_us, np.nan))
        measured[rows] = True


def random_order(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """All rows, by lot."""
    rows = np.random.default_rng(seed).permutation(len(data.latency_us))
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch], None


def grid(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """Evenly spaced rows of the table, finer and finer."""
    bits = int(np.ceil(np.log2(max(2, len(data.latency_us)))))
    reversed_bits = np.asarray([int(f"{row:0{bits}b}"[::-1], 2) for row in range(1 << bits)])
    rows = reversed_bits[reversed_bits < len(data.latency_us)]
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch], None


def tpe(data: Recorded, batch: int, seed: int) -> Iterator[tuple[Codes, Belief | None]]:
    """Optuna's TPE, a study a launch, each asked in turn."""
    import optuna  # `main` has said so where it is missing

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    launches = data.candidates.launches
    order = np.random.default_rng(seed).permutation(np.unique(launches))
    rows_of = {launch: np.flatnonzero(launches == launch) for launch in order}
    studies = {
        launch: optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed + int(launch))) for launch in order
    }
    asked: list[int] = []
    for _ in range(max(len(rows) for rows in rows_of.values())):
        for launch in order:
            trial = studies[launch].ask()
            row = int(rows_of[launch][trial.suggest_categorical("config", list(range(len(rows_of[launch]))))])
            studies[launch].tell(trial, float(data.latency_us[row]))
            asked.append(row)
            if len(asked) == batch:
                yield np.asarray(asked, dtype=np.intp), None
                asked = []
    yield np.asarray(asked, dtype=np.intp), None


STRATEGIES: dict[str, Strategy] = {
    "guided": guided,
    "guided, no profile": guided_without_profile,
    "random, with the model": random_with_model,
    "random": random_order,
    "grid": grid,
    "TPE (Optuna)": tpe,
}


def replay(
    data: Recorded, name: str, *, batch: int | None = None, max_share: float = MAX_SHARE, seed: int = 0
) -> list[Point]:
    """The curve of a strategy over one model: a point before each batch, until a share of all rows is measured.

    `batch`: measurements between two decisions; None: 1% of all, but no fewer than MIN_BATCH.
    """
    batch = max(MIN_BATCH, len(data.latency_us) // 100) if batch is None else batch
    guide = data.guide(batch)
    y, candidates, costs = data.latency_us, data.candidates, guide.costs
    core = np.log(candidates.features["latency_us"].to_numpy(dtype=np.float64))
    best = y[best_rows(y, candidates.launches)]
    measured, built = np.zeros(len(y), dtype=np.bool_), np.zeros(len(y), dtype=np.bool_)
    seconds, curve = 0.0, []
    for rows, belief in STRATEGIES[name](data, batch, seed):
        log_us = belief.log_us if belief else _best_measured(candidates, measured, y, core)
        regret = y[best_rows(log_us, candidates.launches)] / best - 1.0
        curve.append(
            Point(
                strategy=name,
                model=data.name,
                num_launches=len(best),
                num_measured=int(measured.sum()),
                share=float(measured.mean()),
                seconds=seconds,
                regret_mean=float(regret.mean()),
                regret_p99=float(np.quantile(regret, 0.99)),
                expected_regret=guide.expected_regret(belief) if belief else None,
            )
        )
        new = np.unique(rows[~measured[rows]])
        if measured.mean() >= max_share or not len(rows):
            break
        seconds += costs.of(candidates, new, built)
        measured[new] = True
        built = np.isin(candidates.kernels, candidates.kernels[measured])
    return curve


def _best_measured(candidates: Candidates, measured: Mask, latency_us: Array, core: Array) -> Array:
    """Log latencies for a choice without a model, [R]: measured rows first in launches where two or more were measured,
    elsewhere the core's.
    """
    counts = np.bincount(candidates.launches, weights=measured)[candidates.launches]
    return np.where(measured & (counts >= 2), np.log(latency_us) - 100.0, core)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not 0 < arguments.max_share <= 1:
        parser.error(f"--max-share {arguments.max_share}: a share above 0 and at most 1 is needed")
    try:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("replay compares with Optuna's TPE, not installed here: pip install 'bitile[allocator]'")
        rows = usable(read_profiles(arguments.profile))
        require_writable(arguments.out)
        models = recorded(rows, seed=arguments.seed)
        curves: list[Point] = []
        for name in STRATEGIES:
            for data in models:
                print(f"{name}: {data.name}, {len(data.candidates)} candidates", file=sys.stderr)
                curves += replay(data, name, batch=arguments.batch, max_share=arguments.max_share, seed=arguments.seed)
        exhaustive = {each.name: _exhaustive_seconds(each) for each in models}
        checks = worth_check.check(rows, seed=arguments.seed)
        text = f"{markdown(curves, exhaustive, goal=GOAL)}\n\n{worth_check.markdown(checks)}"
        body = {
            "exhaustive_seconds": exhaustive,
            "points": [asdict(point) for point in curves],
            "worth": [asdict(each) for each in checks],
        }
        _write(arguments.out, curves, body, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _exhaustive_seconds(data: Recorded) -> float:
    every = np.arange(len(data.candidates), dtype=np.intp)
    return data.guide(1).costs.of(data.candidates, every, np.zeros(len(every), dtype=np.bool_))


def _write(folder: Path, curves: Sequence[Point], body: Mapping[str, object], text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "replay.json") as temporary:
            temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        with replacing(folder / "replay.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        with replacing(folder / "replay.png") as temporary:
            plot(curves, temporary)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m costmodel.replay", description="Replay tuning over a profile.")
    parser.add_argument("--profile", type=Path, nargs="+", required=True, metavar="FILE", help="profiles (Parquet)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the curves: replay.json, .md and .png"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"measurements between two decisions (default 1%%, at least {MIN_BATCH})"
    )
    parser.add_argument(
        "--max-share", type=float, default=MAX_SHARE, help=f"of all rows, to measure at most (default {MAX_SHARE})"
    )
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
