"""A Gaussian process over the error that a base prediction leaves: log(measured / base), launch by launch.

What one measurement says about the others: launches of one kernel, tile or scheme err alike, and more so the more alike
their loads are and the shares that the analytic core gives each resource. The covariance is a sum of such parts, each
of a group (rows that share it) times how alike two rows are (`Places`, squared exponential); beside them every launch
has an error of its own, which measuring it reveals. So measurements are few and far between, and yet the uncertainty
that is left, and how it is shared, is known: what choosing the next ones needs (Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2006, chapter 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from costmodel.columns import INDEX

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Matrix = npt.NDArray[np.float32]

_TILE = ("is_wgmma", "tile_m", "tile_n")
_CONFIG = (
    *(*_TILE, "warps_m", "warps_n", "num_stages", "ctas_per_sm", "is_along_features"),
    *("cluster", "split_k", "least_width"),
)
_MATHS = ("bf16_share", "int8_share", "e4m3_share", "int4_share")
_SCHEMES = ("num_slots", "weight_bits", "least_weight_bits", "most_weight_bits", "grouped_share", "zero_point_share")
_SHAPE = ("n", "k", "num_experts")
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": (),
    "family": ("is_wgmma",),
    "math": ("is_wgmma", *_MATHS),
    "tile": _TILE,
    "config": _CONFIG,
    "scheme": (*_SCHEMES, *_MATHS),
    "kernel": (*_CONFIG, *_SCHEMES, *_MATHS),
    "scheme on a shape": (*_SHAPE, *_SCHEMES, *_MATHS),
    "config on a shape": (*_SHAPE, *_CONFIG),
}
"""Rows are of one group when they agree in these columns of `costmodel.features`."""
_PARTS = (
    *("dram_us", "tensor_us", "issue_us", "smem_us", "l2_us", "chain_us", "fetch_us", "epilogue_us"),
    "makespan_us",
)
TERMS: tuple[tuple[str, str], ...] = (
    *(("all", "anywhere"), ("tile", "anywhere"), ("kernel", "anywhere"), ("scheme on a shape", "anywhere")),
    *(("family", "tokens"), ("math", "tokens"), ("config on a shape", "tokens")),
    *(("family", "bound"), ("tile", "bound"), ("config", "bound"), ("scheme", "bound")),
    *(("family", "regime"), ("tile", "regime")),
)
"""(group, in what two rows of it must be alike)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """Standard deviations of log errors: of each of TERMS, `own` of a launch beside them, `repeat` of measuring again.

    A sum of independent errors, so their squares add up.
    """

    terms: tuple[float, ...]
    own: float
    repeat: float = 0.003

    def __post_init__(self) -> None:
        if len(self.terms) != len(TERMS):
            raise ValueError(f"{len(self.terms)} scales for {len(TERMS)} terms")


