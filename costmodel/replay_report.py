"""What a replay found, as Markdown tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from costmodel.replay import Point

SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
"""Shares of all measurements at which strategies are compared."""


def averaged(curves: Sequence[Point]) -> pd.DataFrame:
    """Each strategy at each of SHARES: the last point that spent no more, mean over models by launches (seconds: mean
    over models). Columns strategy, share, seconds, regret_mean, regret_p99.
    """
    frame = pd.DataFrame([{name: getattr(point, name) for name in point.__slots__} for point in curves])
    rows = []
    for _, curve in frame.groupby(["strategy", "model"], sort=False):
        for share in SHARES:
            if share <= curve["share"].max() + 0.02:
                rows.append(curve[curve["share"] <= share + 1e-9].iloc[-1].to_dict() | {"at": share})
    each = pd.DataFrame(rows)
    found = []
    for (strategy, at), models in each.groupby(["strategy", "at"], sort=False):
        weight = models["num_launches"]
        found.append(
            {
                "strategy": strategy,
                "share": at,
                "seconds": models["seconds"].mean(),
                "regret_mean": np.average(models["regret_mean"], weights=weight),
                "regret_p99": np.average(models["regret_p99"], weights=weight),
            }
        )
    return pd.DataFrame(found)


def markdown(curves: Sequence[Point], exhaustive_seconds: Mapping[str, float], *, goal: float) -> str:
    """Two tables: strategies by share of measurements, and where guided measuring stops for each model."""
    table = averaged(curves)
    names = list(dict.fromkeys(table["strategy"]))
    lines = ["| measured | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for share, rows in table.groupby("share"):
        by_name = rows.set_index("strategy")
        cells = [
            f"{100 * by_name['regret_mean'][name]:.2f}% in {by_name['seconds'][name]:.0f} s" if name in by_name.index
            else "-" for name in names
        ]  # fmt: skip
        lines.append(f"| {100 * float(str(share)):g}% | " + " | ".join(cells) + " |")
    lines += ["", f"Guided measuring, stopped when it expects a regret of {100 * goal:g}%:", ""]
    lines += ["| model | launches | candidates, s | measured | s | expected | regret, mean | p99 |", "|---" * 8 + "|"]
    for model, seconds in exhaustive_seconds.items():
        curve = [point for point in curves if point.model == model and point.strategy == "guided"]
        lines.append(_stop_line(curve, seconds, goal))
    return "\n".join(lines)


def _stop_line(curve: Sequence[Point], exhaustive_seconds: float, goal: float) -> str:
    stop = next((p for p in curve if p.expected_regret is not None and p.expected_regret <= goal), curve[-1])
    total = round(max(p.num_measured / p.share for p in curve if p.share))
    return (
        f"| {stop.model} | {stop.num_launches} | {total}, {exhaustive_seconds:.0f} s | {stop.num_measured}"
        f" ({100 * stop.share:.1f}%) | {stop.seconds:.0f} | {100 * (stop.expected_regret or 0.0):.2f}%"
        f" | {100 * stop.regret_mean:.2f}% | {100 * stop.regret_p99:.1f}% |"
    )


def plot(curves: Sequence[Point], path: Path) -> None:
    """Mean regret against seconds of GPU and compiler, a line a strategy, as PNG."""
    table = averaged(curves)
    figure: Figure
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in table.groupby("strategy", sort=False):
        axes.plot(np.maximum(rows["seconds"], 1.0), 100 * rows["regret_mean"], marker="o", markersize=4, label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds of GPU and compiler to tune one model (at 1: nothing measured)")
    axes.set_ylabel("regret, mean over launches, %")
    axes.legend()
    figure.savefig(path, format="png", dpi=130)
    plt.close(figure)
