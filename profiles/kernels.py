"""Shapes of tiles and problems, and the configuration of a kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

from profiles.errors import SpecError

THREADS_PER_WARP = 32
THREADS_PER_WARPGROUP = 128
MAX_CLUSTER = 16
"""CTAs of a cluster, of which no GPU allows more."""


class Family(Enum):
    """Which instructions a kernel is built from."""

    MMA = "mma"  # mma.sync and cp.async, sm_80 and up
    WGMMA = "wgmma"  # wgmma and TMA, sm_90a


class Raster(Enum):
    """Which index of the tile moves fastest within an expert."""

    ALONG_TOKENS = "at"
    ALONG_FEATURES = "af"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """`m` weight rows by `n` tokens by `k` of the reduction; `k` is 0 in a KernelConfig."""

    m: int
    n: int
    k: int = 0

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < 1 or self.k < 0:
            raise SpecError(f"tile {self.m}x{self.n}x{self.k}: m and n must be at least 1, k at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpLayout:
    """Warps of a CTA along the tile's weight rows, tokens and reduction."""

    m: int
    n: int = 1
    k: int = 1

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise SpecError(f"warps {self.m}x{self.n}x{self.k}: each must be at least 1")

    @property
    def num_warps(self) -> int:
        """Warps of the CTA that multiply."""
        return self.m * self.n * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmShape:
    """Y[m, n] = X[m, k] @ W[n, k]^T: `m` token rows over all experts together, `n` output features and `k` input
    features of one expert.
    """

    m: int
    n: int
    k: int

    def __post_init__(self) -> None:
        if self.m < 0 or self.n < 1 or self.k < 1:
            raise SpecError(f"problem {self.m}x{self.n}x{self.k}: m must be at least 0, n and k at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """What is chosen about a kernel before it is compiled. `kernel_gen.legality` says which can be built for which
    scheme and GPU.

    Attributes:
        family: the instructions it is built from.
        tile: weight rows by tokens of a CTA's tile; `tile.k` is 0, since each scheme's k-tile follows from its math.
        warps: warps of a CTA that multiply.
        num_stages: k-tiles in flight in shared memory.
        split_k: CTAs of a cluster that share one tile's reduction (wgmma).
        raster: order of the tiles within an expert.
        min_ctas_per_sm: CTAs that must fit on an SM; it bounds the registers.
        cluster: CTAs that take adjacent feature tiles of the same tokens and share the loads of those (wgmma).
        tail: width of an expert's last token tile where that suffices, else twice, four times, ... as much; 0: the full
            width always (wgmma).
    """

    family: Family
    tile: TileShape
    warps: WarpLayout
    num_stages: int
    split_k: int = 1
    raster: Raster = Raster.ALONG_TOKENS
    min_ctas_per_sm: int = 1
    cluster: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.tile.k != 0:
            raise SpecError(f"a configuration's tile.k is 0, not {self.tile.k}: the k-tile follows from the scheme")
        if min(self.num_stages, self.split_k, self.min_ctas_per_sm) < 1:
            raise SpecError(
                f"stages {self.num_stages}, split_k {self.split_k} and CTAs per SM {self.min_ctas_per_sm}"
                " must each be at least 1"
            )
        if not 1 <= self.cluster <= MAX_CLUSTER or self.tail < 0:
            raise SpecError(f"cluster {self.cluster} must be 1 to {MAX_CLUSTER}, tail {self.tail} at least 0")

    @property
    def name(self) -> str:
        """The configuration's one spelling, e.g. `mma_128x16_w8x1x1_s4_k1_at_o2`, and where they are used `_c2` and
        `_t32`: a cluster of 2, tails from 32 tokens on.
        """
        return (
            f"{self.family.value}_{self.tile.m}x{self.tile.n}_w{self.warps.m}x{self.warps.n}x{self.warps.k}"
            f"_s{self.num_stages}_k{self.split_k}_{self.raster.value}_o{self.min_ctas_per_sm}"
            + (f"_c{self.cluster}" if self.cluster > 1 else "")
            + (f"_t{self.tail}" if self.tail else "")
        )

    def __str__(self) -> str:
        return self.name

    @property
    def num_threads(self) -> int:
        """Threads of a CTA; the wgmma family has a warpgroup that only loads, beside the warps that multiply."""
        loading = THREADS_PER_WARPGROUP if self.family is Family.WGMMA else 0
        return THREADS_PER_WARP * self.warps.num_warps + loading

    @property
    def token_widths(self) -> tuple[int, ...]:
        """Tokens a token tile can multiply, the full width last; an expert's last tile takes the least that fits."""
        widths = [self.tile.n]
        while self.tail and widths[0] // 2 >= self.tail:
            widths.insert(0, widths[0] // 2)
        return tuple(widths)

    def token_tile_widths(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that each token tile of an expert with `num_tokens` multiplies, padding included."""
        full, left = divmod(num_tokens, self.tile.n)
        last = tuple(width for width in self.token_widths if width >= left)[:1] if left else ()
        return (self.tile.n,) * full + last


_POSITIVE = r"([1-9]\d{0,4})"
_ABOVE_ONE = r"([2-9]|1[0-6])"
_NAME = re.compile(
    rf"({'|'.join(family.value for family in Family)})_{_POSITIVE}x{_POSITIVE}_w{_POSITIVE}x{_POSITIVE}x{_POSITIVE}"
    rf"_s{_POSITIVE}_k{_POSITIVE}_({'|'.join(raster.value for raster in Raster)})_o{_POSITIVE}"
    rf"(?:_c{_ABOVE_ONE})?(?:_t{_POSITIVE})?",
    re.ASCII,
)


@cache
def parse(name: str) -> KernelConfig:
    """The configuration of a name; `parse(name).name == name` for every name that is accepted.

    Raises:
        SpecError: the name is malformed.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise SpecError(
            f"unknown kernel configuration {name!r}: it is family_MxN_wMxNxK_sSTAGES_kSPLIT_at|af_oCTAS, "
            "then _cCLUSTER and _tTAIL where they are used, as in mma_128x16_w8x1x1_s4_k1_at_o2"
        )
    return KernelConfig(
        family=Family(match[1]),
        tile=TileShape(m=int(match[2]), n=int(match[3])),
        warps=WarpLayout(m=int(match[4]), n=int(match[5]), k=int(match[6])),
        num_stages=int(match[7]),
        split_k=int(match[8]),
        raster=Raster(match[9]),
        min_ctas_per_sm=int(match[10]),
        cluster=int(match[11] or 1),
        tail=int(match[12] or 0),
    )
