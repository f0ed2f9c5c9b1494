"""Measurements of several sessions (hours, days, machines) as one table.

* Rows of a kernel family's earlier sources are dropped where those were not as fast: what the family did before says
  nothing of the kernels that exist.
* A session's clock is set against the others' by the launches that both measured: its rows are divided by the median
  ratio, if there are enough of them. Launches that no other session measured keep their times.
* What was measured more than once becomes one row, its times the geometric means.

What repeats differ by is the noise floor: no model can be nearer to one measurement than the next one is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.groups import launch_ids
from costmodel.regret import regrets
from profiles.errors import DataError
from profiles.records import Source, Status

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
SESSION_GAP = pd.Timedelta(minutes=10)
"""A longer pause between two measurements starts another session."""
MIN_SHARED = 30
"""Launches that a session must share with others before its clock is set by them: the median of so many is known to
about a fifth of one measurement's noise.
"""
SAME_KERNEL, MIN_COMPARED = 0.015, 5
"""Two sources give the same kernels if half of at least so many launches that both ran differ by less. Same kernels two
hours apart, H200, 2026-11-24: 0.0067.
"""
MACHINE_CODE = "machine_code"
"""Under which a row's `versions` may name the kernel's instructions: two builds with the same name are the same."""
_TIMES = ["latency_us", "p20_us", "p80_us"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """What no model can beat. `within_run`: half of p80 - p20 over the median, mean over rows. The rest is from
    launches measured in two runs, the clocks as they were: absolute relative differences, and what the best
    configuration of one run loses in the other; None without repeats.
    """

    within_run: float | None
    num_repeats: int
    between_runs_mean: float | None
    between_runs_median: float | None
    between_runs_p90: float | None
    between_runs_regret_mean: float | None
    between_runs_regret_p99: float | None


def finished(profile: pd.DataFrame) -> pd.DataFrame:
    """The finished measurements of a profile, oldest first; predictions if it has nothing else.

    Raises:
        DataError: nothing is left, or rows of several GPUs.
    """
    done = profile[(profile["status"] == Status.OK.value) & profile["latency_us"].notna()]
    measured = done[done["source"] == Source.MEASURED.value]
    rows = measured if len(measured) else done
    if rows.empty:
        raise DataError("the profile has no finished row to learn from")
    if rows["gpu"].nunique() > 1:
        raise DataError(f"the profile's rows are of several GPUs ({', '.join(sorted(rows['gpu'].unique()))}); pass one")
    return rows.sort_values("timestamp", kind="stable").reset_index(drop=True)


def usable(profile: pd.DataFrame) -> pd.DataFrame:
    """What a model learns from and is judged by: `finished` rows of the present kernels, one a candidate, clocks set.

    Raises:
        DataError: as `finished`.
    """
    rows = of_present_kernels(finished(profile))
    times = rows[_TIMES].astype(float).div(clock_factors(rows), axis=0).map(np.log)
    ids = candidate_ids(rows)
    means = times.groupby(ids).transform("mean").map(np.exp)
    return rows.assign(**{name: means[name] for name in _TIMES})[~pd.Series(ids).duplicated()].reset_index(drop=True)


def of_present_kernels(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of a family from sessions before its newest sources, unless these were as fast. `rows`: oldest
    first.

    A fingerprint covers a kernel's sources and its configuration, so that sources are told apart by kernels that were
    measured from two of them, and compared by the launches that both ran. A change that changes no time, a comment
    say, drops nothing; nor does one that leaves the machine code as it was, where rows say so (`MACHINE_CODE`).
    """
    if "kernel_fingerprint" not in rows:
        return rows
    family = rows["config"].str.partition("_")[0]
    kernel = rows.groupby([rows["config"], rows["schemes"].map(lambda names: " ".join(sorted(set(names))))]).ngroup()
    sessions = pd.Series(session_codes(rows))
    is_newest = sessions == sessions.groupby(kernel).transform("max")
    # One session may have several builds of a kernel, for more experts say: none replaces the other.
    builds = kernel.astype(str) + _code_of(rows)
    replaced = ~builds.isin(builds[is_newest])
    logs, ids = rows["latency_us"].astype(float).map(np.log), candidate_ids(rows)
    change = logs - logs[~replaced].groupby(ids[~replaced]).mean().reindex(ids).to_numpy()
    kept = pd.Series(data=True, index=rows.index)
    was_replaced = replaced.groupby(kernel).transform("any")
    for each in family[replaced].unique():
        shared = change[replaced & (family == each)].dropna().abs()
        if len(shared) < MIN_COMPARED or shared.median() > SAME_KERNEL:
            # Sources changed last after the last session that has a replaced kernel, unless it has its successor too.
            last_old = sessions[replaced & (family == each)].max()
            has_both = bool((was_replaced & ~replaced & (family == each) & (sessions == last_old)).any())
            kept &= (family != each) | ((sessions >= last_old + (not has_both)) & ~replaced)
    return rows[kept].reset_index(drop=True)


