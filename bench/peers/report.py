"""The Markdown of a comparison: means, cells, what falls short, mixed launches. The raw rows are Parquet beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from bench.peers import evidence
from bench.peers.mixed import EXCESS_BAR, SPEEDUP_BAR
from bench.peers.published import Key, Peer
from bench.peers.recorded import MEAN_BAR, RATIO_BAR, SKEWED, class_order, geometric_mean, means
from bench.peers.roofline import PEER_LAUNCH_FLOOR_US, PeerClass, peer_class
from bench.peers.tables import Formats, percent, table, two
from profiles.schemes import parse

REPRESENTATIVES = {
    PeerClass.BF16: "w16a16",
    PeerClass.W8A16: "w8a16_g128_sym",
    PeerClass.W4A16: "w4a16_g128_sym",
    PeerClass.W2A16: "w2a16_g128_sym",
    PeerClass.W8A8_FP8: "w8a8_g-1_sym_e4m3",
    PeerClass.W8A8_INT8: "w8a8_g-1_sym",
    PeerClass.W4A8_FP8: "w4a8_g128_sym_e4m3",
    PeerClass.W4A8_INT8: "w4a8_g128_sym",
}
"""Our scheme with the bytes of the peers' formats, one a class: what the table of cells and the picture show."""


def markdown(compared: pd.DataFrame, mixed: pd.DataFrame, peers: Mapping[Key, Peer], *, command: str) -> str:
    """The whole report; `command` is what made it."""
    parts = (_head(compared, command), _recorded(compared, peers), _short(compared), _mixed(mixed))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(compared: pd.DataFrame, command: str) -> Iterator[str]:
    first, last = compared["timestamp"].min(), compared["timestamp"].max()
    yield from ("# Recorded launches against the peers, one H200 each", "", f"`{command}`", "")
    yield f"Our launches were measured from {first} to {last}; the peers on 2026-11-23 (bench/peers/peers_h200.csv)."
    yield (
        f"How to read it, and what is unlike: [../peers.md](../peers.md). `+floor` adds {PEER_LAUNCH_FLOOR_US} us to"
        " our times (the conservative one); a ratio is our fraction of the roofline over the peer's."
    )
    yield ""


def _recorded(compared: pd.DataFrame, peers: Mapping[Key, Peer]) -> Iterator[str]:
    skewed = compared[compared["load"] == SKEWED]
    for by, title in (("scheme", "scheme"), ("tokens", "tokens"), ("model", "model"), ("linear", "linear")):
        found = means(skewed, by)
        if by == "scheme":
            found = found.sort_values(by, key=lambda names: names.map(_scheme_order), kind="stable")
        yield from (f"## Geometric means by {title}, skewed loads", "", *_means_table(found), "")
    yield from ("## Geometric means by load", "")
    yield "The peers' loads are skewed; few cells of theirs were recorded under another load."
    yield from ("", *_means_table(means(compared, "load")), "")
    yield from ("## Cells, skewed loads", "")
    yield "Fraction of the roofline: ours +floor (ours), the peer's and its name, ratio +floor (ratio)."
    yield from ("Per class our scheme of the peers' bytes: " + ", ".join(REPRESENTATIVES.values()) + ".", "")
    yield from _cells(skewed)
    missing = [
        key
        for key in peers
        if skewed[
            (skewed["model"] == key[0])
            & (skewed["linear"] == key[1])
            & (skewed["tokens"] == key[2])
            & (skewed["peer_class"] == key[3].value)
        ].empty
    ]
    yield ""
    yield f"Peers' cells for which we recorded nothing ({len(missing)} of {len(peers)}): {_listed(missing)}."
    yield ""


def _scheme_order(name: str) -> tuple[int, str]:
    group = None if name == "all" else peer_class(parse(name))
    return (class_order("" if group is None else group.value), name)


def _means_table(found: pd.DataFrame) -> Iterator[str]:
    by = str(found.columns[0])
    yield from table(
        found,
        {
            by: str,
            "rows": str,
            "mean_ratio_with_floor": two,
            "mean_ratio": two,
            "below_with_floor": str,
            "below": str,
        },
        [by, "rows", "ratio +floor", "ratio", f"rows below {RATIO_BAR:g} +floor", f"rows below {RATIO_BAR:g}"],
    )


def _cells(skewed: pd.DataFrame) -> Iterator[str]:
    yield "| model, linear, tokens | " + " | ".join(group.value for group in REPRESENTATIVES) + " |"
    yield "|---" * (len(REPRESENTATIVES) + 1) + "|"
    for key, cell in skewed[skewed["peer"] != ""].groupby(["model", "linear", "tokens"]):
        by_scheme = {row["scheme"]: row for _, row in cell.iterrows()}
        texts = [
            _cell(by_scheme[scheme]) if scheme in by_scheme else "not recorded" for scheme in REPRESENTATIVES.values()
        ]
        yield f"| {' '.join(map(str, key))} | " + " | ".join(texts) + " |"


def _cell(row: pd.Series) -> str:
    return (
        f"{row['fraction_with_floor']:.2f} ({row['fraction']:.2f}), {row['peer_fraction']:.2f} {row['peer']},"
        f" **{row['ratio_with_floor']:.2f}** ({row['ratio']:.2f})"
    )


