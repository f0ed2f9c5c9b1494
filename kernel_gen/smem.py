"""Shared memory of a kernel: what lies where in one pipeline stage. Read by the device code and by the legality
rules.

A stage holds one k-tile of weights, then (128-byte aligned, for the swizzle) the tokens' k-tile, then what
dequantisation needs:

packed weights | tokens | scale strip (group scales) | zero strip (asymmetric groups) | token scales of the k-group
(grouped int4 tokens)

After the stages comes the scheduler's table: 16 bytes per expert and 16 more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kernel_gen.layouts import layout_of, round_up
from kernel_gen.smem_wgmma import wgmma_arrays
from profiles.kernels import Family, KernelConfig
from profiles.schemes import QuantScheme

PART_ALIGNMENT_BYTES = 16
"""cp.async moves 16 bytes."""
STAGE_ALIGNMENT_BYTES = 128
"""Rows of 128 bytes and the XOR swizzle over them start here."""
BYTES_PER_STRIP_ROW = 2
"""A scale or a zero point is one bf16 per weight row and k-tile."""
BYTES_PER_TOKEN_SCALE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """Bytes and byte offsets within one stage of one scheme; a part that the scheme lacks has no bytes. The weights
    are at offset 0.
    """

    w_bytes: int
    x_offset: int
    x_bytes: int
    scale_offset: int
    scale_bytes: int
    zero_offset: int
    zero_bytes: int
    sx_offset: int
    sx_bytes: int
    stage_bytes: int


def stage_layout(config: KernelConfig, scheme: QuantScheme) -> StageLayout:
    """The layout of one stage when a tile of `scheme` runs. UnsupportedError for a scheme that no kernel reads."""
    rows, tokens = config.tile.m, config.tile.n
    layout = layout_of(scheme)
    w_bytes = _part(rows * layout.k_tile * layout.weight_bits // 8)
    x_offset = round_up(w_bytes, STAGE_ALIGNMENT_BYTES)
    x_bytes = _part(tokens * layout.x_row_bytes)
    scale_offset = x_offset + x_bytes
    scale_bytes = _part(rows * BYTES_PER_STRIP_ROW) if layout.has_group_scales else 0
    zero_offset = scale_offset + scale_bytes
    zero_bytes = _part(rows * BYTES_PER_STRIP_ROW) if layout.has_group_scales and layout.has_zero_points else 0
    sx_offset = zero_offset + zero_bytes
    sx_bytes = _part(tokens * BYTES_PER_TOKEN_SCALE) if layout.activation_groups else 0
    return StageLayout(
        w_bytes=w_bytes,
        x_offset=x_offset,
        x_bytes=x_bytes,
        scale_offset=scale_offset,
        scale_bytes=scale_bytes,
        zero_offset=zero_offset,
        zero_bytes=zero_bytes,
        sx_offset=sx_offset,
        sx_bytes=sx_bytes,
        stage_bytes=round_up(sx_offset + sx_bytes, STAGE_ALIGNMENT_BYTES),
    )


def stage_bytes(config: KernelConfig, schemes: Iterable[QuantScheme]) -> int:
    """The distance between stages of a kernel with these slots: the largest of theirs."""
    return max(stage_layout(config, scheme).stage_bytes for scheme in schemes)


def table_bytes(max_experts: int) -> int:
    """The scheduler's table behind the stages."""
    return 16 * max_experts + 16


def smem_bytes(config: KernelConfig, schemes: Iterable[QuantScheme], max_experts: int) -> int:
    """Dynamic shared memory of one CTA."""
    if config.family is Family.WGMMA:
        return wgmma_arrays(config, schemes, max_experts).total
    return config.num_stages * stage_bytes(config, schemes) + table_bytes(max_experts)


def _part(num_bytes: int) -> int:
    return round_up(num_bytes, PART_ALIGNMENT_BYTES)
