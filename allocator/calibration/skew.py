"""A picture of how unevenly a trace's layers use their experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from profiles.atomic import replacing
from profiles.errors import DataError
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


def write(loads: Mapping[int, TokenLoad], path: Path) -> None:
    """The figure in a file whose suffix matplotlib knows. DataError: another suffix, or it cannot be written."""
    kind = kind_of(path)
    try:
        with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "bitile"}):
            figure(loads).savefig(temporary, format=kind, dpi=120)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def kind_of(path: Path) -> str:
    """The picture's format by its name. DataError: none that matplotlib knows."""
    kinds = Figure().canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in kinds:
        raise DataError(f"{path}: a picture ends in {', '.join(f'.{kind}' for kind in sorted(kinds))}")
    return kind


def _relative(load: TokenLoad) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    counts = np.sort(np.asarray(load.tokens_per_expert, dtype=np.float64))[::-1]
    relative: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = counts / max(float(counts.mean()), 1e-300)
    return relative
