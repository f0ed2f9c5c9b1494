"""The Markdown of `--mixed`: every mixed launch against what its parts' rooflines predict, measured in the same run."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.peers.measured_report import failures
from bench.peers.mixed import EXCESS_BAR
from bench.peers.mixes import excesses
from bench.peers.tables import Formats, one, percent, table, two

NAMES = ("model", "linear", "tokens", "scheme", "config")


def mixed_markdown(measured: pd.DataFrame, *, command: str) -> str:
    """The whole report."""
    found = excesses(measured)
    lines = [*_head(measured, found, command), *_by(found), *_launches(found), *failures(measured)]
    return "\n".join(lines) + "\n"


def _head(measured: pd.DataFrame, found: pd.DataFrame, command: str) -> Iterator[str]:
    yield from ("# Mixed launches and their parts in one run", "", f"`{command}`", "")
    gpus = ", ".join(sorted(measured["gpu"].unique()))
    yield f"On {gpus}, {measured['timestamp'].min()} to {measured['timestamp'].max()}."
    yield "Parts: each scheme's experts at the fraction of their roofline that the scheme reached alone, on all experts"
    yield f"under the same load, seconds before. Bar: at most {EXCESS_BAR:.0%} over the sum of the parts."
    known = found["excess"].dropna()
    yield ""
    if known.empty:
        yield "No mixed launch and all of its parts were measured."
        return
    over = int((known > EXCESS_BAR).sum())
    yield f"{over} of {len(known)} launches are over the bar; median {known.median():.1%}, most {known.max():.1%}."


def _by(found: pd.DataFrame) -> Iterator[str]:
    known = found.dropna(subset="excess")
    for by in ("tokens", "scheme", "model", "linear") if len(known) else ():
        groups = known.groupby(by, sort=True)["excess"]
        rows = pd.DataFrame(
            [
                (str(value), str(len(group)), str(int((group > EXCESS_BAR).sum())), group.median(), group.max())
                for value, group in groups
            ],
            columns=[by, "launches", "over", "median", "most"],
        )
        formats: Formats = {by: str, "launches": str, "over": str, "median": percent, "most": percent}
        heading = "mix" if by == "scheme" else by
        yield from ("", *table(rows, formats, [heading, "launches", "over the bar", "median excess", "most"]))


def _launches(found: pd.DataFrame) -> Iterator[str]:
    formats: Formats = {
        **dict.fromkeys(NAMES, str),
        **dict.fromkeys(("latency_us", "parts_us"), one),
        "fraction": two,
        "excess": percent,
    }
    headings = ["model", "linear", "tokens", "mix", "configuration", "us", "parts us", "of roofline", "excess"]
    yield from ("", "## Launches", "", *table(found.sort_values("excess"), formats, headings))
