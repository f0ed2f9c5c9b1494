"""The Markdown of a `--measure` run: ours beside the others of the same run, and who failed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pandas as pd

from bench.peers.contenders import OURS
from bench.peers.measuring import CELL
from bench.peers.recorded import MEAN_BAR, RATIO_BAR, geometric_mean
from bench.peers.tables import one, table, two
from profiles.records import Status


def best(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a cell that ours finished: our fastest, the fastest other, its time over ours (above 1: ours is faster)."""
    done = measured[measured["status"] == Status.OK.value]
    rows = []
    for key, cell in done.groupby(list(CELL), sort=False):
        ours, others = cell[cell["contender"] == OURS], cell[cell["contender"] != OURS]
        if ours.empty:
            continue
        own = ours.nsmallest(1, "latency_us").iloc[0]
        other = None if others.empty else others.nsmallest(1, "latency_us").iloc[0]
        rows.append(
            {
                **dict(zip(CELL, key, strict=True)),
                "config": own["config"],
                "latency_us": own["latency_us"],
                "fraction": own["fraction"],
                "other": "" if other is None else f"{other['contender']} {other['config']}".strip(),
                "other_us": math.nan if other is None else other["latency_us"],
                "ratio": math.nan if other is None else other["latency_us"] / own["latency_us"],
            }
        )
    return pd.DataFrame(rows, columns=[*CELL, "config", "latency_us", "fraction", "other", "other_us", "ratio"])


def measured_markdown(measured: pd.DataFrame, *, command: str) -> str:
    """The whole report."""
    return "\n".join(_lines(measured, command)) + "\n"


def _lines(measured: pd.DataFrame, command: str) -> Iterator[str]:
    first, last = measured["timestamp"].min(), measured["timestamp"].max()
    yield from ("# Ours and others in one run", "", f"`{command}`", "")
    gpus = ", ".join(sorted(measured["gpu"].unique()))
    yield f"On {gpus}, {first} to {last}. Versions: {measured['versions'].iloc[-1]}"
    cells = best(measured)
    against = cells[cells["ratio"].notna()]
    yield from (
        "",
        f"Ours is at least as fast in {int((against['ratio'] >= RATIO_BAR).sum())} of {len(against)} cells;",
    )
    yield f"geometric mean of theirs over ours {two(geometric_mean(against['ratio']))}, where {MEAN_BAR} is wanted."
    yield from ("Cells without another are schemes that none of them runs.", "")
    formats = {**dict.fromkeys(("model", "linear", "tokens", "draw", "scheme", "config"), str)}
    yield from table(
        cells,
        {**formats, "latency_us": one, "fraction": two, "other": str, "other_us": one, "ratio": two},
        [
            *(
                "model",
                "linear",
                "tokens",
                "draw",
                "scheme",
                "configuration",
                "ours us",
                "of roofline",
                "fastest other",
            ),
            *("its us", "theirs / ours"),
        ],
    )
    failed = measured[measured["status"] != Status.OK.value]
    yield from ("", f"## Failures: {len(failed)}", "")
    names = ("model", "linear", "tokens", "draw", "scheme", "contender", "config", "status", "error")
    yield from table(failed, dict.fromkeys(names, str), names)
