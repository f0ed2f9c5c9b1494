"""The analytic core with its resources' speeds learned: one factor on each part's time, per kernel family and math.

The core's numbers are a data sheet's or a guess; a part that a kernel runs at 80% of its assumed speed is off by the
same factor on every shape. With non-negative factors the calibrated core still never falls when tokens are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from costmodel.blocks import for_blocks
from costmodel.columns import CORE, INDEX, PARTS, STREAMING
from costmodel.rounds import Streaming, phased
from profiles.gpus import Math

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
FACTORS = CORE[1:]
"""What has a factor: the core's parts; its first column is their sum as the core has it."""
_ERROR_SCALE = 0.1
"""Relative errors well above 10% count linearly, not squared: a few odd rows do not bend a physical factor."""
_FAMILY_SCALE = 1.0
"""A family's factor of e is one standard deviation away from the core's own number."""
_MATH_SCALE = 0.3
"""The same of a math's factors, away from its family's."""
_PRIOR_ROWS = 3.0
_MAX_ROWS = 4000
_FAMILIES = 2
_SHARES = [INDEX[f"{math.value}_share"] for math in Math]
_PART_SQUARINGS, _ROUND_SQUARINGS, _DRAM_SQUARINGS = 1, 3, 2
"""Norms of 2 and 8: an SM's resources overlap less, and DRAM with all of them better, than the uncalibrated core's 4
has it. On one H200, mma family, 1424 launches of two models (2026-11-24), error on shapes held out: 5.7%, with 4 and 4
6.6%.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedCore:
    """`factors` float64 [2 families (mma, wgmma), maths, len(FACTORS)]; 1 leaves the core as it is.

    A launch of several maths takes the mean of their factors by share of experts, which does not depend on tokens.
    """

    factors: Array

    @classmethod
    def fit(cls, X: Matrix, log_us: Array, *, seed: int) -> CalibratedCore:
        """Least squares on the log of the latency: each family's factors, then each math's near its family's; on at
        most a few thousand rows of each. What was not measured keeps its family's, or 1.
        """
        rng = np.random.default_rng(seed)
        factors = np.ones((_FAMILIES, len(Math), len(FACTORS)))

        def fitted(rows: npt.NDArray[np.intp], near: Array, scale: float) -> Array:
            some = rng.choice(rows, min(len(rows), _MAX_ROWS), replace=False)
            return _fitted(X[some].astype(np.float64), log_us[some], near, scale)

        for family in range(_FAMILIES):
            rows = np.flatnonzero(X[:, INDEX["is_wgmma"]] == family)
            if not len(rows):
                continue
            factors[family] = fitted(rows, np.zeros(len(FACTORS)), _FAMILY_SCALE)
            for math, column in enumerate(_SHARES):
                of_math = rows[X[rows, column] == 1.0]
                if len(of_math):
                    factors[family, math] = fitted(of_math, np.log(factors[family, math]), _MATH_SCALE)
        return cls(factors=factors)

    def scaled(self, by: Mapping[str, float]) -> CalibratedCore:
        """With the factors of some of FACTORS multiplied."""
        ratios = np.asarray([by.get(name, 1.0) for name in FACTORS])
        return CalibratedCore(factors=self.factors * ratios)

    def log_us(self, X: Matrix) -> Array:
        """Log of the calibrated latency in microseconds, [R]."""
        out = np.empty(len(X))
        by_class = self.factors.reshape(-1, len(FACTORS)).astype(np.float32)

        def work(rows: slice) -> None:
            block = np.ascontiguousarray(X[rows].T).T
            shares = np.zeros((len(block), _FAMILIES, len(Math)), dtype=np.float32)
            shares[np.arange(len(block)), block[:, INDEX["is_wgmma"]].astype(np.intp)] = block[:, _SHARES]
            out[rows] = np.log(_latency_us(block, shares.reshape(len(block), -1) @ by_class))

        for_blocks(len(X), work)
        return out


def _fitted(X: Array, log_us: Array, near: Array, scale: float) -> Array:
    """Factors whose logs are near `near`, within a few `scale`."""
    weight = np.sqrt(_PRIOR_ROWS) / scale

    def residuals(log_factors: Array) -> Array:
        errors = (np.log(_latency_us(X, np.exp(log_factors)[None, :])) - log_us) / _ERROR_SCALE
        robust = np.sign(errors) * np.sqrt(2.0 * (np.sqrt(1.0 + np.square(errors)) - 1.0))
        return np.concatenate([robust, weight * (log_factors - near)])

    # MINPACK: the trust-region solver would spend most of the fit in singular value decompositions.
    found = least_squares(residuals, near, method="lm", max_nfev=400)
    return np.asarray(np.exp(found.x), dtype=np.float64)


def _latency_us(X: npt.NDArray[np.floating], factors: npt.NDArray[np.floating]) -> Array:
    """The core's formula: floor + fill + || makespan, DRAM ||, the makespan `phased` from rounds of || parts || +
    epilogue.

    `factors` is [R, len(FACTORS)], or [1, len(FACTORS)] for all rows.
    """

    def part(name: str) -> Array:
        return np.asarray(X[:, INDEX[name]] * factors[:, FACTORS.index(name)], dtype=np.float64)

    def last(name: str) -> Array:
        return np.asarray(X[:, INDEX[f"last_{name}"]] * factors[:, FACTORS.index(name)], dtype=np.float64)

    def round_of(of_part: Callable[[str], Array]) -> Array:
        return _norm([of_part(name) for name in PARTS if name != "epilogue_us"], _PART_SQUARINGS) + of_part(
            "epilogue_us"
        )

    rounds, streams, round_us, rest_us, is_last = (X[:, INDEX[name]].astype(np.float64) for name in STREAMING)
    dram = factors[:, FACTORS.index("dram_us")]
    streaming = Streaming(
        full_rounds=rounds, rounds=streams, round_us=round_us * dram, rest_us=rest_us * dram, is_rest_last=is_last
    )
    in_full = round_of(lambda name: part(name) - last(name)) / np.maximum(rounds, 1.0)
    makespan = phased(in_full, round_of(last), streaming, lambda a, b: _norm([a, b], _ROUND_SQUARINGS))
    return part("launch_us") + part("fill_us") + _norm([makespan, part("dram_us")], _DRAM_SQUARINGS)


def _norm(parts: list[Array], squarings: int) -> Array:
    """p-norm, p = 2 ** squarings, of parts that are far from overflow: microseconds."""
    total = np.zeros_like(parts[0])
    for each in parts:
        power = each
        for _ in range(squarings):
            power = np.square(power)
        total += power
    for _ in range(squarings):
        total = np.sqrt(total)
    return total
