"""Intervals with a promise: from errors on rows that the model had not seen, their quantiles by regime.

Split-conformal prediction (Vovk et al. 2005) with one quantile per regime (Mondrian): fp8 launches, say, are not
covered at the expense of the others. If new groups are like those held out during calibration, a share `coverage` of
their latencies lies in the interval, whatever the model.

A learned difficulty that divides the errors (normalised scores: Lei et al. 2018) was tried and dropped: on groups
never seen it widened the intervals, or covered too little (docs/latency_model.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
POOLED = -1
"""The regime of rows whose own regime was seen too rarely: all of them together."""
MIN_ROWS = 100
LEVELS = 400
"""Scores kept of a regime, evenly over their ranks: enough for any coverage between 1% and 99%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformal:
    """`regimes` int64 [G] in increasing order, POOLED first; `counts` int64 [G] rows of each; `scores` float64
    [G, LEVELS]: their quantiles, in increasing order.
    """

    regimes: Codes
    counts: Codes
    scores: Array

    @classmethod
    def fit(cls, scores: Array, regimes: Codes) -> Conformal:
        """From |log error| of unseen rows [R], and which regime (a number from 0) each row is of."""
        names, counts = np.unique(regimes, return_counts=True)
        kept = [POOLED, *names[counts >= MIN_ROWS].tolist()]
        parts = [scores if name == POOLED else scores[regimes == name] for name in kept]
        levels = np.linspace(0, 1, LEVELS)
        return cls(
            regimes=np.asarray(kept, dtype=np.int64),
            counts=np.asarray([len(part) for part in parts], dtype=np.int64),
            scores=np.asarray([np.quantile(part, levels) for part in parts]),
        )

    def quantile(self, regimes: Codes, coverage: float) -> Array:
        """How far the interval reaches to either side of the log, [R]; the finite-sample level
        ceil((n + 1) coverage) / n of each regime.
        """
        levels = np.minimum(np.ceil((self.counts + 1) * coverage) / self.counts, 1.0)
        grid = np.linspace(0, 1, self.scores.shape[1])
        each = np.asarray([np.interp(level, grid, row) for level, row in zip(levels, self.scores, strict=True)])
        index = np.searchsorted(self.regimes, regimes)
        index = np.where(index < len(self.regimes), index, 0)
        return np.asarray(np.where(self.regimes[index] == regimes, each[index], each[0]), dtype=np.float64)
