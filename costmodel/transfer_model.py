"""Latencies of a card that was never measured, from another card's measurements of the same kernels.

What one card's launches teach is how far each resource's time is from the analytic core's (the factors of
`costmodel.calibration`), and a residual forest over the core's times and the kernel's own numbers. Where the core's
constant is one guess for all cards (issue slots, barriers, epilogue, floor), its factor holds on any card. Where each
card has its own constant (DRAM, tensor cores, L2, latency), the factor belongs to the kernels or to the card that was
measured, and nobody knows which: it is carried over by a share that is drawn between none and all. The target's own
constants are drawn within `CARD_SPREAD`. The forest is carried over whole.

The prediction is the draws' mean log latency. Its interval joins the draws' spread with the errors on regimes that were
held out on the source card: a regime is what the core finds to be the bottleneck, since a card is another one by having
its bottlenecks elsewhere.
"""

from __future__ import annotations

from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from costmodel.calibration import FACTORS, CalibratedCore
from costmodel.columns import FEATURES, INDEX
from costmodel.model import LatencyModel

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
CARD_SPREAD = {
    "launch_us": 0.20,  # the floor was measured on an H200 only
    "fill_us": 0.20,
    "dram_us": 0.05,  # streaming reaches 0.88 to 0.95 of the data sheet on the cards whose figures are published
    "tensor_us": 0.08,  # mma.sync's share of the sheet's rate, and the clock under the card's power limit
    "issue_us": 0.05,  # clock
    "smem_us": 0.05,
    "l2_us": 0.25,  # measured by others at another access pattern
    "chain_us": 0.10,
    "warp_us": 0.05,
    "fetch_us": 0.20,  # loaded latency is a guess
    "epilogue_us": 0.15,
}
"""Standard deviation of log of a part's time on a card that was never measured, its factor known."""
_OF_CARD = ("dram_us", "tensor_us", "l2_us", "fetch_us")
"""Parts whose constants are of one card (`costmodel.constants`)."""
_REGIMES = ("dram_us", "tensor_us", "issue_us", "smem_us", "l2_us", "chain_us", "warp_us", "fetch_us")
_NORMAL_90 = 1.6448536269514722


class TransferModel(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A scikit-learn regressor of latency in microseconds over the matrix of `costmodel.features`: fitted on one card's
    rows, asked for another's. On a matrix with other columns it is `LatencyModel`.

    Parameters are:
        num_trees, depth: of the residual forest; smaller than `LatencyModel`'s, for what is learned finely is the
            source card's own.
        num_draws: of the constants.
        random_state: seed.

    Learned are:
        model_: the source card's `LatencyModel`.
        kept_, deviations_: float64 [num_draws, len(FACTORS)], the share of each part's log factor that a draw carries
            over, and what it adds for the card.
    """

    def __init__(self, *, num_trees: int = 100, depth: int = 4, num_draws: int = 32, random_state: int = 0) -> None:
        self.num_trees = num_trees
        self.depth = depth
        self.num_draws = num_draws
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Learns from X [R, F] and positive latencies y [R] in microseconds. `groups` [R]: held out together when the
        errors are taken; the bottlenecks' regimes without it.

        Raises:
            ValueError: as `LatencyModel`.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, order="F", ensure_min_samples=2, y_numeric=True)
        if groups is None and X.shape[1] == len(FEATURES):
            found = bottlenecks(X)
            groups = found if len(np.unique(found)) > 1 else None
        source = LatencyModel(num_trees=self.num_trees, depth=self.depth, num_folds=4, random_state=self.random_state)
        self.model_ = source.fit(X, y, groups=groups)
        rng = np.random.default_rng(self.random_state)
        size = (self.num_draws, len(FACTORS))
        self.kept_ = np.where([name in _OF_CARD for name in FACTORS], rng.uniform(size=size), 1.0)
        self.deviations_ = rng.normal(size=size) * [CARD_SPREAD[name] for name in FACTORS]
        return self

    @overload
    def predict(self, X: Any) -> Array: ...
    @overload
    def predict(self, X: Any, return_interval: bool) -> Array | tuple[Array, Array, Array]: ...
    def predict(self, X: Any, return_interval: bool = False) -> Array | tuple[Array, Array, Array]:
        """Latencies [R] in microseconds; with `return_interval` (latency, lower, upper), which shall hold 90%."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, order="F", reset=False)
        source, lower, _ = self.model_.predict(np.asarray(X), return_interval=True)
        shifts = self._shifts(X)
        log_us = np.log(source) + shifts.mean(axis=0)
        if not return_interval:
            return np.asarray(np.exp(log_us), dtype=np.float64)
        reach = np.hypot(np.log(source / lower), _NORMAL_90 * shifts.std(axis=0))
        return np.exp(log_us), np.exp(log_us - reach), np.exp(log_us + reach)

    def _shifts(self, X: Matrix) -> Array:
        """[num_draws, R]: log of each draw's latency over the source card's."""
        core = self.model_.core_
        if core is None:
            return np.zeros((1, len(X)))
        log_factors = np.log(core.factors)
        here = core.log_us(X)
        changes = zip(self.kept_, self.deviations_, strict=True)
        drawn = [CalibratedCore(factors=np.exp(log_factors * kept + off)).log_us(X) for kept, off in changes]
        return np.asarray(self.model_.slope * (np.stack(drawn) - here), dtype=np.float64)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags


def bottlenecks(X: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """[R]: which part the core finds largest, as a number."""
    return np.asarray(X[:, [INDEX[name] for name in _REGIMES]].argmax(axis=1), dtype=np.intp)
