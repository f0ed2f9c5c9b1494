"""How wrong a latency model is on launches of groups that it has never seen.

For each kind of group (shape, model, load, ...) the groups are held out in turn, a fold of them at a time; every row is
predicted once, by a model that saw no row of its group. From these predictions come the errors, the intervals'
coverage, and the regret: how much slower than the best measured configuration the one is that the model picks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import GroupKFold

from costmodel import features, matmul_heuristics
from costmodel.baselines import AnalyticCore, Dummy, RawBoosting, Roofline, SlopeTimesTiles
from costmodel.conformal import Conformal
from costmodel.groups import Codes, HeldOut, Labels, group_labels, launch_ids
from costmodel.matmul_heuristics import NvMatmulHeuristics
from costmodel.model import LatencyModel
from costmodel.regret import regrets
from costmodel.sessions import NoiseFloor, noise_floor, usable
from profiles.errors import DataError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
MODEL = "LatencyModel"
COVERAGE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Of one estimator on one kind of held-out group, over `num_rows` rows in `num_groups` groups.

    Errors and regrets are fractions (0.03 is 3%). `coverage_90` and `interval_width` (upper over lower, less 1, median)
    are of LatencyModel's own intervals and of `fold_intervals` for baselines, None without any; regrets are None where
    no launch has two configurations. `regret_top4_mean` is what is left after measuring the best four.
    """

    num_rows: int
    num_groups: int
    num_launches: int
    mean_ape: float
    median_ape: float
    coverage_90: float | None
    interval_width: float | None
    regret_mean: float | None
    regret_p99: float | None
    regret_top4_mean: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutResult:
    """One kind of group: each row's label (None: not tested), each estimator's predictions [R] in microseconds (NaN
    where not tested), LatencyModel's interval [R, 2], and the metrics.
    """

    labels: Labels
    predictions: Mapping[str, Array]
    interval_us: Array
    metrics: Mapping[str, Metrics]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`skipped` says why a kind of group could not be held out."""

    gpu: str
    profile: pd.DataFrame
    latency_us: Array
    features: pd.DataFrame
    results: Mapping[HeldOut, HeldOutResult]
    skipped: Mapping[HeldOut, str]
    noise: NoiseFloor


def estimators(gpu: str | None = None) -> dict[str, Callable[[], Any]]:
    """LatencyModel and its baselines, by name; nvMatmulHeuristics where it is installed and knows `gpu`."""
    known = gpu is not None and matmul_heuristics.why_not(gpu) is None
    return {
        MODEL: lambda: LatencyModel(coverage=COVERAGE),
        "analytic core": AnalyticCore,
        "gradient boosting, raw": RawBoosting,
        "slope x tiles (MxMoE)": SlopeTimesTiles,
        "roofline": Roofline,
        "dummy": Dummy,
        **({"nvMatmulHeuristics": lambda: NvMatmulHeuristics(gpu=str(gpu))} if known else {}),
    }


def evaluate(
    profile: pd.DataFrame,
    *,
    kinds: Sequence[HeldOut] = tuple(HeldOut),
    make: Mapping[str, Callable[[], Any]] | None = None,
    num_folds: int = 5,
    told: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Grouped cross-validation over a profile's `sessions.usable` rows. `told` hears what is being held out.

    Raises:
        DataError: too few rows or groups for any kind.
    """
    rows = usable(profile)
    X, y = features.of_profile(rows), rows["latency_us"].to_numpy(dtype=np.float64)
    launches = launch_ids(rows)
    factories = make or estimators(str(rows["gpu"].iloc[0]))
    results, skipped = {}, {}
    for kind in kinds:
        labels = group_labels(rows, kind)
        groups = pd.unique(labels[_tested(labels)])
        if len(groups) < 2:
            skipped[kind] = f"{len(groups)} groups: at least 2 are needed"
            continue
        told(f"{kind.value}: {len(groups)} groups, {int(_tested(labels).sum())} rows")
        results[kind] = _hold_out(kind, rows, X, y, labels, launches, factories, num_folds)
    if not results:
        raise DataError("no kind of group can be held out: " + "; ".join(f"{k.value}: {v}" for k, v in skipped.items()))
    return Evaluation(
        gpu=str(rows["gpu"].iloc[0]),
        profile=rows,
        latency_us=y,
        features=X,
        results=results,
        skipped=skipped,
        noise=noise_floor(profile),
    )


def _tested(labels: Labels) -> Mask:
    return np.asarray([label is not None for label in labels], dtype=np.bool_)


