"""The configurations worth considering: a frozen space per kernel family, every member with the reasons why it cannot
be built.

The space is data below. `Effort.FULL` is all of it, of every family that is generated for the GPU; `Effort.QUICK` is a
few configurations a scheme that cover decode to prefill, picked by rule: per token-tile width one tile, the warps that
fit it, and as many stages as fit beside the CTAs that the rule wants on an SM. Where there is wgmma, QUICK keeps only
the mma family's picks for very few tokens and one for comparison.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from kernel_gen.legality import ARCHITECTURES, SPLITS, estimated_facts, reasons
from profiles.gpus import GpuSpec
from profiles.kernels import Family, KernelConfig, Raster, TileShape, WarpLayout
from profiles.schemes import QuantScheme

ALL_FAMILIES = tuple(Family)


class Effort(Enum):
    """How much of the space."""

    QUICK = "quick"
    FULL = "full"


TILE_M = (64, 128, 256)
TILE_N = (8, 16, 32, 64, 128, 256)
WARP_LAYOUTS = tuple(WarpLayout(m=m, n=n) for m, n in ((4, 1), (8, 1), (2, 2), (4, 2), (2, 4), (1, 4), (1, 8)))
"""Four or eight warps: fewer leave schedulers idle, more leave too few registers each."""
STAGES = (2, 3, 4, 5, 6, 8)
CTAS_PER_SM = (1, 2, 3, 4)
MAX_ACCUMULATORS = 128
"""fp32 sums a thread, of 255 registers."""
MIN_MMAS_PER_FRAGMENT = 2
"""Above 32 tokens, each decoded A fragment must feed at least this many MMAs: below, decoding outweighs multiplying."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WgmmaBand:
    """Widths of the wgmma family's full space that want the same CTAs per SM and stages."""

    tile_n: tuple[int, ...]
    ctas_per_sm: tuple[int, ...]
    stages: tuple[int, ...]


