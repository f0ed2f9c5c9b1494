"""How a token load splits into token tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSplit:
    """A token load under one scheme, cut into token tiles. `full_token_tiles` is their width together in full tiles:
    less than their number where experts end with narrower ones.
    """

    num_tokens: int
    num_active_experts: int
    num_token_tiles: int
    full_token_tiles: float
    max_tokens: int


@functools.lru_cache(maxsize=65536)
def split_load(tokens_per_expert: tuple[int, ...], token_widths: tuple[int, ...]) -> LoadSplit:
    """Sums over the experts that have tokens; `token_widths` as a configuration has them, rising."""
    counts = split_all(np.asarray(tokens_per_expert, dtype=np.int64), width_table([token_widths]))[:, 0]
    tokens, active, tiles, full_tiles, largest = counts.tolist()
    return LoadSplit(
        num_tokens=int(tokens),
        num_active_experts=int(active),
        num_token_tiles=int(tiles),
        full_token_tiles=full_tiles,
        max_tokens=int(largest),
    )


def width_table(token_widths: Sequence[tuple[int, ...]]) -> Counts:
    """Several configurations' widths as rows, the widest first, which also fills a row up."""
    longest = max((len(widths) for widths in token_widths), default=1)
    return np.asarray(
        [[*reversed(widths), *[widths[-1]] * (longest - len(widths))] for widths in token_widths], dtype=np.int64
    ).reshape(len(token_widths), longest)


def split_all(tokens: Counts, widths: Counts) -> Array:
    """The fields of `LoadSplit` for experts' tokens [E], one column a row of a `width_table`."""
    full_tiles, left = np.divmod(tokens, widths[:, :1])
    # An expert ends with the narrowest tile that takes what is left.
    last = np.where(left > 0, widths[:, :1], 0)
    for narrower in widths[:, 1:].T:
        fits = (left > 0) & (left <= narrower[:, None]) & (narrower[:, None] < last)
        last = np.where(fits, narrower[:, None], last)
    found = np.empty((5, len(widths)))
    found[0], found[1], found[4] = tokens.sum(), np.count_nonzero(tokens), tokens.max(initial=0)
    whole = full_tiles.sum(axis=1)
    found[2] = whole + np.count_nonzero(left, axis=1)
    found[3] = whole + last.sum(axis=1) / widths[:, 0]
    return found
