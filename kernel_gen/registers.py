"""Registers of a kernel: what a thread needs, before a compiler has seen it, and what it may have."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.occupancy import MAX_REGISTERS_PER_THREAD
from kernel_gen import smem_wgmma
from kernel_gen.layouts import UNIT_ROWS, Layout, layout_of, round_up
from profiles.gpus import GpuSpec, Math
from profiles.kernels import THREADS_PER_WARP, THREADS_PER_WARPGROUP, Family, KernelConfig
from profiles.schemes import QuantScheme

MARGIN = {Family.MMA: 40, Family.WGMMA: 24}
"""Addresses, loop counters, the load cursor, magic constants: not counted in the estimate, and in every kernel.

mma: of 66 builds near their limit (sm_89, 2026-11-24), 1 of the 48 that this lets through spilled, and 11 of the 18
that it refuses. wgmma: of 359 builds near their limit (sm_90a, 2026-11-24), 2 of 266 and 25 of 93. The build gate has
the last word.
"""
BESIDE_A_WGMMAS_SUMS = 32
"""ptxas refuses a kernel (C7602) in which one wgmma's sums and this many registers are more than a thread has at
launch, whatever setmaxnreg gives it later: so in 443 builds, without an exception.
"""
NARROW_EPILOGUE = 6
"""wgmma with 8-bit math: scales of two tokens and of each unit's rows, fetched before the k loop."""
ANOTHER_LOOP = {1: 4.5, 2: 4.5, 3: 5.0, 4: 9.0}
"""wgmma, one CTA an SM, by the number of schemes: what a further k loop, of another scheme or a narrower token tile,
costs all of them for each unit of 64 rows that a warpgroup has.
"""
FEW_LOOPS, ONE_OF_MANY_LOOPS = 4, 7.0
"""More loops than so many cost at least this much each, and unit. Above the limit ptxas serialises their wgmmas
(C7512), or spills. Of 143 builds near their limit (2026-11-24), 5 of the 90 that the estimate lets through did, and 52
of the 53 that it refuses.
"""
LOOP_BESIDE_OTHER_CTAS = 14
"""The same where several CTAs share an SM, whatever the units: so in 25 builds (2026-11-24), 1 exception."""
LESS_MARGIN_OF_THREE_WARPGROUPS = 8
"""Three consumer warpgroups have a third less registers each, and a compiler that is pressed finds a few: so in 43 of
those 143 builds.
"""
K_STEP_WORDS = 4
"""wgmma with 8-bit math: packed words that are read at once, of one k-step."""
FREE_REGISTERS = 64
"""mma: what is not counted where the compiler is not pressed, the median over the builds of `MARGIN`, most between 54
and 75.
"""


def estimated_registers(config: KernelConfig, schemes: Sequence[QuantScheme]) -> int:
    """Registers that a multiplying thread needs, without `margin`: accumulators, fragments, packed words.

    Math with group scales whose sums are of codes (all but BF16) holds a group's sums and the whole sums at once. The
    precision is chosen per tile, so slots share their registers.
    """
    layouts = [layout_of(scheme) for scheme in schemes]
    if config.family is Family.WGMMA:
        loops = sum(_pressing_loops(config, layout) for layout in layouts)
        return max(_wgmma(config, layout) for layout in layouts) + (loops - 1) * _another_loop(config, schemes, loops)
    return max(_mma(config, layout) for layout in layouts)


def margin(config: KernelConfig) -> int:
    """Registers beside the estimate."""
    has_three = config.family is Family.WGMMA and _consumer_threads(config) == 3 * THREADS_PER_WARPGROUP
    return MARGIN[config.family] - has_three * LESS_MARGIN_OF_THREE_WARPGROUPS


def registers_at_launch(config: KernelConfig, schemes: Sequence[QuantScheme], gpu: GpuSpec) -> int:
    """Registers a thread that the launch takes, as the compiler would report them: the estimate, rounded to what it
    allocates; for wgmma all that there are, since setmaxnreg then moves them from producer to consumers.
    """
    if config.family is Family.WGMMA:
        return smem_wgmma.launch_registers(config)
    return min(round_up(estimated_registers(config, schemes) + FREE_REGISTERS, 8), register_limit(config, gpu))


