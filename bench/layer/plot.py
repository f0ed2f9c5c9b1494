"""The picture: how many times as fast as the fastest bf16 layer, against tokens; a panel a model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.layer.allocations import ALLOCATIONS, BF16, Group
from bench.layer.contenders import Variant
from bench.layer.report import DECODE_BAR, PREFILL_BAR
from profiles.atomic import replacing

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(whole: pd.DataFrame, path: Path) -> None:
    """Write the picture of report.whole_layers' rows as PNG, atomically."""
    ours = whole[whole["variant"] == Variant.OURS.value]
    models = list(dict.fromkeys(ours["model"]))
    figure = Figure(figsize=(6.2 * len(models), 5.5), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models, strict=True):
        for group, style in ((Group.UNIFORM, "--"), (Group.MIXED, "-")):
            named = [item for item in ALLOCATIONS if item.group is group and item.name != BF16.name]
            for item, colour in zip(named, COLOURS, strict=False):
                line = ours[(ours["model"] == model) & (ours["allocation"] == item.name)].sort_values("tokens")
                if not line.empty:
                    axis.plot(line["tokens"], line["speedup"], style, color=colour, marker="o", ms=3, label=item.name)
        for bar in (DECODE_BAR, PREFILL_BAR):
            axis.axhline(bar, color="#999999", lw=0.8, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_title(model)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times as fast as the fastest bf16 layer")
    axes[0].legend(fontsize=7.5, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
