"""`python -m costmodel.drift_check`: how well re-calibration from few launches finds changes, on a recorded profile.

Changes are made up by pricing each launch with the analytic core on a card that need not exist (a lower clock, less
bandwidth), or by slowing one scheme; what re-calibration learns has another core, whose factors were fitted. The noise
between two measurements is drawn from repeats of the same launches, where a second profile is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.fit import fit, read_profiles
from costmodel.groups import launch_ids
from costmodel.kernel_use import of_rows
from costmodel.model_file import FittedModel
from costmodel.recalibration import ENOUGH_ROWS, recalibrate
from costmodel.recheck import choose
from costmodel.sessions import usable
from profiles.atomic import replacing, require_writable
from profiles.errors import DataError, UserError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.interrupt import interruptible

Array = npt.NDArray[np.float64]
_DEGREES, _SCALE = 2.0, 0.007
"""Of Student's t, the noise without repeats: as of one H200's launches measured again (2026-11-24)."""
_NUM_UNCHANGED = 50
"""Trials without a change, to count false alarms."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One kind of change, tried several times: how often it was named, how often another drift was named (too), the
    factors found for it, and mean errors of all other launches before and after, fractions.
    """

    change: str
    num_trials: int
    num_named: int
    num_with_more: int
    factors: tuple[float, ...]
    error_before: float
    error_after: float
    coverage_after: float


def changes(rows: pd.DataFrame) -> dict[str, tuple[str, Array]]:
    """Changes by what they are: the explanation's name that should be found, and each row's factor."""
    gpu = find_gpu(str(rows["gpu"].iloc[0]))
    slow = dataclasses.replace(
        gpu,
        boost_clock_mhz=0.9 * gpu.boost_clock_mhz,
        tensor_tops={math: 0.9 * rate for math, rate in gpu.tensor_tops.items()},
    )
    thin = dataclasses.replace(gpu, dram_gbps=0.85 * gpu.dram_gbps)
    today = _core_us(gpu, rows)
    pure = rows["schemes"].map(lambda names: names[0] if len(set(names)) == 1 else "")
    scheme = str(pure[pure != ""].value_counts().index[-1])
    slower = np.where(pure == scheme, 1.2, 1.0)
    return {
        "nothing": ("", np.ones(len(rows))),
        "clock 10% lower": ("SM clock", _core_us(slow, rows) / today),
        "bandwidth 15% lower": ("DRAM bandwidth", _core_us(thin, rows) / today),
        f"{scheme} 20% slower": (f"scheme {scheme}", slower),
    }


def _core_us(gpu: GpuSpec, rows: pd.DataFrame) -> Array:
    uses, loads, use_of, load_of = of_rows(rows, {})
    X = features.as_frame(features.matrix(gpu, uses, loads, use_of, load_of))
    return X["latency_us"].to_numpy(dtype=np.float64)


def try_change(
    change: str, name: str, factors: Array, rows: pd.DataFrame, base: FittedModel, noise: Array, num_trials: int
) -> Trial:
    """The change, with noise drawn anew each time, found from ENOUGH_ROWS launches among a random half of the rows."""
    X = features.of_profile(rows)
    named, more, found_factors, before, after, coverage = 0, 0, [], [], [], []
    for seed in range(num_trials):
        rng = np.random.default_rng(seed)
        y = rows["latency_us"].to_numpy(dtype=np.float64) * factors * np.exp(rng.choice(noise, len(rows)))
        half = np.sort(rng.permutation(len(rows))[: len(rows) // 2])
        now = rows.assign(latency_us=y, row=np.arange(len(rows))).iloc[half].reset_index(drop=True)
        some = choose(now, ENOUGH_ROWS)
        found = recalibrate(base, some, rows, seed=seed)
        drifts = [effect for effect in found.effects if effect.is_drift]
        is_named = bool(drifts) and drifts[0].explanation.name == name
        named += is_named
        more += len(drifts) > is_named
        found_factors += [drifts[0].factor] if is_named else []
        rest = np.setdiff1d(np.arange(len(rows)), some["row"])
        predicted, lower, upper = found.fitted.model.predict(X.iloc[rest], return_interval=True)
        before.append(np.abs(base.model.predict(X.iloc[rest]) / y[rest] - 1.0).mean())
        after.append(np.abs(predicted / y[rest] - 1.0).mean())
        coverage.append(((lower <= y[rest]) & (y[rest] <= upper)).mean())
    return Trial(
        change=change,
        num_trials=num_trials,
        num_named=named,
        num_with_more=more,
        factors=tuple(found_factors),
        error_before=float(np.mean(before)),
        error_after=float(np.mean(after)),
        coverage_after=float(np.mean(coverage)),
    )


def noise_of(rows: pd.DataFrame, repeats: pd.DataFrame | None) -> Array:
    """Log ratios of launches measured again, around their median; without repeats, drawn. DataError for
    repeats of other launches.
    """
    if repeats is None:
        return np.asarray(_SCALE * np.random.default_rng(0).standard_t(_DEGREES, 1000))
    both = pd.concat([rows, repeats], ignore_index=True)
    both = both.assign(launch=launch_ids(both))[["launch", "config", "latency_us"]]
    pairs = both.iloc[: len(rows)].merge(both.iloc[len(rows) :], on=["launch", "config"], suffixes=("", "_again"))
    if pairs.empty:
        raise DataError("no launch of the repeats is among the profile's")
    ratios = np.log(pairs["latency_us_again"].to_numpy() / pairs["latency_us"].to_numpy())
    return np.asarray(ratios - np.median(ratios), dtype=np.float64)


def check(rows: pd.DataFrame, repeats: pd.DataFrame | None, num_trials: int) -> list[Trial]:
    """Every change, `num_trials` times."""
    base, noise = fit(rows), noise_of(rows, repeats)
    return [
        try_change(change, name, factors, rows, base, noise, num_trials if name else max(num_trials, _NUM_UNCHANGED))
        for change, (name, factors) in changes(rows).items()
    ]


def real(rows: pd.DataFrame, repeats: pd.DataFrame) -> str:
    """What 50 of the real repeats say, in a sentence."""
    base = fit(rows)
    some = choose(repeats, ENOUGH_ROWS)
    found = recalibrate(base, some, rows)
    said = "; ".join(str(effect) for effect in found.effects) or "no drift"
    return (
        f"Real repeats, {found.num_rows} of {len(repeats)} launches ({found.num_paired} recorded before): {said}."
        f" Mean error on them {100 * found.error_before:.1f}%, re-calibrated {100 * found.error_after:.1f}%."
    )


def markdown(trials: Sequence[Trial]) -> str:
    """A table."""
    lines = [
        "| change | named | something else named too | factor found | error before | after | 90% interval covers |",
        "|---" * 7 + "|",
    ]
    for each in trials:
        factor = "-"
        if each.factors:
            factor = f"{np.mean(each.factors):.3f} ({min(each.factors):.3f} to {max(each.factors):.3f})"
        named = f"{each.num_named} of {each.num_trials}" if each.change != "nothing" else "-"
        lines.append(
            f"| {each.change} | {named} | {each.num_with_more} of {each.num_trials} | {factor}"
            f" | {100 * each.error_before:.1f}% | {100 * each.error_after:.1f}% | {100 * each.coverage_after:.0f}% |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, told: Callable[[str], None] = print) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        rows = usable(read_profiles(arguments.profile))
        repeats = usable(read_profiles(arguments.repeats)) if arguments.repeats else None
        require_writable(arguments.out)
        trials = check(rows, repeats, arguments.trials)
        text = markdown(trials) + ("" if repeats is None else f"\n\n{real(rows, repeats)}")
        body = json.dumps([dataclasses.asdict(each) for each in trials], indent=1)
        _write(arguments.out, {"drift.json": body, "drift.md": text})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told(text)
    return 0


def _write(folder: Path, contents: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m costmodel.drift_check", description="Try re-calibration on made-up changes of a profile."
    )
    parser.add_argument("--profile", type=Path, nargs="+", required=True, metavar="FILE", help="profiles (Parquet)")
    parser.add_argument("--repeats", type=Path, nargs="+", metavar="FILE", help="the same launches, measured again")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of drift.md and drift.json")
    parser.add_argument("--trials", type=int, default=10, help="of each change (default 10)")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
