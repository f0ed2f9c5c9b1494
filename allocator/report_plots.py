"""A report's pictures: the front, bits per expert and layer, where time goes."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from allocator.report_data import ReportData, stored_bits
from allocator.sensitivity import SHARED_EXPERT
from profiles.models import Linear, MoeShape

DPI = 130
_INK, _MIXED, _UNIFORM = "#22303c", "#0b6e8a", "#b8562f"


def plots(data: ReportData, shape: MoeShape) -> dict[str, bytes]:
    """PNG by name: `bits` always; `front` with losses to show; `time` with a cost table."""
    drawn = {"front": front_figure(data), "bits": bits_figure(data, shape)}
    if data.time:
        drawn["time"] = time_figure(data)
    return {name: _png(figure) for name, figure in drawn.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def front_figure(data: ReportData) -> Figure:
    """Loss against stored bits: the front, what is proven below it, uniform schemes, this allocation."""
    allocation = data.allocation
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.subplots()
    if data.front:
        bits = [point.avg_weight_bits for point in data.front]
        axes.plot(bits, [p.loss for p in data.front], "-o", color=_MIXED, ms=4, lw=1.6, label="mixed, least loss found")
    uniform = allocation.uniform
    for one in uniform:
        filled = _UNIFORM if one.within_budget else "none"
        axes.plot(one.avg_weight_bits, one.loss, "s", mec=_UNIFORM, mfc=filled, ms=6)
    _labels(axes, {u.scheme.name: (u.avg_weight_bits, u.loss) for u in uniform})
    axes.plot([], [], "s", color=_UNIFORM, ls="none", label="uniform scheme (hollow: beyond the budget)")
    axes.plot(
        allocation.avg_weight_bits, allocation.predicted_loss, "*", color="#d9a400", mec=_INK, ms=16, zorder=5,
        label="this allocation",
    )  # fmt: skip
    if allocation.budget.avg_weight_bits is not None:
        axes.axvline(allocation.budget.avg_weight_bits, color=_INK, lw=0.8, ls=":", label="budget")
    losses = [p.loss for p in data.front] + [u.loss for u in uniform] + [allocation.predicted_loss]
    positive = [loss for loss in losses if loss > 0]
    if positive and max(positive) > 20 * min(positive):
        if min(losses) > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(min(0.0, *losses) - min(positive) / 2, 2 * max(positive))
    axes.set_xlabel("stored bits per weight (scales and zero points counted)")
    axes.set_ylabel(f"predicted loss: {allocation.sensitivity.get('metric', 'loss')}", wrap=True)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5)
    axes.margins(x=0.09, y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _labels(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points; of those close in bits, above and below by turns."""
    last, turn = -np.inf, 0
    for name, (x, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        turn = (turn + 1) % 3 if x - last < 1.2 else 0
        last = x
        axes.annotate(
            name, (x, y), xytext=(7, (4, -9, 13)[turn]), textcoords="offset points", fontsize=7, color=_UNIFORM
        )


def bits_figure(data: ReportData, shape: MoeShape) -> Figure:
    """A heat map for each linear: layers down, experts across, the shared expert first; stored bits per weight."""
    assignment = data.allocation.assignment
    layers = sorted({block.layer for block in assignment})
    experts = sorted({block.expert for block in assignment})
    grids = {linear: np.full((len(layers), len(experts)), np.nan) for linear in Linear}
    row_of = {layer: i for i, layer in enumerate(layers)}
    column_of = {expert: i for i, expert in enumerate(experts)}
    for block, scheme in assignment.items():
        grids[block.linear][row_of[block.layer], column_of[block.expert]] = stored_bits(block, scheme, shape)
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    figure = Figure(figsize=(12, min(12.0, max(2.6, 1.5 + 0.26 * len(layers)))), layout="constrained")
    panels = figure.subplots(1, len(grids), sharey=True)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
    image = None
    for axis, (linear, grid) in zip(panels, grids.items(), strict=True):
        image = axis.imshow(
            grid, aspect="auto", cmap=colours, interpolation="nearest", vmin=values.min() - 0.01, vmax=values.max()
        )
        axis.set_title(linear.value, fontsize=11)
        axis.set_xlabel("expert" + (" (S: shared)" if SHARED_EXPERT in experts else ""))
        step = max(1, len(experts) // 16)
        ticks = [i for i, e in enumerate(experts) if e == SHARED_EXPERT or e % step == 0]
        axis.set_xticks(ticks, ["S" if experts[i] == SHARED_EXPERT else str(experts[i]) for i in ticks], fontsize=8)
        if len(layers) <= 40 and len(experts) <= 64:
            axis.set_xticks(np.arange(0.5, len(experts) - 1), minor=True)
            axis.set_yticks(np.arange(0.5, len(layers) - 1), minor=True)
            axis.grid(which="minor", color="white", lw=0.6)
            axis.tick_params(which="minor", length=0)
    step = max(1, len(layers) // 24)
    panels[0].set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    panels[0].set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="stored bits per weight", pad=0.012)
    return figure


def time_figure(data: ReportData) -> Figure:
    """A bar for each scenario: its launches' shares by linear and scheme."""
    scenarios = list(dict.fromkeys(share.scenario for share in data.time))
    parts = sorted({(share.linear, share.scheme) for share in data.time}, key=_launch_order)
    names = list(dict.fromkeys(scheme for _, scheme in parts))
    linears = list(dict.fromkeys(linear for linear, _ in parts))
    colour = {name: matplotlib.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    hatch = dict(zip(linears, ("", "////", "....", "xxxx"), strict=False))
    figure = Figure(figsize=(11, 1.6 + 0.62 * len(scenarios) + 0.1 * len(parts)), layout="constrained")
    axes = figure.subplots()
    total = {s: sum(share.latency_us for share in data.time if share.scenario == s) for s in scenarios}
    left = dict.fromkeys(scenarios, 0.0)
    for linear, scheme in parts:
        us = {s.scenario: s.latency_us for s in data.time if (s.linear, s.scheme) == (linear, scheme)}
        widths = [us.get(s, 0.0) / total[s] for s in scenarios]
        bars = axes.barh(
            range(len(scenarios)), widths, left=[left[s] for s in scenarios], height=0.66, color=colour[scheme],
            hatch=hatch[linear], edgecolor="white", lw=0.6, label=f"{linear}  {scheme}",
        )  # fmt: skip
        texts = [f"{width:.0%}" if width > 0.045 else "" for width in widths]
        axes.bar_label(bars, labels=texts, label_type="center", fontsize=8, color=_INK,
                       bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.2})  # fmt: skip
        for s, width in zip(scenarios, widths, strict=True):
            left[s] += width
    axes.set_yticks(range(len(scenarios)), [f"{_short(s)}\n{total[s]:,.0f} us" for s in scenarios], fontsize=8.5)
    axes.set_ylim(len(scenarios) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.set_xlabel("share of the scenario's latency, all layers")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _launch_order(part: tuple[str, str]) -> tuple[bool, bool, str]:
    """gate_up before down, the shared expert's last."""
    linear, scheme = part
    return linear.startswith("shared"), not linear.endswith(Linear.GATE_UP.value), scheme


def _short(scenario: str) -> str:
    """A load's name without its seed, to fit beside a bar."""
    return scenario.partition(", seed")[0]
