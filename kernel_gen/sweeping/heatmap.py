"""The heat map of a sweep: schemes by token counts, cells the best latency, coloured by the speed-up over w16a16."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from kernel_gen.sweeping.report import Cell, panels

BASELINE = "w16a16"
SPEEDUP_RANGE = (0.125, 8.0)
"""Colours saturate here, so that pictures of different sweeps compare; the numbers in the cells do not."""

MAX_PANELS = 16
"""A trace of every layer has more than a picture can show."""


def draw(cells: Sequence[Cell], *, title: str, path: Path) -> None:
    """Write the picture of `cells` to `path` as PNG, atomically: a panel per model, linear and load, under `title`.

    With w16a16 among the schemes the colour is the speed-up over it, else the latency. OSError when the path cannot be
    written.
    """
    everything = panels(cells)
    groups = everything[:MAX_PANELS]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    size = _panel_inches(groups)
    figure = Figure(figsize=(columns * size[0], 0.9 + rows * size[1]), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, panel in zip(axes, groups, strict=False):
        _panel(figure, axis, panel)
    for axis in list(axes)[len(groups) :]:
        axis.set_axis_off()
    left_out = f"; {len(everything) - len(groups)} more panels in the tables" if len(everything) > len(groups) else ""
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    figure.text(
        0.5,
        0.995,
        f"\n\ncells: best latency in us, and the speed-up over {BASELINE} where it was swept{left_out}",
        ha="center",
        va="top",
        fontsize=8,
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _panel_inches(groups: Sequence[Sequence[Cell]]) -> tuple[float, float]:
    """Width and height that the panel with the most cells, or the longest label, needs."""
    widest = max(len({cell.tokens for cell in panel}) for panel in groups)
    tallest = max(len({cell.scheme for cell in panel}) for panel in groups)
    label = max(len(cell.scheme) for panel in groups for cell in panel)
    return 1.6 + 0.075 * label + 0.82 * max(widest, 4), 1.4 + 0.38 * max(tallest, 3)


def _panel(figure: Figure, axis: Axes, panel: Sequence[Cell]) -> None:
    tokens = sorted({cell.tokens for cell in panel})
    schemes = list(dict.fromkeys(cell.scheme for cell in panel))
    latency_us = np.full((len(schemes), len(tokens)), np.nan)
    for cell in panel:
        latency_us[schemes.index(cell.scheme), tokens.index(cell.tokens)] = cell.latency_us
    relative = BASELINE in schemes
    values = latency_us[schemes.index(BASELINE)] / latency_us if relative else latency_us
    colours, norm = _scale(values, relative)
    image = axis.imshow(values, cmap=colours, norm=norm, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        if np.isfinite(values[row, column]):
            text = _cell_text(float(latency_us[row, column]), float(values[row, column]) if relative else None)
            axis.text(
                column, row, text, ha="center", va="center", fontsize=7, color=_ink(colours(norm(values[row, column])))
            )
    axis.set_xticks(range(len(tokens)), [str(count) for count in tokens])
    axis.set_yticks(range(len(schemes)), schemes, fontfamily="monospace", fontsize=8)
    axis.set_xlabel("tokens in the batch")
    model, linear, load = panel[0].panel
    axis.set_title(f"{model}, {linear}, {load} load", fontsize=10)
    label = f"speed-up over {BASELINE}" if relative else "best latency, us"
    bar = figure.colorbar(image, ax=axis, label=label, pad=0.015)
    if relative:
        ticks = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
        bar.set_ticks(list(ticks), labels=[f"{tick:g}x" for tick in ticks])
        bar.minorticks_off()


def _scale(values: np.ndarray, relative: bool) -> tuple[Colormap, Normalize]:
    if relative:
        return matplotlib.colormaps["PuOr"], LogNorm(
            *SPEEDUP_RANGE, clip=True
        )  # orange slower, purple faster: told apart by the colour-blind
    return matplotlib.colormaps["viridis_r"], LogNorm(float(np.nanmin(values)), float(np.nanmax(values)) * 1.001)


def _cell_text(latency_us: float, speedup: float | None) -> str:
    latency = f"{latency_us:.0f}" if latency_us >= 100 else f"{latency_us:.3g}"
    return latency if speedup is None else f"{latency}\n{speedup:.2f}x"


def _ink(rgba: Sequence[float]) -> str:
    """Black or white, whichever stands out from the cell (relative luminance, ITU-R BT.709)."""
    return "black" if 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2] > 0.45 else "white"