# Marginal likelihood, with a weak prior near 0.01, on up to 60 launches of each of five models that one H200's tables
# hold (2026-11-24), rounded: of the analytic core as it is, of the core with its parts fitted on 100 measurements, and
# of a LatencyModel that was fitted without the model in question.
ON_CORE = Scales(
    terms=(0.01, 0.006, 0.013, 0.011, 0.008, 0.016, 0.018, 0.29, 0.007, 0.052, 0.048, 0.023, 0.022), own=0.012
)
ON_CALIBRATED_CORE = Scales(
    terms=(0.007, 0.009, 0.019, 0.003, 0.005, 0.02, 0.01, 0.075, 0.011, 0.048, 0.052, 0.024, 0.032), own=0.013
)
ON_MODEL = Scales(
    terms=(0.006, 0.006, 0.008, 0.004, 0.007, 0.004, 0.009, 0.035, 0.014, 0.019, 0.019, 0.035, 0.029), own=0.016
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Places:
    """Where launches are: `codes` [R] of each group, `points` [R, D] of each way in which rows can be alike."""

    codes: Mapping[str, Codes]
    points: Mapping[str, Array]

    @classmethod
    def of(cls, X: Matrix) -> Places:
        """From a matrix of `costmodel.features`, float32 [R, len(FEATURES)]."""
        return cls(codes={group: _codes(X, columns) for group, columns in _GROUPS.items()}, points=_points(X))


class ErrorField:
    """The process over some launches; rows are named by their indices."""

    def __init__(self, places: Places, scales: Scales) -> None:
        self.scales = scales
        self._codes, self._points = places.codes, places.points
        self._sums: dict[str, list[tuple[str, float]]] = {}
        for (group, alike), deviation in zip(TERMS, scales.terms, strict=True):
            self._sums.setdefault(alike, []).append((group, deviation**2))
        self.variance = float(np.square(scales.terms).sum() + scales.own**2)

    def between(self, a: Codes, b: Codes) -> Array:
        """Covariances [len(a), len(b)] of rows a with rows b."""
        out = np.where(a[:, None] == b[None, :], self.scales.own**2, 0.0)
        for alike, groups in self._sums.items():
            shared = np.zeros_like(out)
            for group, variance in groups:
                codes = self._codes[group]
                shared += variance * (codes[a][:, None] == codes[b][None, :])
            out += shared if alike == "anywhere" else shared * _nearness(self._points[alike], a, b)
        return out

    def paired(self, a: Codes, b: Codes) -> Array:
        """Covariances [len(a)] of each row of a with its partner of b."""
        out = np.where(a == b, self.scales.own**2, 0.0)
        for alike, groups in self._sums.items():
            shared = np.zeros_like(out)
            for group, variance in groups:
                shared += variance * (self._codes[group][a] == self._codes[group][b])
            if alike != "anywhere":
                points = self._points[alike]
                shared *= np.exp(-0.5 * np.square(points[a] - points[b]).sum(axis=1))
            out += shared
        return out

    def given(self, rows: Codes, errors: Array) -> Posterior:
        """What is left unknown once `errors` [len(rows)], log(measured / base), are known."""
        covariance = self.between(rows, rows)
        covariance[np.diag_indices(len(rows))] += self.scales.repeat**2
        factor = np.linalg.cholesky(covariance)
        every = np.arange(len(self._codes["all"]), dtype=np.intp)
        explained = solve_triangular(factor, self.between(rows, every), lower=True)
        weights = solve_triangular(factor, errors, lower=True)
        return Posterior(field=self, mean=np.asarray(explained.T @ weights), explained=explained)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posterior:
    """`mean` [R]: the expected log error of each row. `explained` [measured, R]: its products are what measurements
    took away from the prior covariance.
    """

    field: ErrorField
    mean: Array
    explained: Array

    def variance(self) -> Array:
        """Of each row's log error, [R]."""
        return np.asarray(np.maximum(self.field.variance - np.square(self.explained).sum(axis=0), 0.0))

    def between(self, a: Codes, b: Codes) -> Array:
        """Covariances [len(a), len(b)]."""
        return np.asarray(self.field.between(a, b) - self.explained[:, a].T @ self.explained[:, b])

    def paired(self, a: Codes, b: Codes) -> Array:
        """Covariances [len(a)] of pairs."""
        return np.asarray(self.field.paired(a, b) - (self.explained[:, a] * self.explained[:, b]).sum(axis=0))


def _codes(X: Matrix, columns: tuple[str, ...]) -> Codes:
    """A number for each row's values in some columns, [R]."""
    if not columns:
        return np.zeros(len(X), dtype=np.intp)
    distinct = np.unique(X[:, [INDEX[name] for name in columns]], axis=0, return_inverse=True)[1]
    return np.asarray(distinct, dtype=np.intp).ravel()


def _points(X: Matrix) -> dict[str, Array]:
    """Where each row is, [R, D], in units in which a distance of 1 makes two rows share 61% of a term."""

    def column(name: str) -> Array:
        return np.asarray(X[:, INDEX[name]], dtype=np.float64)

    tokens = np.log2(np.maximum(column("num_tokens") / np.maximum(column("num_active"), 1.0), 1.0))
    bound = np.log(np.maximum(np.stack([column(name) for name in _PARTS], axis=1), 1e-2))
    bound -= np.log(np.maximum(column("latency_us"), 1e-2))[:, None]
    waves = np.log2(np.maximum(column("waves"), 1e-3))
    imbalance = np.log2(np.maximum(column("imbalance"), 1.0))
    regime = np.column_stack([bound, 2 * column("tail"), waves / 2, column("padding"), tokens / 2, imbalance])
    return {"tokens": tokens[:, None] / 2, "bound": bound / 2, "regime": regime}


def _nearness(points: Array, a: Codes, b: Codes) -> Array:
    """exp(-d^2 / 2) of the distances [len(a), len(b)]."""
    left, right = points[a], points[b]
    squares = np.square(left).sum(axis=1)[:, None] + np.square(right).sum(axis=1)[None, :] - 2.0 * left @ right.T
    return np.asarray(np.exp(-0.5 * np.maximum(squares, 0.0)))
