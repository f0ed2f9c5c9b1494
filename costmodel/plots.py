"""Plots of an evaluation, as PNG bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from costmodel.evaluation import MODEL, Evaluation, HeldOutResult
from costmodel.groups import launch_ids
from costmodel.regret import regrets

Array = npt.NDArray[np.float64]
_MODEL_COLOUR = "#1f5fa8"
_LARGEST_TOP = 8


def figures(found: Evaluation) -> Iterator[tuple[str, bytes]]:
    """(title, PNG) of each plot."""
    yield "Predicted against measured", _png(_predicted_against_measured(found))
    yield "Error by regime", _png(_error_by_regime(found))
    yield "Coverage of the intervals", _png(_coverage(found))
    yield "Regret against configurations measured", _png(_regret_curves(found))


def _predicted_against_measured(found: Evaluation) -> Figure:
    figure, axes = _grid(found)
    for axis, (kind, result) in zip(axes, found.results.items(), strict=True):
        tested = np.isfinite(result.predictions[MODEL])
        y, predicted = found.latency_us[tested], result.predictions[MODEL][tested]
        axis.plot([y.min(), y.max()], [y.min(), y.max()], color="black", linewidth=0.8)
        axis.plot(y, predicted, ".", color=_MODEL_COLOUR, markersize=2.5, alpha=0.5)
        axis.set(
            xscale="log", yscale="log", title=f"unseen {kind.value}", xlabel="measured, us", ylabel="predicted, us"
        )
    return figure


def _error_by_regime(found: Evaluation) -> Figure:
    """Of the first kind that was held out: how the error goes with size, with what bounds it and with the family."""
    kind, result = next(iter(found.results.items()))
    tested = np.isfinite(result.predictions[MODEL])
    error = np.abs(result.predictions[MODEL][tested] / found.latency_us[tested] - 1.0)
    X = found.features[tested]
    bits = X["weight_bits"].round().astype(int).astype(str) + " bits"
    family = np.where(X["is_wgmma"] > 0, "wgmma", "mma")
    regimes = {
        "tokens in all": _binned(X["num_tokens"].to_numpy(), [0, 8, 64, 512, 4096, np.inf]),
        "makespan over DRAM time": _binned(X["makespan_per_dram"].to_numpy(), [0, 0.5, 0.9, 1.1, 2, np.inf]),
        "family": family,
        "weights": bits.to_numpy(),
    }
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axis, (name, labels) in zip(np.atleast_1d(figure.subplots(1, len(regimes))), regimes.items(), strict=True):
        names = sorted(set(labels), key=_as_ordered)
        axis.boxplot([error[labels == each] for each in names], tick_labels=names, showfliers=False, whis=(5, 95))
        axis.tick_params(axis="x", labelrotation=30)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_title(name)
    figure.suptitle(f"error on unseen {kind.value}: quartiles, and 5% to 95%")
    return figure


def _coverage(found: Evaluation) -> Figure:
    """Coverage group by group: the whole should be near 90%, and no group far below."""
    figure, axes = _grid(found)
    for axis, (kind, result) in zip(axes, found.results.items(), strict=True):
        shares = np.sort(_coverage_of_groups(found.latency_us, result))
        axis.bar(np.arange(len(shares)), shares, color=_MODEL_COLOUR, width=0.9)
        axis.axhline(0.9, color="black", linewidth=0.8)
        whole = result.metrics[MODEL].coverage_90
        axis.set(title=f"unseen {kind.value}: {100 * (whole or 0):.1f}%", xlabel="groups, sorted", ylim=(0, 1))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _coverage_of_groups(y: Array, result: HeldOutResult) -> Array:
    inside = (result.interval_us[:, 0] <= y) & (y <= result.interval_us[:, 1])
    groups = sorted({label for label in result.labels if label is not None})
    return np.asarray([inside[result.labels == group].mean() for group in groups])


def _regret_curves(found: Evaluation) -> Figure:
    launches = launch_ids(found.profile)
    figure, axes = _grid(found)
    for axis, (kind, result) in zip(axes, found.results.items(), strict=True):
        tested = np.isfinite(result.predictions[MODEL])
        for name, predicted in result.predictions.items():
            curve = [
                regrets(found.latency_us[tested], predicted[tested], launches[tested], top)[1]
                for top in range(1, _LARGEST_TOP + 1)
            ]
            if not len(curve[0]):
                continue
            is_model = name == MODEL
            style = {"color": _MODEL_COLOUR, "linewidth": 2.2} if is_model else {"linewidth": 1.0}
            axis.plot(range(1, _LARGEST_TOP + 1), [each.mean() for each in curve], label=name, marker=".", **style)
        axis.set(title=f"unseen {kind.value}", xlabel="best predicted ones measured")
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes[0].legend(fontsize=7)
    return figure


def _as_ordered(label: str) -> tuple[bool, float, str]:
    """By the number in a label, "over" after "to"; labels without a number by name."""
    number = re.search(r"\d+(\.\d+)?", label)
    return label.startswith("over"), float(number[0]) if number else 0.0, label


def _binned(values: Array, edges: list[float]) -> npt.NDArray[np.str_]:
    names = [f"to {edge:g}" for edge in edges[1:-1]] + [f"over {edges[-2]:g}"]
    return np.asarray(names)[np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(names) - 1)]


def _grid(found: Evaluation) -> tuple[Figure, list[Axes]]:
    """One axis a kind of held-out group."""
    count = len(found.results)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.5 * columns, 3.2 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, axes


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
