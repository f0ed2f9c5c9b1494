"""The analytic core with its resources' speeds learned: one factor on each part's time, per kernel family.

The core's numbers are a data sheet's or a guess; a part that a kernel runs at 80% of its assumed speed is off by the
same factor on every shape. With non-negative factors the calibrated core still never falls when tokens are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from costmodel.features import CORE, INDEX, PARTS

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
FACTORS = CORE[1:]
"""What has a factor: the core's parts; its first column is their sum as the core has it."""
_ERROR_SCALE = 0.1
"""Relative errors well above 10% count linearly, not squared: a few odd rows do not bend a physical factor."""
_PRIOR_SCALE = 1.0
"""A factor of e is one standard deviation away from the core's own number."""
_PRIOR_ROWS = 3.0
_MAX_ROWS = 4000
_FAMILIES = 2
ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedCore:
    """`factors` float64 [2, len(FACTORS)]: of the mma family and of the wgmma family; 1 leaves the core as it is."""

    factors: Array

    @classmethod
    def fit(cls, X: Matrix, log_us: Array, *, seed: int) -> CalibratedCore:
        """Least squares on the log of the latency over each family's rows, at most a few thousand of them."""
        rng = np.random.default_rng(seed)
        factors = np.ones((_FAMILIES, len(FACTORS)))
        for family in range(_FAMILIES):
            rows = np.flatnonzero(X[:, INDEX["is_wgmma"]] == family)
            if len(rows):
                rows = rng.choice(rows, min(len(rows), _MAX_ROWS), replace=False)
                factors[family] = _fitted(X[rows].astype(np.float64), log_us[rows])
        return cls(factors=factors)

    def log_us(self, X: Matrix) -> Array:
        """Log of the calibrated latency in microseconds, [R]."""
        out = np.empty(len(X))
        for start in range(0, len(X), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            family = X[rows, INDEX["is_wgmma"]].astype(np.intp)
            out[rows] = np.log(_latency_us(X[rows], self.factors[family]))
        return out


def _fitted(X: Array, log_us: Array) -> Array:
    prior = np.sqrt(_PRIOR_ROWS) / _PRIOR_SCALE

    def residuals(log_factors: Array) -> Array:
        errors = (np.log(_latency_us(X, np.exp(log_factors)[None, :])) - log_us) / _ERROR_SCALE
        robust = np.sign(errors) * np.sqrt(2.0 * (np.sqrt(1.0 + np.square(errors)) - 1.0))
        return np.concatenate([robust, prior * log_factors])

    start = np.zeros(len(FACTORS))
    found = least_squares(residuals, start, bounds=(-4.0, 4.0), max_nfev=30)
    return np.asarray(np.exp(found.x), dtype=np.float64)


def _latency_us(X: npt.NDArray[np.floating], factors: Array) -> Array:
    """The core's formula: floor + fill + || makespan, DRAM ||, makespan = || parts || + epilogue, 4-norms.

    `factors` is [R, len(FACTORS)], or [1, len(FACTORS)] for all rows.
    """

    def part(name: str) -> Array:
        return np.asarray(X[:, INDEX[name]] * factors[:, FACTORS.index(name)], dtype=np.float64)

    makespan = _norm([part(name) for name in PARTS if name != "epilogue_us"]) + part("epilogue_us")
    return part("launch_us") + part("fill_us") + _norm([makespan, part("dram_us")])


def _norm(parts: list[Array]) -> Array:
    total = np.zeros_like(parts[0])
    for each in parts:
        total += np.square(np.square(each))
    return np.asarray(np.sqrt(np.sqrt(total)), dtype=np.float64)
