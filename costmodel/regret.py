"""What a choice costs: the measured time of the configuration that is chosen against the best measured one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
TOP = 4
"""Configurations that are measured when the first choice is not trusted."""


def regrets(y: Array, predicted: Array, launches: npt.NDArray[np.int64], top: int = TOP) -> tuple[Array, Array]:
    """For each launch with two or more configurations: measured time of the predicted best over the measured best, less
    1, and the same for the best measured among the predicted `top`. Ties are drawn by lot.
    """
    lot = np.random.default_rng(0).random(len(y))
    order = np.lexsort((lot, predicted, launches))
    starts = np.flatnonzero(np.r_[True, np.diff(launches[order]) != 0])
    stops = np.r_[starts[1:], len(order)]
    first, best_of_top = [], []
    for start, stop in zip(starts, stops, strict=True):
        if stop - start >= 2:
            measured = y[order[start:stop]]
            first.append(measured[0] / measured.min() - 1.0)
            best_of_top.append(measured[:top].min() / measured.min() - 1.0)
    return np.asarray(first, dtype=np.float64), np.asarray(best_of_top, dtype=np.float64)
