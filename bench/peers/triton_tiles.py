"""Which tiles of the Triton kernel are tried. Importable without Triton."""

from __future__ import annotations

from collections.abc import Sequence

Tile = tuple[int, int, int, int, int]
"""(tokens, weight rows, reduction, warps, stages)"""
TILES: tuple[Tile, ...] = (
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (32, 128, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
)
NEAREST = 3
"""Each tile costs a second to compile: so many are tried at a cell."""


def tiles_for(counts: Sequence[int]) -> tuple[Tile, ...]:
    """The tiles whose tokens are nearest, as a ratio, to those of an expert that has any; wider ones first where two
    are as near.
    """
    active = [count for count in counts if count]
    mean = sum(active) / len(active) if active else 1.0

    def distance(tile: Tile) -> tuple[float, int]:
        return max(tile[0] / mean, mean / tile[0]), -tile[0] * tile[1]

    return tuple(sorted(TILES, key=distance)[:NEAREST])


def tile_name(tile: Tile) -> str:
    """In the order of Tile."""
    return "{}x{}x{}_w{}_s{}".format(*tile)
