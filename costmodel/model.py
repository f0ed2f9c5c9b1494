"""LatencyModel: the latency of a launch from its features, and how far off that may be.

    log latency = slope * log core + forest(features),    core = the analytic core, calibrated

The forest never falls in a feature that grows with tokens, and what does not grow does not depend on tokens
(`costmodel.features.Kind`), so the latency is non-decreasing in tokens by construction. With a slope of 1 the residual
could never fall either: a core that is too slow at large loads could not be mended. `slope` below 1 leaves the
difference to the forest.

Errors on folds of held-out groups calibrate the intervals (`costmodel.conformal`).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from costmodel.calibration import CalibratedCore
from costmodel.columns import FEATURES, INDEX, KINDS, Kind
from costmodel.conformal import Conformal
from costmodel.forest import Boosting, Forest, require
from profiles.gpus import Math

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
_ASKED = np.asarray([KINDS[name] in (Kind.GROWS, Kind.FIXED) for name in FEATURES])
_GROWS = np.asarray([KINDS[name] is Kind.GROWS for name in FEATURES])
_MATH_COLUMNS = [INDEX[f"{math.value}_share"] for math in Math]
_TILE_EDGES = (16, 64)
"""Token tiles up to the first are decode's, above the second prefill's."""


class LatencyModel(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A scikit-learn regressor of latency in microseconds over the matrix of `costmodel.features`.

    A matrix with other columns has no analytic core and no column that is known to grow with tokens: the forest then
    learns log latency alone (`core_` is None).

    Parameters are:
        num_trees, depth, learning_rate, l2: of the forest, see `costmodel.forest.Boosting`.
        slope: the core's exponent, above 0 and at most 1; see the module.
        num_folds: parts of the data that are held out in turn to calibrate the intervals.
        coverage: share of latencies that an interval shall hold, between 0 and 1.
        random_state: seed; the same data and seed give the same model.

    Learned are:
        core_: the calibrated core, or None.
        forest_: of log latency.
        conformal_: quantiles of the errors, by regime: family, math, width of the token tile; mixed launches apart.
    """

    def __init__(
        self,
        *,
        num_trees: int = 240,
        depth: int = 6,
        learning_rate: float = 0.1,
        l2: float = 1.0,
        slope: float = 0.95,
        num_folds: int = 4,
        coverage: float = 0.9,
        random_state: int = 0,
    ) -> None:
        self.num_trees = num_trees
        self.depth = depth
        self.learning_rate = learning_rate
        self.l2 = l2
        self.slope = slope
        self.num_folds = num_folds
        self.coverage = coverage
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Learns from X [R, F] and positive latencies y [R] in microseconds.

        `groups` [R]: rows of one label are held out together when the intervals are calibrated, so that they hold for
        launches of a group never seen; without it rows are held out one by one.

        Raises:
            ValueError: as scikit-learn's estimators do, and for a parameter that cannot be or a latency that is not
                positive.
        """
        require("slope", self.slope, lambda it: 0 < it <= 1, "above 0 and at most 1")
        require("num_folds", self.num_folds, lambda it: it >= 2, "a whole number of at least 2", Integral)
        require("coverage", self.coverage, lambda it: 0 < it < 1, "between 0 and 1")
        X, y = validate_data(self, X, y, dtype=np.float32, order="F", ensure_min_samples=2, y_numeric=True)
        log_us = _log_of(y)
        self._fit_mean(X, log_us)
        self.conformal_ = Conformal.fit(self._unseen_errors(X, log_us, groups), _regimes(X))
        return self

    @overload
    def predict(self, X: Any) -> Array: ...
    @overload
    def predict(self, X: Any, return_interval: bool) -> Array | tuple[Array, Array, Array]: ...
    def predict(self, X: Any, return_interval: bool = False) -> Array | tuple[Array, Array, Array]:
        """Latencies [R] in microseconds; with `return_interval` (latency, lower, upper), of the model's `coverage`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        log_us = self._log_us(X)
        if not return_interval:
            return np.asarray(np.exp(log_us), dtype=np.float64)
        require("coverage", self.coverage, lambda it: 0 < it < 1, "between 0 and 1")
        reach = self.conformal_.quantile(_regimes(X), self.coverage)
        return np.exp(log_us), np.exp(log_us - reach), np.exp(log_us + reach)

    def latencies_us(self, X: Matrix) -> Array:
        """`predict` of float32 X [R, F] that is known to be right, for one launch at a time: nothing is checked."""
        return np.asarray(np.exp(self._log_us(X)), dtype=np.float64)

    def predict_interval(self, X: Any) -> Array:
        """Lower and upper end [R, 2] of each row's interval, in microseconds."""
        _, lower, upper = self.predict(X, return_interval=True)
        return np.stack([lower, upper], axis=1)

    def _fit_mean(self, X: Matrix, log_us: Array) -> None:
        """Sets `core_` and `forest_`."""
        self.core_: CalibratedCore | None = None
        grows = np.zeros(X.shape[1], dtype=np.bool_)
        base = np.zeros(len(X))
        if X.shape[1] == len(FEATURES):
            self.core_ = CalibratedCore.fit(X, log_us, seed=self.random_state)
            base, grows = self.slope * self.core_.log_us(X), _GROWS
        boosting = Boosting(num_trees=self.num_trees, depth=self.depth, learning_rate=self.learning_rate, l2=self.l2)
        self.forest_: Forest = boosting.fit(X, log_us - base, asked=_asked(X), grows=grows, seed=self.random_state)

    def _unseen_errors(self, X: Matrix, log_us: Array, groups: Any) -> Array:
        """|log error| of each row [R], predicted by a model that was fitted without the row's fold."""
        distinct = len(X) if groups is None else len(np.unique(groups))
        folds = min(self.num_folds, distinct)
        if folds < 2:
            raise ValueError("groups: expected at least 2 different ones for the intervals, got 1: pass more, or none")
        split = KFold(folds, shuffle=True, random_state=self.random_state) if groups is None else GroupKFold(folds)
        errors = np.empty(len(X))
        for seen, held_out in split.split(X, groups=groups):
            part = type(self)(**self.get_params())
            part._fit_mean(np.asfortranarray(X[seen]), log_us[seen])
            errors[held_out] = np.abs(part._log_us(X[held_out]) - log_us[held_out])
        return errors

    def _log_us(self, X: Matrix) -> Array:
        residual = self.forest_.predict(X)
        return residual if self.core_ is None else residual + self.slope * self.core_.log_us(X)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags


