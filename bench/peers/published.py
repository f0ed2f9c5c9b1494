"""The peers' published fractions of the roofline: a small data file with its source, date and card at its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench.peers.roofline import PeerClass
from profiles.errors import DataError

PEERS_H200 = Path(__file__).with_name("peers_h200.csv")
COLUMNS = ("model", "linear", "tokens", "peer_class", "latency_us", "fraction", "peer")

Key = tuple[str, str, int, PeerClass]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The fastest public kernel of one cell: its name, latency in microseconds and fraction of the roofline."""

    name: str
    latency_us: float
    fraction: float


def read_peers(path: Path = PEERS_H200) -> Mapping[Key, Peer]:
    """The peers by (model, linear, tokens, class). DataError: the file is absent or not such a table."""
    try:
        frame = pd.read_csv(path, comment="#")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable table of peers ({error})") from error
    if tuple(frame.columns) != COLUMNS:
        raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(map(str, frame.columns))}")
    peers: dict[Key, Peer] = {}
    for line, row in enumerate(frame.to_dict("records"), start=1):
        try:
            key = (str(row["model"]), str(row["linear"]), int(row["tokens"]), PeerClass(row["peer_class"]))
            peer = Peer(name=str(row["peer"]), latency_us=float(row["latency_us"]), fraction=float(row["fraction"]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: row {line} is not a peer ({error})") from error
        if not (peer.latency_us > 0 and 0 < peer.fraction <= 1):
            raise DataError(f"{path}: row {line} has {peer.latency_us} us at {peer.fraction} of the roofline")
        if key in peers:
            raise DataError(f"{path}: row {line} repeats {key[0]} {key[1]} {key[2]} {key[3].value}")
        peers[key] = peer
    return peers