def register_limit(config: KernelConfig, gpu: GpuSpec) -> int:
    """Registers that a multiplying thread may have so that min_ctas_per_sm CTAs fit: multiples of 8, at most 255."""
    if config.family is Family.WGMMA:
        return max(smem_wgmma.consumer_registers(config), 0)
    threads = config.min_ctas_per_sm * round_up(config.warps.num_warps, 4) * THREADS_PER_WARP
    return min(gpu.regs_per_sm // threads // 8 * 8, MAX_REGISTERS_PER_THREAD)


def setmaxnreg_registers(config: KernelConfig) -> int:
    """Registers of a wgmma CTA after setmaxnreg; a launch that takes fewer waits for ever."""
    return smem_wgmma.producer_registers(config) * THREADS_PER_WARPGROUP + smem_wgmma.consumer_registers(
        config
    ) * _consumer_threads(config)


def _another_loop(config: KernelConfig, schemes: Sequence[QuantScheme], loops: int) -> int:
    """What each k loop but the first costs all."""
    if config.min_ctas_per_sm > 1:
        return LOOP_BESIDE_OTHER_CTAS
    each = ANOTHER_LOOP[min(len(schemes), max(ANOTHER_LOOP))]
    return int(_units(config) * (each if loops <= FEW_LOOPS else max(each, ONE_OF_MANY_LOOPS)))


def _pressing_loops(config: KernelConfig, layout: Layout) -> int:
    """K loops of one scheme that press on each other's registers: of 8-bit group sums the narrower ones do not, whose
    sums are fewer by far (3 builds at the limit, 2026-11-24, none refused).
    """
    narrow_sums = layout.math is not Math.BF16 and layout.has_group_scales
    return 1 if narrow_sums else len(config.token_widths)


def _mma(config: KernelConfig, layout: Layout) -> int:
    accumulators = config.tile.m * config.tile.n // config.num_threads
    if layout.has_group_scales and layout.math is not Math.BF16:
        accumulators *= 2
    m_blocks = -(-config.tile.m // (16 * config.warps.m))
    n_blocks = -(-config.tile.n // (8 * config.warps.n))
    return accumulators + 4 + 2 * n_blocks + m_blocks * (_packed_words(layout) + _strip_words(layout))


def _packed_words(layout: Layout) -> int:
    """Words of one m16 block that the main loop holds at once: narrow bf16 codes for the whole k-tile, anything else
    for one k-step (two if widened).
    """
    if layout.math is Math.BF16 and layout.weight_bits != 16:
        return layout.words_per_lane
    return 8 if layout.math in (Math.INT8, Math.E4M3) and layout.weight_bits == 4 else 4


def _strip_words(layout: Layout) -> int:
    """Scales, and zero points as biases of two rows, of one m16 block."""
    return (1 if layout.has_group_scales else 0) + (2 if layout.has_zero_points else 0)


def _wgmma(config: KernelConfig, layout: Layout) -> int:
    """A unit of 64 rows is one m16 block of each of a warpgroup's four warps; A fragments of a whole k-tile are in
    registers, 128 bytes of each of the block's rows. Where 8-bit groups are summed, packed words and scales are dead
    while both kinds of sums live; elsewhere the next k-tile's words are on their way.
    """
    accumulators = config.tile.m * config.tile.n // _consumer_threads(config)
    units = _units(config)
    fragments = units * (UNIT_ROWS * smem_wgmma.TOKEN_ROW_BYTES // 4 // THREADS_PER_WARPGROUP)
    zeros = 2 if layout.has_zero_points else 0
    if smem_wgmma.multiplies_in_warps(layout, config.tile.n):
        words = units * (layout.words_per_lane + _strip_words(layout)) + 2 * config.tile.n
        return 2 * accumulators + 2 * words
    if smem_wgmma.sum_of(layout, config.tile.n) is smem_wgmma.SumOf.GROUPS:
        words = units * (_packed_words(layout) + zeros) if layout.math is Math.BF16 else 0
        return 2 * accumulators + fragments + words
    strips = (2 if layout.has_group_scales else 0) + zeros
    if layout.math is not Math.BF16:
        return accumulators + fragments + units * (K_STEP_WORDS + strips) + NARROW_EPILOGUE
    return accumulators + fragments + units * (_packed_words(layout) + strips)


def _units(config: KernelConfig) -> int:
    """Units of 64 rows that a consumer warpgroup of the wgmma family has."""
    return config.tile.m // UNIT_ROWS * THREADS_PER_WARPGROUP // _consumer_threads(config)


def _consumer_threads(config: KernelConfig) -> int:
    """Of a CTA of the wgmma family: all but its producer warpgroup's."""
    return config.num_threads - THREADS_PER_WARPGROUP
