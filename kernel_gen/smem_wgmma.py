"""Shared memory, threads and registers of a kernel of the wgmma family. The device code and the legality rules read
this.

Arrays, each of num_stages parts: tokens (1024-byte aligned, as the 128-byte swizzle wants), packed weights, strips
(scales, then zero points). Then one tile of output, the scheduler's table, the barriers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kernel_gen.layouts import UNIT_ROWS, layout_of, round_up
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

SWIZZLE_ALIGNMENT_BYTES = 1024
BULK_ALIGNMENT_BYTES = 128
TOKEN_ROW_BYTES = 128
"""One k-tile of one token, for every math that wgmma has."""
OUTPUT_PADDING_BYTES = 16
REGISTERS_PER_SM = 65_536
MAX_CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = {1: 40, 2: 32}
FEW_PRODUCER_REGISTERS = 24


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
    table = round_up(output + config.tile.n * (config.tile.m * 2 + OUTPUT_PADDING_BYTES), BULK_ALIGNMENT_BYTES)
    barriers = table + 16 * max_experts + 16
    return WgmmaArrays(
        tokens=0,
        tokens_stage=tokens_stage,
        weights=weights,
        weights_stage=weights_stage,
        strips=strips,
        strips_stage=strips_stage,
        output=output,
        table=table,
        barriers=barriers,
        total=barriers + 16 * config.num_stages,
    )


def launch_registers(config: KernelConfig) -> int:
    """What every thread has until setmaxnreg: all that fit, in eights."""
    return min(REGISTERS_PER_SM // config.min_ctas_per_sm // config.num_threads // 8 * 8, MAX_CONSUMER_REGISTERS)


def producer_registers(config: KernelConfig) -> int:
    """What setmaxnreg leaves the producer warpgroup."""
    return PRODUCER_REGISTERS.get(config.min_ctas_per_sm, FEW_PRODUCER_REGISTERS)


def consumer_registers(config: KernelConfig) -> int:
    """What setmaxnreg gives a consumer thread: all that the launch holds and the producer leaves. More would wait for
    ever.
    """
    left = launch_registers(config) * config.num_threads - producer_registers(config) * 128
    return min(left // (config.num_threads - 128) // 8 * 8, MAX_CONSUMER_REGISTERS)
