"""The least time that a layer's two GEMMs could take on the card: what a speed-up can reach at most."""

from __future__ import annotations

import pandas as pd

from bench.layer.allocations import Allocation, allocation
from bench.layer.cells import Cell
from bench.peers.roofline import roofline


def gemms_us(cell: Cell, of: Allocation) -> float:
    """bench.peers.roofline of both launches, one after the other: of each the bytes of all its experts at the card's
    bandwidth, or their operations at each scheme's rate, whichever takes longer.
    """
    total = 0.0
    for linear, schemes in cell.schemes(of).items():
        n, k = cell.shape.gemm(linear)
        parts = [
            roofline(slot, n, k, [count for count, each in zip(cell.counts(), schemes, strict=True) if each == slot])
            for slot in dict.fromkeys(schemes)
        ]
        total += max(sum(part.memory_us for part in parts), sum(part.compute_us for part in parts))
    return total


def with_limits(whole: pd.DataFrame) -> pd.DataFrame:
    """Layers with `limit_us`, and `fraction`, that limit over the layer's whole time."""
    limits = [
        gemms_us(Cell(model=row["model"], tokens=row["tokens"], seed=row["seed"]), allocation(row["allocation"]))
        for row in whole.to_dict("records")
    ]
    return whole.assign(limit_us=limits, fraction=limits / whole["latency_us"])