def _log_of(y: Array) -> Array:
    if not bool(np.all(y > 0)):
        raise ValueError(f"latencies must be positive: y[{int(np.argmin(y > 0))}] is {y[np.argmin(y > 0)]}")
    return np.log(np.asarray(y, dtype=np.float64))


def _asked(X: Matrix) -> npt.NDArray[np.bool_]:
    """The columns that the forests see."""
    return _ASKED if X.shape[1] == len(FEATURES) else np.ones(X.shape[1], dtype=np.bool_)


def _regimes(X: Matrix) -> npt.NDArray[np.int64]:
    """A number for family, math and the class of the token tile, or for family and that schemes are mixed, of which
    there are too few rows to tell more apart; 0 without known columns.
    """
    if X.shape[1] != len(FEATURES):
        return np.zeros(len(X), dtype=np.int64)
    math = X[:, _MATH_COLUMNS].argmax(axis=1)
    is_mixed, is_wgmma = X[:, INDEX["num_slots"]] > 1, X[:, INDEX["is_wgmma"]] > 0
    tile = np.searchsorted(_TILE_EDGES, X[:, INDEX["tile_n"]], side="left")
    part = np.where(is_mixed, len(_TILE_EDGES) + 1, tile)
    return np.asarray((part * 2 + is_wgmma) * len(Math) + np.where(is_mixed, 0, math), dtype=np.int64)
