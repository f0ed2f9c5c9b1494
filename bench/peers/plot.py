"""The picture: fraction of the roofline against tokens, ours solid and the peers dashed.

A row a model; for each linear two panels, bf16 tokens and 8-bit tokens, since all schemes in one would hide each other.
A band reaches from our fraction down to the one with the cost of launching: the peers' floor added, or as measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.peers.published import Key, Peer
from bench.peers.recorded import SKEWED
from bench.peers.report import REPRESENTATIVES
from bench.peers.roofline import PeerClass
from profiles.atomic import replacing
from profiles.models import Linear

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    PeerClass.BF16: "#000000",
    PeerClass.W8A16: "#0072B2",
    PeerClass.W4A16: "#009E73",
    PeerClass.W2A16: "#D55E00",
    PeerClass.W8A8_FP8: "#0072B2",
    PeerClass.W8A8_INT8: "#56B4E9",
    PeerClass.W4A8_FP8: "#D55E00",
    PeerClass.W4A8_INT8: "#E69F00",
}
WITHOUT_PEERS = {"w3a16_g128_sym": "#CC79A7"}
WIDE = (PeerClass.BF16, PeerClass.W8A16, PeerClass.W4A16, PeerClass.W2A16)
GROUPS = {"bf16 tokens": WIDE, "8-bit tokens": tuple(group for group in PeerClass if group not in WIDE)}


BAND = "with 4.8 us of launch added"
TOP = 1.4
"""int8 reaches more of the tensor cores than cuBLAS does in the product that its peak is taken from."""


def draw(compared: pd.DataFrame, peers: Mapping[Key, Peer], path: Path, *, band: str = BAND) -> None:
    """Write the picture as PNG, atomically. band: what its lower edge is."""
    skewed = compared[compared["load"] == SKEWED]
    models = sorted({key[0] for key in peers})
    columns = [(linear.value, title) for linear in Linear for title in GROUPS]
    figure = Figure(figsize=(19, 3.5 * len(models) + 1.5), layout="constrained", dpi=110)
    axes = figure.subplots(len(models), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, model in enumerate(models):
        for column, (linear, title) in enumerate(columns):
            axis = axes[row][column]
            _panel(axis, skewed[(skewed["model"] == model) & (skewed["linear"] == linear)], title)
            _peers(axis, peers, model, linear, GROUPS[title])
            axis.set_title(f"{model} {linear}, {title}", fontsize=10)
        axes[row][0].set_ylabel("fraction of the roofline")
    for axis in axes[-1]:
        axis.set_xlabel("tokens (before top-k)")
    for column, (_, title) in enumerate(columns[: len(GROUPS)]):
        axes[0][column].legend(handles=_legend(title), fontsize=7.5, loc="lower right", ncols=2, framealpha=0.9)
    figure.suptitle(
        f"Fraction of the roofline on an H200, skewed loads: ours solid (band: {band}), fastest public kernel dashed",
        fontsize=12,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    wanted = {REPRESENTATIVES[group]: COLOURS[group] for group in GROUPS[title]}
    if GROUPS[title] is WIDE:
        wanted |= WITHOUT_PEERS
    for scheme, colour in wanted.items():
        line = rows[rows["scheme"] == scheme].sort_values("tokens")
        if line.empty:
            continue
        axis.plot(line["tokens"], line["fraction"], color=colour, marker="o", markersize=4, linewidth=1.8)
        axis.fill_between(line["tokens"], line["fraction_with_floor"], line["fraction"], color=colour, alpha=0.13, lw=0)
    if rows[rows["scheme"].isin(wanted)].empty:
        axis.text(0.5, 0.05, "ours: none", transform=axis.transAxes, ha="center", fontsize=9)
    axis.axhline(1.0, color="#888888", linewidth=0.8)
    axis.set_xscale("log", base=2)
    ticks = (1, 16, 64, 512, 2048, 8192)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0, TOP)
    axis.grid(alpha=0.3)


def _peers(axis: Axes, peers: Mapping[Key, Peer], model: str, linear: str, groups: tuple[PeerClass, ...]) -> None:
    for group in groups:
        points = sorted(
            (key[2], peer.fraction) for key, peer in peers.items() if key[:2] == (model, linear) and key[3] is group
        )
        axis.plot(
            [tokens for tokens, _ in points],
            [fraction for _, fraction in points],
            color=COLOURS[group],
            linestyle=(0, (4, 2)),
            marker="x",
            markersize=5,
            linewidth=1.2,
        )


def _legend(title: str) -> list[Line2D]:
    handles = [Line2D([], [], color=COLOURS[group], lw=2, label=REPRESENTATIVES[group]) for group in GROUPS[title]]
    if GROUPS[title] is WIDE:
        handles += [
            Line2D([], [], color=colour, lw=2, label=f"{name} (no peer)") for name, colour in WITHOUT_PEERS.items()
        ]
    handles.append(Line2D([], [], color="#444444", lw=1.2, linestyle=(0, (4, 2)), marker="x", label="fastest peer"))
    return handles