FEW_TOKENS = 16
"""Up to here split-K is considered: wider tiles wait for the tensor cores, and their sums are large."""
WIDE_TOKENS = 64
"""From here on narrower last tiles and clusters are considered."""
WGMMA_TILES = tuple((64 * warpgroups * units, 4 * warpgroups) for warpgroups in (1, 2, 3) for units in (1, 2))
"""(tile.m, warps.m): one to three warpgroups with one or two units of 64 rows each."""
WGMMA_BANDS = (
    WgmmaBand(tile_n=(8, 16, 32), ctas_per_sm=(2, 3, 4), stages=(3, 4, 6, 8)),
    WgmmaBand(tile_n=(48, 64, 96), ctas_per_sm=(1, 2), stages=(3, 4, 6)),
    WgmmaBand(tile_n=(128, 160, 192, 256), ctas_per_sm=(1,), stages=(2, 3, 4, 5)),
)
"""Few tokens wait for memory and want several small CTAs; many wait for the tensor cores and want one large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickPick:
    """One rule of the quick space: a tile, its warps, CTAs per SM and tails in order of preference. Stages: the most
    that fit, up to `max_stages`. `beside_wgmma`: an mma pick that is worth trying where there is wgmma.
    """

    tile_m: int
    tile_n: int
    warps_m: int
    warps_n: int = 1
    ctas_per_sm: tuple[int, ...]
    max_stages: int
    raster: Raster = Raster.ALONG_TOKENS
    family: Family = Family.MMA
    beside_wgmma: bool = False
    tails: tuple[int, ...] = (0,)
    cluster: int = 1
    split_k: int = 1


def _wgmma(
    tile_m: int,
    tile_n: int,
    warpgroups: int,
    ctas_per_sm: tuple[int, ...],
    max_stages: int,
    *,
    tail: int = 0,
    cluster: int = 1,
    split_k: int = 1,
) -> QuickPick:
    """With a tail where the registers allow the k loops for it, else without."""
    return QuickPick(
        family=Family.WGMMA,
        tile_m=tile_m,
        tile_n=tile_n,
        warps_m=4 * warpgroups,
        ctas_per_sm=ctas_per_sm,
        max_stages=max_stages,
        tails=(tail, 0) if tail else (0,),
        cluster=cluster,
        split_k=split_k,
    )


MMA_PICKS = (
    QuickPick(tile_m=64, tile_n=8, warps_m=4, ctas_per_sm=(4, 3, 2, 1), max_stages=6, beside_wgmma=True),
    QuickPick(tile_m=128, tile_n=8, warps_m=8, ctas_per_sm=(3, 2, 1), max_stages=8),
    QuickPick(tile_m=128, tile_n=16, warps_m=8, ctas_per_sm=(3, 2, 1), max_stages=6),
    QuickPick(tile_m=128, tile_n=32, warps_m=8, ctas_per_sm=(2, 1), max_stages=5),
    QuickPick(tile_m=128, tile_n=64, warps_m=4, warps_n=2, ctas_per_sm=(2, 1), max_stages=4, beside_wgmma=True),
    QuickPick(tile_m=128, tile_n=128, warps_m=4, warps_n=2, ctas_per_sm=(1,), max_stages=4),
    QuickPick(
        tile_m=128, tile_n=128, warps_m=2, warps_n=4, ctas_per_sm=(1,), max_stages=4, raster=Raster.ALONG_FEATURES
    ),
    QuickPick(tile_m=64, tile_n=128, warps_m=2, warps_n=2, ctas_per_sm=(2, 1), max_stages=4),
    QuickPick(tile_m=128, tile_n=256, warps_m=2, warps_n=4, ctas_per_sm=(1,), max_stages=4),
)
WGMMA_PICKS = (
    _wgmma(64, 8, 1, (4, 3, 2), 8),
    _wgmma(128, 8, 1, (3, 2), 8),
    _wgmma(128, 8, 2, (2,), 8),
    _wgmma(128, 8, 1, (3,), 8, split_k=4),
    _wgmma(192, 8, 1, (3, 2), 8),
    _wgmma(256, 8, 1, (2,), 6),
    _wgmma(256, 8, 2, (2,), 8),
    _wgmma(256, 8, 2, (2,), 8, split_k=2),
    _wgmma(384, 8, 3, (1,), 8),
    _wgmma(128, 16, 1, (3, 2), 8, tail=8),
    _wgmma(192, 16, 1, (3, 2), 8),
    _wgmma(256, 16, 1, (2,), 6, tail=8),
    _wgmma(256, 16, 2, (2,), 6),
    _wgmma(512, 16, 2, (1,), 6),
    _wgmma(128, 32, 1, (3, 2), 6),
    _wgmma(128, 32, 2, (2,), 8, tail=8),
    _wgmma(128, 48, 2, (2, 1), 6),
    _wgmma(128, 64, 2, (2, 1), 6, tail=16),
    _wgmma(256, 64, 2, (1,), 6, tail=16),
    _wgmma(128, 128, 2, (1,), 5, tail=32),
    _wgmma(128, 128, 2, (1,), 5, tail=32, cluster=2),
    _wgmma(128, 160, 2, (1,), 5),
    _wgmma(128, 160, 2, (1,), 5, tail=80),
    _wgmma(128, 160, 2, (1,), 5, tail=80, cluster=2),
    _wgmma(192, 128, 3, (1,), 5, tail=32),
    _wgmma(128, 192, 2, (1,), 5, tail=48),
    _wgmma(128, 192, 2, (1,), 5, tail=96),
    _wgmma(256, 128, 2, (1,), 4),
    _wgmma(256, 128, 2, (1,), 5, tail=32),
    _wgmma(128, 256, 2, (1,), 5, tail=64, cluster=2),
    _wgmma(256, 160, 2, (1,), 4),
)
"""Decode first, prefill last; a rule none of whose members is legal for a scheme yields nothing."""


def quick_picks(gpu: GpuSpec, families: Collection[Family] = ALL_FAMILIES) -> tuple[QuickPick, ...]:
    """The rules of the quick space for a GPU, decode first within a family; few of the mma family's beside wgmma's."""
    wgmma = Family.WGMMA in families and gpu.arch in ARCHITECTURES[Family.WGMMA]
    mma = tuple(pick for pick in MMA_PICKS if pick.beside_wgmma or not wgmma) if Family.MMA in families else ()
    return (*mma, *WGMMA_PICKS) if wgmma else mma


def space(effort: Effort, gpu: GpuSpec, families: Collection[Family] = ALL_FAMILIES) -> Iterator[KernelConfig]:
    """Every member of the space, legal or not, in a fixed order; on a GPU without wgmma the mma family's alone."""
    if effort is Effort.QUICK:
        return (config for pick in quick_picks(gpu, families) for config in _members(pick))
    mma = [_full_mma()] if Family.MMA in families else []
    wgmma = [_full_wgmma()] if Family.WGMMA in families and gpu.arch in ARCHITECTURES[Family.WGMMA] else []
    return itertools.chain(*mma, *wgmma)


