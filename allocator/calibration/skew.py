"""A picture of how unevenly a trace's layers use their experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from profiles.loads import TokenLoad


def figure(loads: Mapping[int, TokenLoad]) -> Figure:
    """Left: each layer's experts, busiest first, as multiples of an even share. Right: its coefficient of variation."""
    layers = sorted(loads)
    shares = np.array([_relative(loads[layer]) for layer in layers])
    drawn = Figure(figsize=(11, max(3.0, 1.5 + 0.22 * len(layers))), layout="constrained")
    heat, bars = drawn.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    image = heat.imshow(shares, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    heat.set_xlabel("experts of a layer, busiest first")
    heat.set_ylabel("layer")
    heat.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    drawn.colorbar(image, ax=heat, label="tokens / even share", location="left")
    bars.barh(range(len(layers)), [loads[layer].spread for layer in layers], color="tab:gray")
    for row, layer in enumerate(layers):
        load = loads[layer]
        idle = load.num_experts - load.num_active
        text = f" {load.max / (load.total / load.num_experts):.1f}x" + (f", {idle} idle" if idle else "")
        bars.annotate(text, (load.spread, row), va="center", fontsize=8)
    bars.set_xlabel("std / mean (label: busiest / even)")
    bars.margins(x=0.25)
    drawn.suptitle(f"Tokens per expert: {next(iter(loads.values())).source.rpartition(', layer')[0]}")
    return drawn


def _relative(load: TokenLoad) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    counts = np.sort(np.asarray(load.tokens_per_expert, dtype=np.float64))[::-1]
    relative: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = counts / max(float(counts.mean()), 1e-300)
    return relative