def _code_of(rows: pd.DataFrame) -> pd.Series[str]:
    """What kernel ran: its machine code where a row says it, else the fingerprint of what it was made from."""
    sources = rows.get("kernel_fingerprint", pd.Series("", index=rows.index))
    if "versions" not in rows:
        return sources
    code = rows["versions"].map(lambda versions: dict(versions).get(MACHINE_CODE))
    return code.fillna(sources)


def session_codes(rows: pd.DataFrame) -> Codes:
    """A number from 0 per session. `rows`: oldest first."""
    pause = pd.to_datetime(rows["timestamp"], format="ISO8601").diff() > SESSION_GAP
    return np.asarray(pause.cumsum(), dtype=np.int64)


def candidate_ids(rows: pd.DataFrame) -> Codes:
    """A number per launch and configuration."""
    return np.asarray(rows.groupby([launch_ids(rows), rows["config"]], sort=False).ngroup(), dtype=np.int64)


def clock_factors(rows: pd.DataFrame) -> Array:
    """[R]: how much slower each row's session was than the others on what both measured; 1 where too little was."""
    sessions, ids = session_codes(rows), candidate_ids(rows)
    logs = pd.Series(np.log(rows["latency_us"].to_numpy(dtype=np.float64)))
    counts = pd.Series(sessions).groupby(ids).transform("nunique")
    shared = counts > 1
    factors = np.ones(len(rows))
    above = (logs - logs.groupby(ids).transform("mean"))[shared].groupby(sessions[shared])
    for session, ratios in above:
        if len(ratios) >= MIN_SHARED:
            factors[sessions == session] = np.exp(ratios.median())
    return factors


def noise_floor(profile: pd.DataFrame) -> NoiseFloor:
    """From the quantiles of the finished rows, and from candidates measured in two runs (the first two)."""
    rows = finished(profile)
    spread = ((rows["p80_us"] - rows["p20_us"]) / (2.0 * rows["latency_us"])).astype(float).dropna()
    pairs = _pairs(rows)
    difference = np.abs(pairs["again"] / pairs["once"] - 1.0).to_numpy()
    regret = regrets(pairs["once"].to_numpy(), pairs["again"].to_numpy(), pairs["launch"].to_numpy())[0]
    return NoiseFloor(
        within_run=float(spread.mean()) if len(spread) else None,
        num_repeats=len(pairs),
        between_runs_mean=float(difference.mean()) if len(pairs) else None,
        between_runs_median=float(np.median(difference)) if len(pairs) else None,
        between_runs_p90=float(np.quantile(difference, 0.9)) if len(pairs) else None,
        between_runs_regret_mean=float(regret.mean()) if len(regret) else None,
        between_runs_regret_p99=float(np.quantile(regret, 0.99)) if len(regret) else None,
    )


def _pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Candidates measured twice or more, which one run never does: columns launch, once, again (microseconds)."""
    each = pd.DataFrame({"launch": launch_ids(rows), "timestamp": rows["timestamp"]})
    each["candidate"] = rows.groupby([candidate_ids(rows), _code_of(rows)], sort=False).ngroup()
    each["latency_us"] = rows["latency_us"].to_numpy(dtype=np.float64)
    each = each.drop_duplicates(["candidate", "timestamp"])
    turn = each.groupby("candidate").cumcount()
    once, again = (each[turn == index].set_index("candidate") for index in range(2))
    both = once.join(again["latency_us"].rename("again"), how="inner")
    return both.rename(columns={"latency_us": "once"})[["launch", "once", "again"]]
