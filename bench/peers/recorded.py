"""Our recorded launches against the peers' published fractions: the best measured configuration of each cell.

Peers and we drew different loads, so fractions of the roofline are compared, never times. Their times hold a launch
floor of 4.8 us that ours mostly do not; `ratio_with_floor` therefore adds all of it to ours (too much: the conservative
one), `ratio` adds nothing (too little).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.peers.published import Key, Peer
from bench.peers.roofline import H200, PEER_LAUNCH_FLOOR_US, Card, PeerClass, Roofline, peer_class, roofline
from profiles import kernels, models, schemes
from profiles.errors import DataError
from profiles.records import Source, Status
from profiles.store import ProfileStore

SKEWED = "log-normal"
"""The generator whose loads are closest to the peers'."""
RATIO_BAR, MEAN_BAR = 1.0, 1.15
LARGE_LAUNCH_BYTES = 200e6
DECODE_TOKENS, DECODE_BAR, ROOFLINE_BAR = 16, 0.70, 0.85


def read_launches(paths: Sequence[Path], card: Card = H200) -> pd.DataFrame:
    """The finished, measured launches of some profiles, with `tokens` (before top-k) and `load` (the generator).

    DataError: a profile is absent, of another card, or has no such launch; or a row's model is not known.
    """
    frames = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such profile; name Parquet files of `python -m kernel_gen.sweep`")
        frames.append(ProfileStore(path, gpu=card.gpu).records(status=Status.OK, source=Source.MEASURED))
    frame = pd.concat(frames, ignore_index=True)
    if frame.empty:
        raise DataError(f"{', '.join(map(str, paths))}: no measured launch among them")
    top_k = {name: models.model(name).top_k for name in frame["model"].unique()}
    frame = frame[frame["tokens_per_expert"].map(sum) > 0].reset_index(drop=True)  # nothing to do has no roofline
    rows = frame["tokens_per_expert"].map(sum) // frame["model"].map(top_k)
    # An expert-parallel slice has a share of the batch's rows.
    frame["tokens"] = frame["num_tokens"].where(frame["num_tokens"].notna(), rows).astype(int)
    frame["load"] = frame["load_source"].str.split(",").str[0]
    return frame


def compare(launches: pd.DataFrame, peers: Mapping[Key, Peer], card: Card = H200) -> pd.DataFrame:
    """One row a (model, linear, tokens, load, scheme): the fastest launch, its roofline and the peer's fraction.

    DataError: there is no launch of one scheme.
    """
    single = launches[launches["schemes"].map(len) == 1].copy()
    if single.empty:
        raise DataError("the profiles have no launch of one scheme alone, which is what peers have")
    single["scheme"] = single["schemes"].str[0]
    best = single.loc[single.groupby(["model", "linear", "tokens", "load", "scheme"])["latency_us"].idxmin()]
    return pd.DataFrame([_row(launch, peers, card) for launch in _rows(best)])


def _rows(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}


def _row(launch: Mapping[str, Any], peers: Mapping[Key, Peer], card: Card) -> dict[str, Any]:
    scheme = schemes.parse(launch["scheme"])
    counts = [int(count) for count in launch["tokens_per_expert"]]
    limit = roofline(scheme, launch["n"], launch["k"], counts, card)
    group = peer_class(scheme)
    peer = None if group is None else peers.get((launch["model"], launch["linear"], launch["tokens"], group))
    tile_n = kernels.parse(launch["config"]).tile.n
    fraction = limit.us / launch["latency_us"]
    with_floor = limit.us / (launch["latency_us"] + PEER_LAUNCH_FLOOR_US)
    return {
        **{name: launch[name] for name in ("model", "linear", "n", "k", "tokens", "load", "load_source", "scheme")},
        "peer_class": "" if group is None else group.value,
        "config": launch["config"],
        "latency_us": launch["latency_us"],
        "num_active_experts": sum(count > 0 for count in counts),
        "token_padding": sum(-(-count // tile_n) * tile_n for count in counts) / sum(counts),
        "sm_clock_mhz": launch["sm_clock_mhz"],
        "reference_ratio": float(launch["versions"].get("reference_ratio", "nan")),
        "min_bytes": limit.min_bytes,
        "flops": limit.flops,
        "roofline_us": limit.us,
        "bound": "memory" if limit.is_memory_bound else "compute",
        "fraction_with_floor": with_floor,
        "fraction": fraction,
        "roofline_bar": roofline_bar(limit, launch["tokens"]),
        "peer": "" if peer is None else peer.name,
        "peer_latency_us": math.nan if peer is None else peer.latency_us,
        "peer_fraction": math.nan if peer is None else peer.fraction,
        "ratio_with_floor": math.nan if peer is None else with_floor / peer.fraction,
        "ratio": math.nan if peer is None else fraction / peer.fraction,
        "timestamp": launch["timestamp"],
    }


def roofline_bar(limit: Roofline, tokens: int) -> float:
    """The fraction that a launch must reach by itself: 0.85 where it is bound by operations, or by bytes of which it
    moves over 200 MB; 0.70 of smaller ones at 16 tokens; NaN where no bar is set.
    """
    if not limit.is_memory_bound or limit.min_bytes > LARGE_LAUNCH_BYTES:
        return ROOFLINE_BAR
    return DECODE_BAR if tokens == DECODE_TOKENS else math.nan


def means(compared: pd.DataFrame, by: str) -> pd.DataFrame:
    """Geometric means of the two ratios over the rows with a peer, and how many are below 1, by a column's values."""
    with_peer = compared[compared["ratio"].notna()]
    rows = []
    for value, group in [*with_peer.groupby(by, sort=False), ("all", with_peer)]:
        rows.append(
            {
                by: value,
                "rows": len(group),
                "mean_ratio_with_floor": geometric_mean(group["ratio_with_floor"]),
                "mean_ratio": geometric_mean(group["ratio"]),
                "below_with_floor": int((group["ratio_with_floor"] < RATIO_BAR).sum()),
                "below": int((group["ratio"] < RATIO_BAR).sum()),
            }
        )
    return pd.DataFrame(rows)


def geometric_mean(values: pd.Series) -> float:
    """NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if len(values) else math.nan


def class_order(name: str) -> int:
    """The peers' own order of columns; what has no peer comes last."""
    names = [group.value for group in PeerClass]
    return names.index(name) if name in names else len(names)
