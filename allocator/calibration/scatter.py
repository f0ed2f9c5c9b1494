"""A picture of predicted against measured loss, budget by budget."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from allocator.calibration.additivity import Additivity, Correction


def figure(found: Additivity, title: str) -> Figure:
    """A panel for each group of allocations: predicted loss across, measured KL up, both logarithmic, coloured by
    average bits. The line is the prediction times one factor, that of all groups together.
    """
    number = len(found.groups)
    drawn = Figure(figsize=(4.4 * number, 4.2), layout="constrained")
    predicted = found.predicted[found.chosen]
    factor = float(np.exp(np.mean(np.log(found.measured_kl) - np.log(predicted))))
    correlations = found.correlations(found.chosen)
    panels = drawn.subplots(1, number, squeeze=False)[0]
    points = None
    for panel, (name, indices) in zip(panels, found.groups.items(), strict=True):
        rows = list(indices)
        ends = np.array([predicted[rows].min(), predicted[rows].max()])
        panel.plot(ends, factor * ends, color="tab:gray", lw=1, label=f"{factor:.2f} x predicted")
        points = panel.scatter(
            predicted[rows], found.measured_kl[rows], c=found.avg_bits[rows], s=14, cmap="viridis",
            vmin=found.avg_bits.min(), vmax=found.avg_bits.max(),
        )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="predicted loss")
        panel.set_title(f"{name}: {len(rows)} allocations\nSpearman {correlations[name]:.3f}", fontsize="medium")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
            axis.set_minor_locator(NullLocator())
        panel.legend(loc="upper left", frameon=False)
    panels[0].set_ylabel("measured KL on held-out text, nats a token")
    if points is not None:
        drawn.colorbar(points, ax=list(panels), label="average bits a weight")
    how = "sum of losses" if found.chosen is Correction.NONE else f"losses with {found.chosen.value}"
    drawn.suptitle(f"{title}: {how}")
    return drawn
