"""Which candidates to measure next, so that little GPU time finds nearly the best configuration of every launch.

A candidate is worth measuring when it may beat what its launch has now (promise), or when the model knows little about
it (uncertainty); the worth is counted per second, and a kernel that is not built yet costs its compilation too. After
each batch the model is fitted again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

from costmodel.model import LatencyModel
from profiles.errors import SpecError

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_MIN_ROWS_TO_LEARN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Launches times configurations.

    Attributes:
        features: of `costmodel.features`, R rows.
        launches: int64 [R], a number per launch; rows with the same one compete (`evaluation.launch_ids`).
        kernels: int64 [R], a number per kernel; rows with the same one need one compilation.
    """

    features: pd.DataFrame
    launches: Codes
    kernels: Codes

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.launches) == len(self.kernels):
            raise SpecError(
                f"candidates: {len(self.features)} rows of features, {len(self.launches)} launches,"
                f" {len(self.kernels)} kernels; they must be as many"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How candidates are chosen. `curiosity` weighs one log unit of uncertainty against one of expected gain."""

    batch: int = 16
    curiosity: float = 0.1
    measure_seconds: float = 0.05
    compile_seconds: float = 0.5
    num_trees: int = 80
    seed: int = 0

    def first(self, candidates: Candidates) -> Codes:
        """Rows [batch] to begin with, before anything is known: by the core's pick of launches that are spread over
        size and precision.
        """
        core = candidates.features["latency_us"].to_numpy(dtype=np.float64)
        picks = best_rows(np.log(core), candidates.launches)
        spread = candidates.features.iloc[picks]
        order = np.lexsort((spread["latency_us"], spread["weight_bits"], spread["is_wgmma"]))
        at = np.unique(np.linspace(0, len(picks) - 1, self.batch).round().astype(np.intp))
        return np.asarray(picks[order][at], dtype=np.int64)

    def next(self, candidates: Candidates, measured: Mask, latency_us: Array) -> Codes:
        """The next rows, at most `batch`, best first, none measured and one a launch; empty when nothing is left.

        `measured` [R]; `latency_us` [R] where measured (NaN: it failed, and is not to be tried again).
        """
        if not measured.any():
            return self.first(candidates)
        log_us, std = self.estimate(candidates, measured, latency_us)
        worth = self._gain(candidates, measured, log_us, std) + self.curiosity * std
        built = np.isin(candidates.kernels, candidates.kernels[measured])
        worth = worth / (self.measure_seconds + np.where(built, 0.0, self.compile_seconds))
        order = np.argsort(-np.where(measured, -np.inf, worth), kind="stable")
        chosen: list[int] = []
        taken: Counter[int] = Counter()
        for row in order[: int((~measured).sum())]:
            launch = int(candidates.launches[row])
            if not taken[launch]:
                chosen.append(int(row))
                taken[launch] += 1
            if len(chosen) == self.batch:
                break
        return np.asarray(chosen, dtype=np.int64)

    def estimate(self, candidates: Candidates, measured: Mask, latency_us: Array) -> tuple[Array, Array]:
        """Log latency [R], measured where it was, and its standard deviation [R], 0 there."""
        X = candidates.features
        known = measured & np.isfinite(latency_us)
        log_us = np.log(X["latency_us"].to_numpy(dtype=np.float64))
        std = np.full(len(X), 0.2)  # the core's error on an H200
        if known.sum() >= _MIN_ROWS_TO_LEARN:
            model = LatencyModel(num_trees=self.num_trees, num_folds=3, random_state=self.seed)
            model.fit(X[known], latency_us[known])
            predicted, _, upper = model.predict(X, return_interval=True)
            log_us = np.log(predicted)
            std = np.log(upper / predicted) / norm.ppf(0.5 + model.coverage / 2)
        log_us = np.where(known, np.log(np.where(known, latency_us, 1.0)), log_us)
        log_us = np.where(measured & ~known, np.inf, log_us)
        return np.asarray(log_us), np.asarray(np.where(measured, 0.0, std))

    def _gain(self, candidates: Candidates, measured: Mask, log_us: Array, std: Array) -> Array:
        """Expected improvement [R], in log units, on the rival: the launch's best so far, or for the predicted best
        itself the second best.
        """
        order = np.lexsort((log_us, candidates.launches))
        launches = candidates.launches[order]
        is_first = np.r_[True, np.diff(launches) != 0]
        best = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        second = np.minimum(best + 1, len(order) - 1)
        rival = np.where(is_first & (launches[second] == launches), order[second], order[best])
        rivals = np.empty(len(order), dtype=np.intp)
        rivals[order] = rival
        spread = np.maximum(np.hypot(std, std[rivals]), 1e-9)
        finite = np.isfinite(log_us) & np.isfinite(log_us[rivals])
        distance = np.subtract(log_us[rivals], log_us, where=finite, out=np.zeros(len(log_us))) / spread
        gain = spread * (distance * norm.cdf(distance) + norm.pdf(distance))
        return np.asarray(np.where(measured, 0.0, gain), dtype=np.float64)


def best_rows(log_us: Array, launches: Codes) -> Codes:
    """The row of the least value in each launch, in the launches' order."""
    order = np.lexsort((log_us, launches))
    return np.asarray(order[np.r_[True, np.diff(launches[order]) != 0]], dtype=np.int64)


def worth_tuning(candidates: Candidates, policy: Policy, measured: Mask, latency_us: Array) -> tuple[float, float]:
    """Before more is measured: how much faster the best configurations are expected to be than the core's picks, mean
    over launches as a fraction, and its standard deviation from the model's uncertainty.
    """
    log_us, std = policy.estimate(candidates, measured, latency_us)
    default = best_rows(np.log(candidates.features["latency_us"].to_numpy(dtype=np.float64)), candidates.launches)
    best = best_rows(log_us, candidates.launches)
    differs = default != best
    gain = 1.0 - np.exp(np.minimum(log_us[best] - log_us[default], 0.0))
    spread = np.where(differs, np.hypot(std[best], std[default]), 0.0)
    return float(gain.mean()), float(np.sqrt(np.square(spread).mean() / max(1, len(spread))))
