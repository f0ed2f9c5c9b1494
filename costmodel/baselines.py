"""What `LatencyModel` must beat, on its interface: estimators of latency in microseconds over the matrix of
`costmodel.features`.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from costmodel.columns import FEATURES, INDEX, KINDS, Kind
from costmodel.forest import Boosting

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]


class _Baseline(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Checks the matrix; a baseline adds `_fit` and `_predict`."""

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Learns what the baseline learns; `groups` are not used."""
        X, y = check_X_y(X, y, dtype=np.float32)
        self.n_features_in_ = _width(X)
        self._fit(X, np.asarray(y, dtype=np.float64))
        return self

    def predict(self, X: Any) -> Array:
        """Latencies [R] in microseconds."""
        check_is_fitted(self, "n_features_in_")
        X = check_array(X, dtype=np.float32)
        _width(X)
        return self._predict(X)

    def _fit(self, X: Matrix, y: Array) -> None:
        """Nothing to learn unless a baseline says so."""

    def _predict(self, X: Matrix) -> Array:
        raise NotImplementedError


class Dummy(_Baseline):
    """The geometric mean of what was measured, whatever the launch."""

    def _fit(self, X: Matrix, y: Array) -> None:
        self.latency_us_ = float(np.exp(np.log(y).mean()))

    def _predict(self, X: Matrix) -> Array:
        return np.full(len(X), self.latency_us_)


class Roofline(_Baseline):
    """The roofline bound over the one efficiency that fits best in the middle."""

    def _fit(self, X: Matrix, y: Array) -> None:
        self.factor_ = float(np.median(y / self._bound(X)))

    def _predict(self, X: Matrix) -> Array:
        return self.factor_ * self._bound(X)

    @staticmethod
    def _bound(X: Matrix) -> Array:
        return np.asarray(np.maximum(_column(X, "roofline_us"), 1e-3), dtype=np.float64)


class AnalyticCore(_Baseline):
    """The analytic core alone, which learns nothing."""

    def _predict(self, X: Matrix) -> Array:
        return _column(X, "latency_us")


class SlopeTimesTiles(_Baseline):
    """MxMoE's model (arXiv 2505.05799): each kernel's time on a shape is a slope times its tiles.

    A kernel or reduction length that was not measured takes the slope per k-tile of the same configuration and scheme,
    or of all.
    """

    _KERNEL = tuple(name for name in FEATURES if KINDS[name] is Kind.FIXED and name != "num_experts")
    _KERNEL_ON_ANY_SHAPE = (*(name for name in _KERNEL if name.endswith("_share")), "tile_m", "tile_n", "is_wgmma")

    def _fit(self, X: Matrix, y: Array) -> None:
        tiles = self._tiles(X)
        per_k_tile = tiles * _column(X, "k_tiles")
        self.slopes_ = _slopes(_keys(X, self._KERNEL), tiles, y)
        self.slopes_per_k_tile_ = _slopes(_keys(X, self._KERNEL_ON_ANY_SHAPE), per_k_tile, y)
        self.slope_ = _slope(per_k_tile, y)

    def _predict(self, X: Matrix) -> Array:
        exact = np.asarray([self.slopes_.get(key, np.nan) for key in _keys(X, self._KERNEL)])
        general = np.asarray(
            [self.slopes_per_k_tile_.get(key, self.slope_) for key in _keys(X, self._KERNEL_ON_ANY_SHAPE)]
        )
        slope = np.where(np.isnan(exact), general * _column(X, "k_tiles"), exact)
        return np.asarray(slope * self._tiles(X), dtype=np.float64)

    @staticmethod
    def _tiles(X: Matrix) -> Array:
        """Tiles of an SM, as a fraction."""
        return np.maximum(_column(X, "waves") * _column(X, "ctas_per_sm"), 1e-6)


class RawBoosting(_Baseline):
    """Gradient boosting of log latency, LatencyModel's own learner, on sizes, configuration and scheme as they are: no
    core, no ratios.
    """

    _COLUMNS = (
        *("num_tokens", "n", "k", "num_experts", "num_active", "tile_m", "tile_n", "warps_m", "warps_n", "num_stages"),
        *("ctas_per_sm", "is_wgmma", "is_along_features", "num_slots", "weight_bits", "grouped_share"),
        *("zero_point_share", "bf16_share", "int8_share", "e4m3_share", "int4_share"),
    )

    def __init__(self, *, num_trees: int = 240, random_state: int = 0) -> None:
        self.num_trees = num_trees
        self.random_state = random_state

    def _fit(self, X: Matrix, y: Array) -> None:
        raw = self._raw(X)
        every = np.ones(raw.shape[1], dtype=np.bool_)
        boosting = Boosting(num_trees=self.num_trees, depth=5, l2=1.0)
        self.forest_ = boosting.fit(raw, np.log(y), asked=every, grows=~every, seed=self.random_state)

    def _predict(self, X: Matrix) -> Array:
        return np.asarray(np.exp(self.forest_.predict(self._raw(X))), dtype=np.float64)

    def _raw(self, X: Matrix) -> Matrix:
        return X[:, [INDEX[name] for name in self._COLUMNS]]


def _width(X: Matrix) -> int:
    if X.shape[1] != len(FEATURES):
        raise ValueError(f"a matrix of costmodel.features has {len(FEATURES)} columns, this has {X.shape[1]}")
    return int(X.shape[1])


def _column(X: Matrix, name: str) -> Array:
    return np.asarray(X[:, INDEX[name]], dtype=np.float64)


def _keys(X: Matrix, names: tuple[str, ...]) -> list[bytes]:
    rows = np.ascontiguousarray(X[:, [INDEX[name] for name in names]])
    return [row.tobytes() for row in rows]


def _slopes(keys: list[bytes], tiles: Array, y: Array) -> dict[bytes, float]:
    rows: dict[bytes, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return {key: _slope(tiles[of_key], y[of_key]) for key, of_key in rows.items()}


def _slope(tiles: Array, y: Array) -> float:
    """The slope of least squared relative error."""
    ratio = tiles / y
    return float(ratio.sum() / np.square(ratio).sum())
