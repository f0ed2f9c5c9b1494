"""The picture: how many times as fast as the fastest bf16 layer, against tokens; a panel a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.layer.allocations import ALLOCATIONS, Allocation, Group
from bench.layer.contenders import Variant
from bench.layer.report import DECODE_BAR, PREFILL_BAR
from profiles.atomic import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 2


def draw(whole: pd.DataFrame, path: Path) -> None:
    """Write the picture of report.whole_layers' rows as PNG, atomically."""
    ours = whole[whole["variant"] == Variant.OURS.value]
    models = list(dict.fromkeys(ours["model"]))
    columns = min(COLUMNS, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(5.2 * columns + 2.6, 4.2 * rows), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    for axis, model in zip(grid.flat, models, strict=False):
        for item in ALLOCATIONS:
            line = ours[(ours["model"] == model) & (ours["allocation"] == item.name)].sort_values("tokens")
            if item.group is not Group.BF16 and not line.empty:
                axis.plot(line["tokens"], line["speedup"], label=item.name, **_style(item))
        for bar in (DECODE_BAR, PREFILL_BAR):
            axis.axhline(bar, color="#777777", lw=0.9, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(ours["tokens"].unique()), [str(each) for each in sorted(ours["tokens"].unique())])
        axis.minorticks_off()
        axis.set_title(model)
        axis.grid(alpha=0.3)
    for axis in list(grid.flat)[len(models) :]:
        axis.set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("tokens")
    for axis in grid[:, 0]:
        axis.set_ylabel("times as fast as the fastest bf16 layer")
    named = {text: line for axis in grid.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _style(item: Allocation) -> dict[str, Any]:
    """Uniform ones dashed, mixes solid; within each a colour and a marker."""
    named = [each for each in ALLOCATIONS if each.group is item.group]
    place = named.index(item)
    is_mix = item.group is Group.MIXED
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
        "linestyle": "-" if is_mix else "--",
        "linewidth": 1.5 if is_mix else 1.0,
        "markersize": 4,
    }
