"""The corrected loss that `python -m allocator.additivity` found: for assignments whose losses do not add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from allocator.calibration.additivity import Blocks, Correction, Fit
from allocator.problem import Ints
from allocator.sensitivity import Sensitivity
from allocator.study.problem import LossOf
from profiles.errors import DataError
from profiles.models import MoeShape


def read_correction(path: Path, sensitivity: Sensitivity, shape: MoeShape) -> LossOf:
    """The loss of an assignment of `sensitivity.arrays()`'s schemes, as the report's chosen correction predicts it.

    DataError: not a report, or one of another sensitivity. SpecError: as `Blocks.of`.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        fit = Fit(correction=Correction(report["chosen"]), weights=np.array(report["weights"], dtype=np.float64))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a report of allocator.additivity ({error})") from error
    blocks = Blocks.of(sensitivity, shape)

    def loss(assignment: Ints) -> float:
        return float(fit.predict(blocks, [assignment])[0])

    try:
        loss(np.zeros(len(blocks.ids), dtype=np.int64))
    except ValueError as error:
        raise DataError(f"{path}: its {fit.weights.size} weights are of another sensitivity") from error
    return loss
