"""The Markdown of a `--measure` run: ours beside the run's others and the published fractions, and who failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from bench.peers.cells import CELL
from bench.peers.contenders import OURS
from bench.peers.published import Key, Peer
from bench.peers.recorded import MEAN_BAR, RATIO_BAR, SKEWED, geometric_mean
from bench.peers.report import bars
from bench.peers.roofline import PEER_LAUNCH_FLOOR_US, peer_class
from bench.peers.routing import Draw, draw_load
from bench.peers.tables import Formats, one, table, two
from profiles import kernels, schemes
from profiles.models import model
from profiles.records import Status

OWN = ("model", "linear", "tokens", "scheme", "config", "single_us", "floor_us", "reference_ratio", "is_memory_bound")
LIMIT = ("roofline_us", "is_memory_bound", "bar")


def against_published(measured: pd.DataFrame, peers: Mapping[Key, Peer]) -> pd.DataFrame:
    """A row a cell of the peers' draw that they published and ours finished: ours timed as they were, one launch a
    replay. `ratio`: our fraction of the roofline over theirs, with the peers' cost of a replay in place of ours;
    `ratio_raw`: with our own; `ratio_in_a_row`: of many launches a replay, which hide what a launch costs.
    """
    ours = measured[
        (measured["status"] == Status.OK.value)
        & (measured["contender"] == OURS)
        & (measured["draw"] == Draw.PEERS.value)
    ]
    rows = []
    for _, cell in ours.groupby(list(CELL), sort=False):
        own = cell.nsmallest(1, "single_us").iloc[0]
        group = peer_class(schemes.parse(own["scheme"]))
        peer = None if group is None else peers.get((own["model"], own["linear"], int(own["tokens"]), group))
        if group is None or peer is None:
            continue
        as_theirs_us = own["single_us"] - own["floor_us"] + PEER_LAUNCH_FLOOR_US
        fraction = own["roofline_us"] / as_theirs_us
        rows.append(
            {
                **{name: own[name] for name in OWN},
                "peer_class": group.value,
                "as_theirs_us": as_theirs_us,
                "fraction": fraction,
                "peer": peer.name,
                "peer_fraction": peer.fraction,
                "ratio": fraction / peer.fraction,
                "ratio_raw": own["roofline_us"] / own["single_us"] / peer.fraction,
                "ratio_in_a_row": own["roofline_us"] / cell["latency_us"].min() / peer.fraction,
                "padding": _padding(own),
            }
        )
    names = ["peer_class", "as_theirs_us", "fraction", "peer", "peer_fraction", "ratio", "ratio_raw"]
    names += ["ratio_in_a_row", "padding"]
    return pd.DataFrame(rows, columns=[*OWN, *names])


def _padding(row: pd.Series) -> float:
    """Token rows that the configuration's tiles multiply over token rows."""
    shape = model(row["model"])
    load = draw_load(Draw(row["draw"]), shape.num_experts, int(row["tokens"]), shape.top_k, int(row["seed"]))
    config = kernels.parse(row["config"])
    return sum(sum(config.token_tile_widths(count)) for count in load.tokens_per_expert) / load.total


