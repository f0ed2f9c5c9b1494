"""What `bench.speed_curve report` says: allocations of equal perplexity side by side, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from profiles.atomic import replacing

EQUAL_PERPLEXITY = 0.001
"""Relative. Perplexities this close count as equal: the text is too short to tell them apart."""

LIMITS = (1.15, 1.3, 1.5)
"""Of the fastest allocation's time."""
LEAST = 1e-5
"""Lower perplexities than the model's own are drawn here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One allocation under one load, microseconds of all layers: shares of launches in one scheme added up, its
    launches as the latency model has them, and as measured.

    beside: the fastest uniform scheme, as measured, whose perplexity is no worse; faster: than it; faster_added: than
    the fastest such scheme, where all are added up. beside_kl, faster_kl: of those that have no more KL.
    """

    name: str
    is_mixed: bool
    avg_weight_bits: float
    perplexity: float
    mean_kl: float
    added_us: float
    predicted_us: float
    measured_us: float
    beside: str | None = None
    faster: float | None = None
    faster_added: float | None = None
    beside_kl: str | None = None
    faster_kl: float | None = None


def compared(rows: Sequence[Row]) -> list[Row]:
    """Each mixed row beside the fastest uniform scheme whose perplexity is at most EQUAL_PERPLEXITY worse, and beside
    the fastest that has no more KL.
    """
    uniform = [row for row in rows if not row.is_mixed]
    found = []
    for row in rows:
        no_worse = [one for one in uniform if one.perplexity <= row.perplexity * (1 + EQUAL_PERPLEXITY)]
        no_more = [one for one in uniform if one.mean_kl <= row.mean_kl]
        if row.is_mixed and no_worse:
            best = min(no_worse, key=lambda one: one.measured_us)
            faster_added = min(one.added_us for one in no_worse) / row.added_us - 1
            faster = best.measured_us / row.measured_us - 1
            row = replace(row, beside=best.name, faster=faster, faster_added=faster_added)
        if row.is_mixed and no_more:
            best = min(no_more, key=lambda one: one.measured_us)
            row = replace(row, beside_kl=best.name, faster_kl=best.measured_us / row.measured_us - 1)
        found.append(row)
    return found


def markdown(curves: Mapping[str, Sequence[Row]], batches: Mapping[str, int], exact: float) -> str:
    """One table a load, and how far predictions are from what was measured."""
    lines = [f"Own perplexity {exact:.4f}. Microseconds of all layers' routed experts.", ""]
    for scenario, rows in curves.items():
        lines += [
            f"### {batches[scenario]} tokens",
            "",
            "| | bits | perplexity | KL | added up, us | predicted launches, us | measured launches, us"
            " | fastest uniform no worse | faster | added up | fastest uniform of no more KL | faster |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(rows, key=lambda one: (one.is_mixed, one.measured_us)):
            beside, beside_kl = "| | | ", "| | |"
            if row.faster is not None:
                beside = f"| {row.beside} | {row.faster:+.1%} | {row.faster_added:+.1%} "
            if row.faster_kl is not None:
                beside_kl = f"| {row.beside_kl} | {row.faster_kl:+.1%} |"
            lines.append(
                f"| {row.name} | {row.avg_weight_bits:.2f} | {row.perplexity:.4f} | {row.mean_kl:.5f} |"
                f" {row.added_us:.0f} | {row.predicted_us:.0f} | {row.measured_us:.0f} {beside}{beside_kl}"
            )
        lines.append("")
    lines += [
        "Predicted against measured: median and largest error, and Spearman's rank correlation.",
        "",
        "| load | allocations | added up | launches by the latency model | rank correlation, launches |",
        "|---|---|---|---|---|",
    ]
    for scenario, rows in curves.items():
        for what, some in (
            ("uniform", [r for r in rows if not r.is_mixed]),
            ("mixed", [r for r in rows if r.is_mixed]),
        ):
            took = np.array([row.measured_us for row in some])
            cells = []
            for kind in ("added_us", "predicted_us"):
                error = np.array([getattr(row, kind) for row in some]) / took - 1
                cells.append(f"{np.median(np.abs(error)):.1%}, {error[np.abs(error).argmax()]:+.1%}")
            rank = spearmanr([row.predicted_us for row in some], took).statistic
            lines.append(f"| {batches[scenario]} tokens | {len(some)} {what} | {cells[0]} | {cells[1]} | {rank:.2f} |")
    return "\n".join([*lines, "", *_reranked(curves, batches)]) + "\n"


def _reranked(curves: Mapping[str, Sequence[Row]], batches: Mapping[str, int]) -> list[str]:
    """Of least KL within a limit: what predicted launches pick, and what measured ones do."""
    lines = [
        "Re-ranked: least KL within a limit, by predicted launches and by measured ones.",
        "",
        "| load | limit, us | picked as predicted | it took, us | picked as measured | it took, us |",
        "|---|---|---|---|---|---|",
    ]
    for scenario, rows in curves.items():
        for factor in LIMITS:
            limit = factor * min(row.measured_us for row in rows)
            cells = []
            for kind in ("predicted_us", "measured_us"):
                within = [row for row in rows if getattr(row, kind) <= limit]
                best = min(within, key=lambda row: row.mean_kl, default=None)
                cells.append("none | " if best is None else f"{best.name} | {best.measured_us:.0f}")
            lines.append(f"| {batches[scenario]} tokens | {limit:.0f} | {cells[0]} | {cells[1]} |")
    return lines


def plot(curves: Mapping[str, Sequence[Row]], batches: Mapping[str, int], exact: float, out: Path) -> None:
    """KL and excess perplexity over measured time, a column a load."""
    figure = Figure(figsize=(4.8 * len(curves), 8), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (scenario, rows) in enumerate(curves.items()):
        for line, (name, values) in enumerate((
            ("KL, nats a token", {row.name: row.mean_kl for row in rows}),
            ("perplexity above the model's own", {row.name: row.perplexity / exact - 1 for row in rows}),
        )):  # fmt: skip
            panel = axes[line, column]
            for is_mixed, label, style in ((False, "uniform", "s"), (True, "mixed", "o-")):
                some = sorted((row for row in rows if row.is_mixed == is_mixed), key=lambda row: row.measured_us)
                at = [(row.measured_us, max(values[row.name], LEAST)) for row in some]
                panel.plot(*zip(*at, strict=True), style, label=label, markersize=6)
                for row, place in zip(some, at, strict=True):
                    panel.annotate(
                        "" if is_mixed else row.name, place, fontsize=6, rotation=25, xytext=(3, 3),
                        textcoords="offset points",
                    )  # fmt: skip
            panel.set(yscale="log", xlabel="measured launches, us")
            panel.margins(x=0.15, y=0.12)
            panel.set_ylabel(name if column == 0 else "")
        axes[0, column].set_title(f"{batches[scenario]} tokens")
    axes[0, 0].legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