def _hold_out(
    kind: HeldOut,
    rows: pd.DataFrame,
    X: pd.DataFrame,
    y: Array,
    labels: Labels,
    launches: Codes,
    make: Mapping[str, Callable[[], Any]],
    num_folds: int,
) -> HeldOutResult:
    tested = np.flatnonzero(_tested(labels))
    groups = labels[tested].astype(str)
    shapes = group_labels(rows, HeldOut.SHAPE)
    # Rows without a group of this kind are calibrated on by shape.
    calibration = np.where(_tested(labels), labels, shapes).astype(str)
    predictions = {name: np.full(len(y), np.nan) for name in make}
    interval = np.full((len(y), 2), np.nan)
    fold_of = np.full(len(y), -1)
    for fold, (_, part) in enumerate(GroupKFold(min(num_folds, len(np.unique(groups)))).split(tested, groups=groups)):
        held_out = tested[part]
        fold_of[held_out] = fold
        seen = ~_leaks(kind, rows, labels, held_out)
        for name, factory in make.items():
            estimator = factory().fit(X[seen], y[seen], groups=_several(calibration[seen], shapes[seen]))
            if isinstance(estimator, LatencyModel):
                predicted, lower, upper = estimator.predict(X.iloc[held_out], return_interval=True)
                predictions[name][held_out] = predicted
                interval[held_out] = np.stack([lower, upper], axis=1)
            else:
                asked = held_out[estimator.applies(X.iloc[held_out])] if hasattr(estimator, "applies") else held_out
                predictions[name][asked] = estimator.predict(X.iloc[asked]) if len(asked) else np.empty(0)
    # A baseline that applies to none of these rows has nothing to be judged by.
    predictions = {name: each for name, each in predictions.items() if bool(np.isfinite(each).any())}
    metrics = {
        name: measure(y[tested], predicted[tested], launches[tested], len(np.unique(groups)),
                      (interval if name == MODEL else fold_intervals(y, predicted, fold_of))[tested])
        for name, predicted in predictions.items()
    }  # fmt: skip
    return HeldOutResult(labels=labels, predictions=predictions, interval_us=interval, metrics=metrics)


def _several(*choices: Labels) -> Labels | None:
    """The first labels with at least two groups; None: rows are held out one by one."""
    return next((each.astype(str) for each in choices if len(set(each)) > 1), None)


def _leaks(kind: HeldOut, rows: pd.DataFrame, labels: Labels, held_out: npt.NDArray[np.intp]) -> Mask:
    """Rows that may not be learned from: the groups held out, and mixes that contain a scheme held out."""
    unseen = set(labels[held_out])
    leaks = np.isin(labels.astype(str), list(unseen)) & _tested(labels)
    if kind is HeldOut.SCHEME:
        leaks |= rows["schemes"].map(lambda names: not unseen.isdisjoint(names)).to_numpy()
    return np.asarray(leaks, dtype=np.bool_)


def fold_intervals(y: Array, predicted: Array, fold_of: Codes) -> Array:
    """90% intervals [R, 2] of an estimator that has none: as far as its errors on the other folds reach, of which it
    had not seen a row either. `fold_of` [R]: -1 where not tested. NaN where no other fold was predicted.
    """
    errors, intervals = np.abs(np.log(predicted / y)), np.full((len(y), 2), np.nan)
    there = np.isfinite(errors) & (fold_of >= 0)
    for fold in np.unique(fold_of[there]):
        others, own = errors[there & (fold_of != fold)], np.flatnonzero(there & (fold_of == fold))
        if len(others):
            one_regime = np.zeros(len(others), dtype=np.int64)
            reach = Conformal.fit(others, one_regime).quantile(one_regime[:1], COVERAGE)[0]
            intervals[own] = predicted[own, None] * np.exp([-reach, reach])
    return intervals


def measure(y: Array, predicted: Array, launches: Codes, num_groups: int, interval: Array | None) -> Metrics:
    """Metrics of predictions [R] (NaN: none, such rows do not count) against measurements [R]; `launches` as
    `launch_ids`, `interval` [R, 2] or None.
    """
    there = np.isfinite(predicted)
    y, predicted, launches = y[there], predicted[there], launches[there]
    interval = None if interval is None or not np.isfinite(interval[there]).all() else interval[there]
    error = np.abs(predicted / y - 1.0)
    first, best_of_top = regrets(y, predicted, launches)
    covered = None if interval is None else float(((interval[:, 0] <= y) & (y <= interval[:, 1])).mean())
    width = None if interval is None else float(np.median(interval[:, 1] / interval[:, 0] - 1.0))
    return Metrics(
        num_rows=len(y),
        num_groups=num_groups,
        num_launches=len(np.unique(launches)),
        mean_ape=float(error.mean()),
        median_ape=float(np.median(error)),
        coverage_90=covered,
        interval_width=width,
        regret_mean=float(first.mean()) if len(first) else None,
        regret_p99=float(np.quantile(first, 0.99)) if len(first) else None,
        regret_top4_mean=float(best_of_top.mean()) if len(first) else None,
    )
