"""Shared memory, threads and registers of a kernel of the wgmma family. The device code and the legality rules read
this.

Arrays, each of num_stages parts: tokens (1024-byte aligned, as the 128-byte swizzle wants), packed weights, strips
(scales, then zero points). Then each consumer warpgroup's part of the output, a few tokens at a time in two buffers
that take turns; the tokens' scales, one copy a warpgroup; with split-K the other CTAs' sums of a tile; the
scheduler's table; the barriers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from kernel_gen.layouts import UNIT_ROWS, ActivationKind, Layout, layout_of, round_up
from profiles.gpus import Math
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

SWIZZLE_ALIGNMENT_BYTES = 1024
BULK_ALIGNMENT_BYTES = 128
TOKEN_ROW_BYTES = 128
"""One k-tile of one token, for every math that wgmma has."""
OUTPUT_PADDING_BYTES = 16
OUTPUT_BYTES = 4096
"""Of one output buffer of a warpgroup, where a tile has many tokens: few barriers for little room."""
MANY_TOKENS = 128
REGISTERS_PER_SM = 65_536
MAX_CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
"""What a producer needs (no build spilled there); two CTAs an SM and the narrowest tiles have more to spare."""
SPARE_PRODUCER_REGISTERS = 32
GROUPS_UP_TO_TOKENS = 16
"""Tile widths where scaling sums takes fewer instructions than scaling weights in bf16: a group of 128 columns has 64
pairs of weights a thread and unit, and tile_n / 2 sums. At 32 both are close, and the sums take registers that three
CTAs an SM do not have.
"""

WARPS_UP_TO_TOKENS = 8
"""Tile widths of bf16 math that mma.sync multiplies: a wgmma with weights in registers takes no less time for 8 tokens
than for 32.
"""


class SumOf(Enum):
    """What the tensor cores add up in the wgmma family."""

    WEIGHTS = "weights"
    """As decoding leaves them; scales of groups are in them."""
    GROUPS = "groups"
    """Codes of one group, less its zero points; its sums are scaled and added in float32."""


def sum_of(layout: Layout, tile_n: int) -> SumOf:
    """How a scheme is multiplied in tiles of tile_n tokens."""
    if not layout.has_group_scales:
        return SumOf.WEIGHTS
    if layout.math is not Math.BF16 or multiplies_in_warps(layout, tile_n):
        return SumOf.GROUPS
    in_pairs = layout.weight_bits <= 4 and layout.k_tiles_per_group % 2 == 0
    return SumOf.GROUPS if in_pairs and tile_n <= GROUPS_UP_TO_TOKENS else SumOf.WEIGHTS


def multiplies_in_warps(layout: Layout, tile_n: int) -> bool:
    """Whether tiles of tile_n tokens are multiplied with mma.sync, a warp's own, instead of wgmma."""
    return layout.math is Math.BF16 and tile_n <= WARPS_UP_TO_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class WgmmaArrays:
    """Byte offsets of the arrays, and the bytes of one stage of those that have stages."""

    tokens: int
    tokens_stage: int
    weights: int
    weights_stage: int
    strips: int
    strips_stage: int
    output: int
    output_buffer: int
    token_scales: int
    partial_sums: int
    table: int
    barriers: int
    total: int


def wgmma_arrays(config: KernelConfig, schemes: Iterable[QuantScheme], max_experts: int) -> WgmmaArrays:
    """Where everything lies; a stage holds the largest of the slots' parts."""
    layouts = [layout_of(scheme) for scheme in schemes]
    units = config.tile.m // UNIT_ROWS
    tokens_stage = config.tile.n * TOKEN_ROW_BYTES
    weights_stage = round_up(units * max(layout.unit_bytes for layout in layouts), BULK_ALIGNMENT_BYTES)
    strip_kinds = max(layout.has_group_scales * (1 + layout.has_zero_points) for layout in layouts)
    strips_stage = config.tile.m * 2 * strip_kinds
    weights = round_up(config.num_stages * tokens_stage, SWIZZLE_ALIGNMENT_BYTES)
    strips = weights + config.num_stages * weights_stage
    output = round_up(strips + config.num_stages * strips_stage, BULK_ALIGNMENT_BYTES)
    groups, chunk = config.warps.m // 4, output_tokens(config)
    output_buffer = chunk * output_row_bytes(config)
    token_scales = output + groups * min(2, -(-config.tile.n // chunk)) * output_buffer
    scaled = any(layout.activation is not ActivationKind.BF16 for layout in layouts)
    partial_sums = round_up(token_scales + scaled * groups * config.tile.n * 4, BULK_ALIGNMENT_BYTES)
    table = partial_sums + (config.split_k - 1) * config.tile.m * config.tile.n * 4
    barriers = table + 16 * max_experts + 16
    return WgmmaArrays(
        tokens=0,
        tokens_stage=tokens_stage,
        weights=weights,
        weights_stage=weights_stage,
        strips=strips,
        strips_stage=strips_stage,
        output=output,
        output_buffer=output_buffer,
        token_scales=token_scales,
        partial_sums=partial_sums,
        table=table,
        barriers=barriers,
        total=barriers + 16 * config.num_stages + 16 * (config.split_k > 1),
    )


def token_box(config: KernelConfig) -> int:
    """Tokens of one TMA load. In a cluster CTAs load different ones of a tile."""
    return config.tail or config.tile.n // config.cluster


def producer_warps(config: KernelConfig) -> int:
    """Warps that fill stages, one k-tile each in turn, 2 or 4 of them: a single one takes longer to start a k-tile's
    copies than consumers take to multiply it for few tokens.
    """
    return 4 if config.num_stages >= 4 else 2


def output_tokens(config: KernelConfig) -> int:
    """Tokens that a warpgroup writes to shared memory, and from there to Y, at a time: 16, or 32."""
    row_bytes = config.tile.m * 2 // (config.warps.m // 4)
    return 32 if config.tile.n >= MANY_TOKENS and 32 * row_bytes <= OUTPUT_BYTES else 16


def output_row_bytes(config: KernelConfig) -> int:
    """From one token to the next in an output buffer: a warpgroup's rows, and padding so that tokens start in different
    banks.
    """
    return config.tile.m * 2 // (config.warps.m // 4) + OUTPUT_PADDING_BYTES


def launch_registers(config: KernelConfig) -> int:
    """What every thread has until setmaxnreg: all that fit, in eights."""
    return min(REGISTERS_PER_SM // config.min_ctas_per_sm // config.num_threads // 8 * 8, MAX_CONSUMER_REGISTERS)


def producer_registers(config: KernelConfig) -> int:
    """What setmaxnreg leaves the producer warpgroup."""
    spare = config.min_ctas_per_sm == 2 or config.tile.n <= WARPS_UP_TO_TOKENS
    return SPARE_PRODUCER_REGISTERS if spare else PRODUCER_REGISTERS


def consumer_registers(config: KernelConfig) -> int:
    """What setmaxnreg gives a consumer thread: all that the launch holds and the producer leaves. More would wait for
    ever.
    """
    left = launch_registers(config) * config.num_threads - producer_registers(config) * 128
    return min(left // (config.num_threads - 128) // 8 * 8, MAX_CONSUMER_REGISTERS)