def enumerate_configs(
    schemes: Sequence[QuantScheme],
    gpu: GpuSpec,
    effort: Effort,
    *,
    max_experts: int = 256,
    allow_emulated: bool = False,
    families: Collection[Family] = ALL_FAMILIES,
) -> Iterator[tuple[KernelConfig, tuple[str, ...]]]:
    """Every configuration of the space with the reasons why it cannot run these schemes in one kernel on `gpu`, in a
    fixed order.

    Left out are duplicates: with FULL, a kernel of which more CTAs fit an SM than it asks for (it is there under the
    higher number); with QUICK, what comes after a rule's first legal member.
    """
    if effort is Effort.FULL:
        for config in space(effort, gpu, families):
            found = reasons(config, schemes, gpu, max_experts=max_experts, allow_emulated=allow_emulated)
            if found or not _is_duplicate(config, schemes, gpu, max_experts):
                yield config, found
        return
    seen: dict[KernelConfig, tuple[str, ...]] = {}
    for pick in quick_picks(gpu, families):
        for config in _members(pick):
            if config not in seen:
                found = reasons(config, schemes, gpu, max_experts=max_experts, allow_emulated=allow_emulated)
                seen[config] = found
                yield config, found
            if not seen[config]:
                break


def candidates(
    schemes: Sequence[QuantScheme],
    gpu: GpuSpec,
    effort: Effort,
    *,
    max_experts: int = 256,
    allow_emulated: bool = False,
    families: Collection[Family] = ALL_FAMILIES,
) -> tuple[KernelConfig, ...]:
    """The legal ones."""
    enumerated = enumerate_configs(
        schemes, gpu, effort, max_experts=max_experts, allow_emulated=allow_emulated, families=families
    )
    return tuple(config for config, found in enumerated if not found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejections:
    """A summary of an enumeration: how many were legal, and for each kind of reason how many configurations have it,
    with one example.
    """

    num_legal: int
    num_rejected: int
    by_kind: tuple[tuple[str, int, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.num_legal} legal, {self.num_rejected} rejected"]
        lines += [f"  {count:6d}  {kind}, e.g. {example}" for kind, count, example in self.by_kind]
        return "\n".join(lines)


def summarise(enumerated: Iterable[tuple[KernelConfig, tuple[str, ...]]]) -> Rejections:
    """Count reasons that differ in their numbers only; most frequent first, then by name. The example is the first
    configuration met.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    legal = rejected = 0
    for config, found in enumerated:
        legal += not found
        rejected += bool(found)
        for kind, reason in {_NUMBER.sub("N", reason): reason for reason in found}.items():
            counts[kind] += 1
            examples.setdefault(kind, f"{config.name}: {reason}")
    by_kind = tuple(
        (kind, count, examples[kind]) for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return Rejections(num_legal=legal, num_rejected=rejected, by_kind=by_kind)


_NUMBER = re.compile(r"(?<![\w.-])\d+(\.\d+)?(?![\w.]*[a-z])")


def _is_duplicate(config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec, max_experts: int) -> bool:
    """Whether more CTAs than it asks for fit an SM anyway, so that the same kernel is in the space under that higher
    number.
    """
    if config.min_ctas_per_sm == max(CTAS_PER_SM):
        return False
    return estimated_facts(config, schemes, gpu, max_experts=max_experts).ctas_per_sm > config.min_ctas_per_sm


def _full_mma() -> Iterator[KernelConfig]:
    shapes = itertools.product(TILE_M, TILE_N, WARP_LAYOUTS)
    for tile_m, tile_n, warps in shapes:
        if not _is_sensible(tile_m, tile_n, warps):
            continue
        for stages, raster, ctas in itertools.product(STAGES, Raster, CTAS_PER_SM):
            yield _config(Family.MMA, tile_m, tile_n, warps, stages, raster, ctas)


def _full_wgmma() -> Iterator[KernelConfig]:
    for (tile_m, warps_m), band in itertools.product(WGMMA_TILES, WGMMA_BANDS):
        for tile_n, stages, raster, ctas in itertools.product(band.tile_n, band.stages, Raster, band.ctas_per_sm):
            for cluster, tail, split_k in _sharings(tile_n, ctas):
                yield _config(
                    Family.WGMMA,
                    tile_m,
                    tile_n,
                    WarpLayout(m=warps_m),
                    stages,
                    raster,
                    ctas,
                    cluster=cluster,
                    tail=tail,
                    split_k=split_k,
                )


def _sharings(tile_n: int, ctas: int) -> Iterator[tuple[int, int, int]]:
    """(cluster, tail, split_k) worth considering: split-K of narrow tiles; tails down to a quarter or a half of
    a wide tile; then also clusters.
    """
    for split_k in SPLITS if tile_n <= FEW_TOKENS else (1,):
        yield 1, 0, split_k
    if tile_n == FEW_TOKENS:
        yield 1, tile_n // 2, 1
    if tile_n >= WIDE_TOKENS and ctas == 1:
        for tail in (tile_n // parts for parts in (4, 2) if tile_n % (16 * parts) == 0):
            yield 1, tail, 1
            yield 2, tail, 1


def _is_sensible(tile_m: int, tile_n: int, warps: WarpLayout) -> bool:
    """Whether the tile splits over the warps, and is worth the registers."""
    if tile_m % (16 * warps.m) or tile_n % (8 * warps.n):
        return False
    n_blocks = tile_n // (8 * warps.n)
    if n_blocks > 1 and n_blocks % 2:
        return False
    if tile_n > 32 and n_blocks < MIN_MMAS_PER_FRAGMENT:
        return False
    return tile_m * tile_n // (32 * warps.num_warps) <= MAX_ACCUMULATORS


def _members(pick: QuickPick) -> Iterator[KernelConfig]:
    """A rule's configurations in order of preference."""
    warps = WarpLayout(m=pick.warps_m, n=pick.warps_n)
    for ctas, tail in itertools.product(pick.ctas_per_sm, pick.tails):
        for stages in range(pick.max_stages, (3 if ctas > 1 else 2) - 1, -1):
            yield _config(
                pick.family,
                pick.tile_m,
                pick.tile_n,
                warps,
                stages,
                pick.raster,
                ctas,
                cluster=pick.cluster,
                tail=tail,
                split_k=pick.split_k,
            )


def _config(
    family: Family,
    tile_m: int,
    tile_n: int,
    warps: WarpLayout,
    stages: int,
    raster: Raster,
    ctas: int,
    *,
    cluster: int = 1,
    tail: int = 0,
    split_k: int = 1,
) -> KernelConfig:
    return KernelConfig(
        family=family,
        tile=TileShape(m=tile_m, n=tile_n),
        warps=warps,
        num_stages=stages,
        split_k=split_k,
        raster=raster,
        min_ctas_per_sm=ctas,
        cluster=cluster,
        tail=tail,
    )
