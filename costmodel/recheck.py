"""Which launches to measure again, so that few of them tell whether anything changed, and what."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel import features
from costmodel.calibration import FACTORS, CalibratedCore
from costmodel.columns import INDEX
from costmodel.drift import explanations
from profiles.errors import SpecError
from profiles.gpus import Math

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
_PRIOR = 0.1
"""In launches: what is known of an explanation before any is measured."""


def choose(rows: pd.DataFrame, number: int) -> pd.DataFrame:
    """`number` of a profile's finished rows, fewer if it has fewer, that tell the explanations of `costmodel.drift`
    apart best: greedily, each the one that is known least from those before (D-optimal design).

    Raises:
        SpecError: `number` is not positive.
    """
    if number < 1:
        raise SpecError(f"{number} launches to measure again: at least one is needed")
    X = features.of_profile(rows).to_numpy(dtype=np.float32)
    names = [schemes[0] if len(set(schemes)) == 1 else "" for schemes in rows["schemes"]]
    core = CalibratedCore(factors=np.ones((2, len(Math), len(FACTORS))))
    columns = np.stack([each.column(X, core, 1.0) for each in explanations(X, names)], axis=1)
    columns[X[:, INDEX["num_slots"]] > 1] *= 0.5  # a mix of schemes says less about each
    return rows.iloc[_spread(columns, min(number, len(rows)))].reset_index(drop=True)


def _spread(columns: Array, number: int) -> Codes:
    """Rows [number], each the one with the largest variance left given those before."""
    left = columns / np.sqrt(_PRIOR)
    chosen: list[int] = []
    is_free = np.ones(len(columns), dtype=np.bool_)
    for _ in range(number):
        variance = np.where(is_free, np.square(left).sum(axis=1), -1.0)
        best = int(variance.argmax())
        chosen.append(best)
        is_free[best] = False
        direction = left[best] / np.sqrt(variance[best])
        shrink = 1.0 - 1.0 / np.sqrt(1.0 + variance[best])
        left = left - shrink * (left @ direction)[:, None] * direction[None, :]
    return np.asarray(chosen, dtype=np.intp)