def of_roofline(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a cell of the peers' draw: our fastest, its fraction by itself and, `fraction_with_floor`, as one launch a
    replay with the peers' floor, and the bar that it must reach; columns as bench.peers.plot and report.bars take them.
    """
    cells = best(measured)
    cells = cells[cells["draw"] == Draw.PEERS.value]
    ours = measured[(measured["contender"] == OURS) & (measured["status"] == Status.OK.value)]
    ours = ours.assign(single_us=ours["single_us"] - ours["floor_us"] + PEER_LAUNCH_FLOOR_US)
    limits = ours.groupby(list(CELL)).agg({"single_us": "min", **dict.fromkeys(LIMIT, "first")}).reset_index()
    found = cells.merge(limits, on=list(CELL), validate="one_to_one")
    return found.assign(
        load=SKEWED,
        fraction_with_floor=found["roofline_us"] / found["single_us"],
        bound=found["is_memory_bound"].map({True: "memory", False: "compute"}),
        roofline_bar=found["bar"],
    )


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


def measured_markdown(measured: pd.DataFrame, peers: Mapping[Key, Peer], *, command: str) -> str:
    """The whole report: what it comes to, then what falls short, then every cell."""
    published, cells = against_published(measured, peers), best(measured)
    lines = [
        *_head(measured, command),
        *_means_of(published),
        *_in_one_run(cells),
        *_below(published),
        *_bars(measured),
        *_published_cells(published),
        *_cells(cells),
        *failures(measured),
    ]
    return "\n".join(lines) + "\n"


def _head(measured: pd.DataFrame, command: str) -> Iterator[str]:
    first, last = measured["timestamp"].min(), measured["timestamp"].max()
    yield from ("# Ours and others in one run", "", f"`{command}`", "")
    gpus = ", ".join(sorted(measured["gpu"].unique()))
    yield f"On {gpus}, {first} to {last}. Versions: {measured['versions'].iloc[-1]}"
    cells = measured.drop_duplicates(subset=list(CELL))
    yield ""
    yield (
        f"{len(cells)} cells: " + "; ".join(f"{by} {_counted(cells[by])}" for by in ("draw", "tokens", "scheme")) + "."
    )


def _counted(values: pd.Series) -> str:
    counts = values.value_counts().sort_index()
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _means_of(published: pd.DataFrame) -> Iterator[str]:
    yield from ("", "## Against the published fractions", "")
    floor = two(published["floor_us"].median())
    yield "The same loads in distribution, one launch a replay, L2 cold: as the peers were timed, on another H200."
    yield f"A replay of nothing costs {PEER_LAUNCH_FLOOR_US} us in their times and {floor} here, which `ratio`, our"
    yield f"fraction of the roofline over theirs, puts right; `raw` does not. Wanted: {RATIO_BAR:g} in every cell,"
    yield f"{MEAN_BAR} in the mean."
    for by in ("tokens", "peer_class", "scheme", "model", "linear"):
        found = [_mean(by, value, rows) for value, rows in [*published.groupby(by, sort=True), ("all", published)]]
        frame = pd.DataFrame(found, columns=[by, "cells", "mean", "below", "least", "raw"])
        numbers: Formats = {by: str, "cells": str, "mean": two, "below": str, "least": two, "raw": two}
        yield from ("", *table(frame, numbers, [by, "cells", "ratio", "below 1", "least", "raw"]))
    yield from ("", "By class and tokens: ratio, and cells below 1 of how many.", "", *_by_class_and_tokens(published))


def _by_class_and_tokens(published: pd.DataFrame) -> Iterator[str]:
    sizes = sorted(published["tokens"].unique())
    yield "| peer_class | " + " | ".join(map(str, sizes)) + " |"
    yield "|---" * (len(sizes) + 1) + "|"
    for group, rows in published.groupby("peer_class", sort=True):
        ratios = (rows[rows["tokens"] == size]["ratio"] for size in sizes)
        texts = (f"{two(geometric_mean(each))}, {int((each < RATIO_BAR).sum())} of {len(each)}" for each in ratios)
        yield f"| {group} | " + " | ".join(texts) + " |"


def _mean(by: str, value: object, rows: pd.DataFrame) -> dict[str, Any]:
    return {
        by: value,
        "cells": len(rows),
        "mean": geometric_mean(rows["ratio"]),
        "below": int((rows["ratio"] < RATIO_BAR).sum()),
        "least": rows["ratio"].min(),
        "raw": geometric_mean(rows["ratio_raw"]),
    }


def _in_one_run(cells: pd.DataFrame) -> Iterator[str]:
    against = cells[cells["ratio"].notna()]
    yield from ("", "## Against the others of this run", "")
    yield f"Torch's and Triton's kernels. Ours is at least as fast in {int((against['ratio'] >= RATIO_BAR).sum())} of"
    yield f"{len(against)} cells; geometric mean of theirs over ours {two(geometric_mean(against['ratio']))}."
    groups = against.groupby(["scheme", "draw", "tokens"])["ratio"]
    frame = pd.DataFrame(
        [
            (scheme, draw, str(tokens), str(len(ratios)), geometric_mean(ratios), ratios.min())
            for (scheme, draw, tokens), ratios in groups
        ],
        columns=["scheme", "draw", "tokens", "cells", "mean", "least"],
    )
    formats: Formats = {**dict.fromkeys(("scheme", "draw", "tokens", "cells"), str), "mean": two, "least": two}
    yield from ("", *table(frame, formats, ["scheme", "draw", "tokens", "cells", "theirs / ours", "least"]))


def _below(published: pd.DataFrame) -> Iterator[str]:
    below = published[published["ratio"] < RATIO_BAR]
    yield from ("", f"## Below the published fraction: {len(below)} of {len(published)} cells", "")
    yield "In a row: many launches a replay, which hide what starting one costs. Padding: token rows of the tiles over"
    yield "token rows. Reference: how much longer a fixed bf16 GEMM took meanwhile than on the calm GPU."
    yield from ("", *_published_table(below))


def _published_cells(published: pd.DataFrame) -> Iterator[str]:
    yield from ("", "## Cells that peers published", "")
    yield from _published_table(published)


def _published_table(cells: pd.DataFrame) -> Iterator[str]:
    formats: Formats = {
        **dict.fromkeys(("model", "linear", "tokens", "scheme", "config"), str),
        **dict.fromkeys(("single_us", "as_theirs_us"), one),
        "fraction": two,
        "peer": str,
        **dict.fromkeys(("peer_fraction", "ratio", "ratio_raw", "ratio_in_a_row", "padding", "reference_ratio"), two),
        "is_memory_bound": lambda value: "bytes" if value else "operations",
    }
    headings = ["model", "linear", "tokens", "scheme", "configuration", "us", "us, their floor", "ours", "peer"]
    headings += ["theirs", "ratio", "raw", "in a row", "padding", "reference", "bound"]
    yield from table(cells.sort_values("ratio"), formats, headings)


def _bars(measured: pd.DataFrame) -> Iterator[str]:
    yield from ("", "## Against the roofline's bars", "")
    yield "Our launches by themselves, many a replay, the peers' loads. Bars: 0.85 where operations bound a launch, or"
    yield "bytes of which it moves over 200 MB; 0.70 of smaller launches at 16 tokens; the others have none. The least"
    yield from ("row is named.", "", *bars(of_roofline(measured)))


def _cells(cells: pd.DataFrame) -> Iterator[str]:
    yield from ("", "## All cells", "", "Without another: schemes that none of them runs.", "")
    formats: Formats = {
        **dict.fromkeys(("model", "linear", "tokens", "draw", "scheme", "config"), str),
        "latency_us": one,
        "fraction": two,
        "other": str,
        "other_us": one,
        "ratio": two,
    }
    headings = ["model", "linear", "tokens", "draw", "scheme", "configuration", "ours us", "of roofline"]
    yield from table(cells, formats, [*headings, "fastest other", "its us", "theirs / ours"])


def failures(measured: pd.DataFrame) -> Iterator[str]:
    """Who failed, and why."""
    failed = measured[measured["status"] != Status.OK.value]
    yield from ("", f"## Failures: {len(failed)}", "")
    names = ("model", "linear", "tokens", "draw", "scheme", "contender", "config", "status", "error")
    yield from table(failed, dict.fromkeys(names, str), names)
