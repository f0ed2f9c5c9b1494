"""Measurements or build facts -> latency.

facts       what the compiler said about a kernel (BuildFacts)
occupancy   how many CTAs of it an SM holds
constants   the analytic model's physical numbers, each with its source
work        what one k-tile of one scheme costs an SM (bytes, instructions, tensor work), and how a load splits
launches    launches as objects, and as columns
rounds      how a launch's tiles fall to CTAs, the last round not full
analytic    the latency of a launch from the above: makespan of the tile list against DRAM time
table       CostTable: (linear, scheme, load) -> latency and configuration, from measurements or predictions

features    launches as the matrix that models learn from; its columns, feature_columns and kernel_use
sessions    measurements of several hours or machines as one table, and the noise floor between them
model       LatencyModel, of calibration (the core's factors), forest (what it misses) and conformal (intervals)
baselines   what LatencyModel must beat, on its interface; NVIDIA's model of GEMMs: matmul_heuristics
model_file  a fitted model as a file; fit: `python -m costmodel.fit`; shipped: of the launches that come with bitile
pricing     what a fitted model is for: cost tables, marginal costs, choosing a kernel
evaluation  errors, coverage and regret on held-out groups; evaluate: `python -m costmodel.evaluate`; report and plots
transfer    a card that was never measured: `python -m costmodel.transfer`; transfer_model, and published figures
error_field what one measurement says about the errors of other predictions
guide       which configurations to measure next; worth: whether to. Both tried on recorded rows: `python -m
            costmodel.replay`, worth_check
drift       what changed since a model was fitted; recheck: which launches tell; recalibration: correct it,
            `python -m costmodel.recalibrate`; tried on made-up changes: `python -m costmodel.drift_check`
blocks      long arrays on all cores; the analytic model's: terms, tiles (what one takes), splits (loads into tiles)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from profiles.interrupt import end_at_once

if TYPE_CHECKING:
    from costmodel.model import LatencyModel
    from costmodel.model_file import FittedModel
    from costmodel.pricing import cost_table
    from costmodel.table import CostTable

end_at_once("costmodel")

_HOMES = {
    "CostTable": "costmodel.table",
    "FittedModel": "costmodel.model_file",
    "LatencyModel": "costmodel.model",
    "cost_table": "costmodel.pricing",
}
__all__ = ["CostTable", "FittedModel", "LatencyModel", "cost_table"]


def __getattr__(name: str) -> object:
    """The package's public names, loaded when asked for: scikit-learn takes a second, and most importers want facts."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