def _short(compared: pd.DataFrame) -> Iterator[str]:
    skewed = compared[compared["load"] == SKEWED]
    below = skewed[skewed["ratio_with_floor"] < RATIO_BAR].sort_values("ratio_with_floor")
    mean = geometric_mean(skewed["ratio_with_floor"].dropna())
    yield from ("## What falls short of the peers", "")
    yield (
        f"{len(below)} of {int(skewed['ratio'].notna().sum())} rows are below {RATIO_BAR:g} with the floor added,"
        f" {int((below['ratio'] < RATIO_BAR).sum())} without; the geometric mean is {mean:.2f} where {MEAN_BAR} is"
        " wanted."
    )
    yield "Padding: token rows of the tiles over token rows. Clock: the SM's while ours was timed (1980 MHz at most)."
    slow = skewed["reference_ratio"]
    yield "Reference: how much longer a fixed bf16 GEMM took meanwhile than on the calm GPU (heat and power cap):"
    yield f"median {two(slow.median())}, at most {two(slow.max())} over all rows."
    yield ""
    yield from table(
        below,
        {
            **dict.fromkeys(("model", "linear", "tokens", "scheme", "config"), str),
            **dict.fromkeys(("fraction_with_floor", "fraction", "peer_fraction"), two),
            "peer": str,
            **dict.fromkeys(("ratio_with_floor", "ratio"), two),
            "bound": str,
            "token_padding": two,
            "sm_clock_mhz": lambda value: f"{value:.0f}",
            "reference_ratio": two,
        },
        [
            *("model", "linear", "tokens", "scheme", "configuration", "ours +floor", "ours", "peer's", "peer"),
            *("ratio +floor", "ratio", "bound", "padding", "clock MHz", "reference"),
        ],
    )
    yield from ("", "## What the recordings show of the reasons", "")
    yield "Geometric mean of the best latencies' ratio, skewed loads (cells)."
    yield from ("", *evidence.lines(skewed), "")
    yield from ("## What falls short of the roofline's bars", "")
    yield "Skewed loads, our own times. Bars: 0.85 where operations bound a launch, or bytes of which it moves"
    yield "over 200 MB; 0.70 of smaller launches at 16 tokens; the others have none. The least row is named."
    yield ""
    yield from bars(skewed)
    yield ""


def bars(compared: pd.DataFrame) -> Iterator[str]:
    """Rows short of the roofline's bars, by scheme and bound."""
    rows = []
    for (scheme, bound, bar), group in compared.dropna(subset="roofline_bar").groupby(
        ["scheme", "bound", "roofline_bar"]
    ):
        worst = group.nsmallest(1, "fraction").iloc[0]
        rows.append(
            {
                "scheme": scheme,
                "bound": bound,
                "bar": bar,
                "short": f"{int((group['fraction'] < bar).sum())} of {len(group)}",
                "median": group["fraction"].median(),
                "least": f"{worst['fraction']:.2f}: "
                + " ".join(str(worst[name]) for name in ("model", "linear", "tokens")),
            }
        )
    found = pd.DataFrame(rows, columns=["scheme", "bound", "bar", "short", "median", "least"])
    formats: Formats = {"scheme": str, "bound": str, "bar": two, "short": str, "median": two, "least": str}
    yield from table(found, formats, ["scheme", "bound", "bar", "rows short", "median", "least"])


def _mixed(mixed: pd.DataFrame) -> Iterator[str]:
    yield from ("## Mixed launches, skewed loads", "")
    if mixed.empty:
        yield "None were recorded."
        return
    derived = mixed[mixed["excess"].notna()]
    over, slower = derived["excess"] > EXCESS_BAR, derived["speedup"] < SPEEDUP_BAR
    free = derived["speedup_free"] < SPEEDUP_BAR
    yield (
        f"{len(mixed)} mixes and loads; for {len(derived)} the parts were recorded alone. Of these {int(over.sum())}"
        f" cost over {EXCESS_BAR:.0%} more than their parts' shares; {int(free.sum())} are slower than one launch a"
        f" scheme would be if launches cost nothing, {int(slower.sum())} with the latency model's cost of a launch."
        f" Median excess {derived['excess'].median():.1%}, geometric mean speedup"
        f" {geometric_mean(derived['speedup_free']):.2f} and {geometric_mean(derived['speedup']):.2f}."
    )
    yield from ("", "Of roofline: sum of the parts' rooflines over the time. Definitions: bench/peers/mixed.py.", "")
    formats: Formats = {
        **dict.fromkeys(("model", "linear", "tokens", "mix", "config"), str),
        "latency_us": lambda value: f"{value:.1f}",
        "roofline_share": two,
        **dict.fromkeys(("excess", "excess_same_config"), percent),
        **dict.fromkeys(("speedup_free", "speedup"), two),
        "parts_recorded": str,
    }
    headings = ["model", "linear", "tokens", "mix", "configuration", "us", "of roofline", "excess"]
    headings += ["same configuration", "speedup, launches free", "speedup", "parts recorded"]
    yield from table(mixed, formats, headings)


def _listed(cells: Sequence[Key]) -> str:
    """By model and linear, classes with all that lack at the same tokens."""
    by_linear: dict[str, dict[str, list[str]]] = {}
    for model, linear, tokens, group in cells:
        by_linear.setdefault(f"{model} {linear}", {}).setdefault(group.value, []).append(str(tokens))
    texts = []
    for name, groups in by_linear.items():
        tokens_of = {", ".join(tokens) for tokens in groups.values()}
        texts += [
            f"{name} at {at} tokens: {', '.join(g for g in groups if ', '.join(groups[g]) == at)}"
            for at in sorted(tokens_of)
        ]
    return "; ".join(texts) or "none"
