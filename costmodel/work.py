"""What a tile costs, counted, not timed: bytes, instructions and tensor work of one k-tile of one scheme.

Counts follow the families' structure: weights are the MMA's M operand. mma: every warp column decodes the weights again
for its own tokens, every warp row reads the tokens again, and the copies of a k-tile are spread over the CTA's threads.
wgmma: producer warps copy, every warp decodes its own rows, every wgmma reads the tokens from shared memory; few tokens
in bf16 are multiplied with mma.sync, and every warp reads them.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import MappingProxyType

from costmodel.constants import MMA_K, MMA_SYNC_IN_WGMMAS, WGMMA_MIN_TOKENS, WGMMA_ROWS
from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.kernels import THREADS_PER_WARP, Family, KernelConfig, TileShape
from profiles.schemes import QuantScheme

K_TILE = MappingProxyType({Math.BF16: 64, Math.INT8: 128, Math.E4M3: 128, Math.INT4: 128})
"""Reduction of one pipeline stage; ARCHITECTURE.md, "Layouts"."""
UNIT_ROWS = 64
"""Packed weights come in units of 64 rows."""
WARP_COPY_BYTES = 16 * THREADS_PER_WARP
"""One cp.async or 128-bit shared-memory load of a warp."""

# The counts below were held against the sm_89 machine code of 12 kernels (2026-11-24): a k loop's body, less the search
# for the next tile that runs once a tile (91 to 107 instructions), is within 12% of `k_tile_instructions`. So are the k
# loops of 9 wgmma kernels (sm_90a, the same day): within 8%.
#
# Instructions from packed code to one 32-bit register of the A fragment, without the group scale. BF16 math, two
# weights a register: shift (half of them are free), mask-and-or, subtract the magic number and zero point; 8 bits go
# through two float32 and back; 3 bits merge two planes. INT8 math with 4-bit weights: shift and mask for one register
# in two, mask for the other. E4M3 math: sign and magnitude moved apart.
_DECODE_INSTRUCTIONS = MappingProxyType(
    {
        (Math.BF16, 16): 0.0,
        (Math.BF16, 8): 5.0,
        (Math.BF16, 4): 2.75,
        (Math.BF16, 3): 4.75,
        (Math.BF16, 2): 2.9,
        (Math.INT8, 8): 0.0,
        (Math.INT8, 4): 1.5,
        (Math.E4M3, 8): 0.0,
        (Math.E4M3, 4): 3.0,
        (Math.INT4, 4): 0.0,
    }
)
_SCALE_INSTRUCTIONS = 1.0  # one fma.bf16x2 a register with group scales and BF16 math
# A group's sum to float32 where it is an integer, and one fma, an accumulator.
_GROUP_SUM_INSTRUCTIONS = MappingProxyType({Math.INT8: 2.0, Math.E4M3: 1.0, Math.INT4: 2.0})
_TOKEN_GROUP_INSTRUCTIONS = 1.25  # and with token groups: the product of both scales, a share of loading them
_COPY_INSTRUCTIONS = 4.0  # cp.async and its address and bound
_LOOP_INSTRUCTIONS = 40.0  # a warp's barrier, wait, stage and k counters, scale loads
_EPILOGUE_INSTRUCTIONS = 3.0  # an accumulator's share of scale, convert, transpose, address, store
_WGMMA_STEP_INSTRUCTIONS = 6.0  # a warp's fence, commit and wait, for each group of wgmmas
_WGMMA_LOOP_INSTRUCTIONS = 32.0  # a warp's barriers, stage, phase and k counters, descriptors
WGMMA_WARPS = 4
# Tiles of few tokens in the wgmma family, bf16 math: a register from packed codes, which keep their offset and their
# scale; a warp's waits, addresses and reads of tokens (machine code of five kernels, sm_90a, 2026-11-24).
_WARP_DECODE_INSTRUCTIONS = MappingProxyType({16: 0.0, 8: 3.0, 4: 1.7, 3: 2.6, 2: 1.35})
_WARP_LOOP_INSTRUCTIONS = 60.0
_WARPS_UP_TO_TOKENS = 8
_SUMS_UP_TO_TOKENS = 16  # where wgmma scales a group's sums in bf16 math, not its weights
_LDMATRIX_BYTES = 512  # x4: four 8x8 matrices of 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class TileWork:
    """One tile of one scheme under one configuration. `k_tile_` fields are per iteration of the main loop, of the
    whole CTA.

    MMAs are counted in m16n8s: those multiplied, and (`tensor`) as many as take the time, where narrow tiles waste
    some. `exposed_k_steps` are the k-steps of an iteration whose results a warp waits for, and
    `serial_instructions_of_a_warp` what it does while its own MMAs stand still; `instructions_of_a_warp` are all of one
    that multiplies. `stores_in_turn` are the bulk stores,
    a token row each, that the lanes of one warp start one after another. `partial_sum_bytes` are what the CTA that
    stores a tile gets from those that share its reduction.
    """

    math: Math
    k_tile: int
    k_tile_weight_bytes: float
    k_tile_token_bytes: float
    k_tile_smem_bytes: float
    k_tile_mmas: float
    k_tile_tensor_mmas: float
    k_tile_instructions: float
    instructions_of_a_warp: float
    k_steps: int
    exposed_k_steps: float
    mmas_per_k_step_of_a_warp: float
    serial_instructions_of_a_warp: float
    epilogue_instructions: float
    stores_in_turn: int
    output_bytes: float
    partial_sum_bytes: float

    @property
    def k_tile_bytes(self) -> float:
        """What one iteration copies into shared memory."""
        return self.k_tile_weight_bytes + self.k_tile_token_bytes


@functools.lru_cache(maxsize=65536)
def tile_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    """Counts for one tile; they depend on nothing else. UnsupportedError for a scheme that no kernel decodes."""
    if config.family is Family.MMA:
        return _mma_work(config, scheme)
    return _warp_work(config, scheme) if multiplies_in_warps(config, scheme) else _wgmma_work(config, scheme)


def multiplies_in_warps(config: KernelConfig, scheme: QuantScheme) -> bool:
    """Whether a kernel of the wgmma family multiplies with mma.sync: bf16 math and few tokens."""
    return scheme.math is Math.BF16 and config.tile.n <= _WARPS_UP_TO_TOKENS


def narrowest_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    """Of the narrowest token tile that the configuration has; `tile_work` where all are as wide."""
    if not config.tail:
        return tile_work(config, scheme)
    narrow = TileShape(m=config.tile.m, n=config.token_widths[0])
    return tile_work(dataclasses.replace(config, tile=narrow, tail=0), scheme)


def _mma_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    rows, tokens, warps = config.tile.m, config.tile.n, config.warps
    k_steps = K_TILE[scheme.math] // MMA_K[scheme.math]
    weight_bytes, token_bytes = _k_tile_bytes(config, scheme)
    mmas = (rows / 16) * (tokens / 8) * k_steps
    fragment_bytes = weight_bytes * warps.n + token_bytes * warps.m
    instructions = (
        mmas
        + _decode_instructions(config, scheme, k_steps)
        + _group_sum_instructions(config, scheme)
        + fragment_bytes / _LDMATRIX_BYTES
        + (weight_bytes + token_bytes) / WARP_COPY_BYTES * _COPY_INSTRUCTIONS
        + warps.num_warps * _LOOP_INSTRUCTIONS
    )
    return TileWork(
        math=scheme.math,
        k_tile=K_TILE[scheme.math],
        k_tile_weight_bytes=weight_bytes,
        k_tile_token_bytes=token_bytes,
        k_tile_smem_bytes=weight_bytes + token_bytes + fragment_bytes,
        k_tile_mmas=mmas,
        k_tile_tensor_mmas=mmas,
        k_tile_instructions=instructions,
        instructions_of_a_warp=instructions / warps.num_warps,
        k_steps=k_steps,
        exposed_k_steps=k_steps,
        mmas_per_k_step_of_a_warp=(rows / 16 / warps.m) * (tokens / 8 / warps.n),
        serial_instructions_of_a_warp=0.0,
        epilogue_instructions=rows * tokens / THREADS_PER_WARP * _EPILOGUE_INSTRUCTIONS,
        stores_in_turn=0,
        output_bytes=2.0 * rows * tokens,
        partial_sum_bytes=0.0,
    )


def _wgmma_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    """The producer copies without the consumers' help; every wgmma reads its tokens from shared memory again. Where
    group scales make each k-tile's sums wait, a warp decodes, multiplies and scales in turn. The CTAs of a cluster
    copy a share of the tokens each, for all of them.
    """
    rows, tokens, warps = config.tile.m, config.tile.n, config.warps.num_warps
    k_steps = K_TILE[scheme.math] // MMA_K[scheme.math]
    weight_bytes, token_bytes = _k_tile_bytes(config, scheme)
    per_token_mma = rows / 16 * k_steps / 8
    wide = max(tokens, WGMMA_MIN_TOKENS)
    wgmmas = rows / WGMMA_ROWS * k_steps
    decode, group_sums = _decode_instructions(config, scheme, k_steps), _group_sum_instructions(config, scheme)
    in_turn = group_sums > 0 and scheme.math is not Math.BF16
    # bf16 sums of a group wait once for two k-tiles, and the next fragments are decoded meanwhile.
    k_tiles_per_wait = 2 if _scales_sums(config, scheme) else 1
    instructions = (
        wgmmas * WGMMA_WARPS
        + decode
        + group_sums
        + weight_bytes / WARP_COPY_BYTES
        + warps * ((1 if in_turn else k_steps) * _WGMMA_STEP_INSTRUCTIONS + _WGMMA_LOOP_INSTRUCTIONS)
    )
    return TileWork(
        math=scheme.math,
        k_tile=K_TILE[scheme.math],
        k_tile_weight_bytes=weight_bytes,
        k_tile_token_bytes=token_bytes / config.cluster,
        k_tile_smem_bytes=2 * weight_bytes + token_bytes * (1 + rows / WGMMA_ROWS),
        k_tile_mmas=per_token_mma * tokens,
        k_tile_tensor_mmas=per_token_mma * wide,
        k_tile_instructions=instructions,
        instructions_of_a_warp=instructions / warps,
        k_steps=k_steps,
        exposed_k_steps=1.0 / k_tiles_per_wait if group_sums > 0 else 0.0,
        mmas_per_k_step_of_a_warp=(rows / 16 / warps) * (wide / 8),
        serial_instructions_of_a_warp=(decode + group_sums) / warps if in_turn else 0.0,
        epilogue_instructions=rows * tokens / THREADS_PER_WARP * _wgmma_epilogue_instructions(scheme),
        stores_in_turn=min(tokens, THREADS_PER_WARP) * -(-tokens // (warps * THREADS_PER_WARP)),
        output_bytes=2.0 * rows * tokens,
        partial_sum_bytes=4.0 * rows * tokens * (config.split_k - 1),
    )


def _warp_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    """Few tokens in the wgmma family: every warp decodes and multiplies its own rows, and reads the next k-tile before
    it multiplies this one, so that it waits for no result. Codes are multiplied as they are: a row of ones beside them
    sums what lies above them in the mantissa, and float32 sums take scales and zero points every two k-tiles.
    """
    rows, tokens, warps = config.tile.m, config.tile.n, config.warps.num_warps
    k_steps = K_TILE[scheme.math] // MMA_K[scheme.math]
    weight_bytes, token_bytes = _k_tile_bytes(config, scheme)
    has_offsets = scheme.weight_bits <= 4 or not scheme.is_symmetric
    mmas = (rows / 16) * (tokens / 8) * k_steps
    of_ones = warps * (tokens / 8) * k_steps if has_offsets else 0.0
    each_sum = (1 + has_offsets) / (1 if scheme.group_size == K_TILE[scheme.math] else 2)
    instructions = (
        mmas
        + of_ones
        + rows / 16 * k_steps * 4 * _WARP_DECODE_INSTRUCTIONS[scheme.weight_bits]
        + (rows * tokens / THREADS_PER_WARP * each_sum if has_offsets or scheme.group_size != -1 else 0.0)
        + weight_bytes / WARP_COPY_BYTES
        + warps * _WARP_LOOP_INSTRUCTIONS
    )
    return TileWork(
        math=scheme.math,
        k_tile=K_TILE[scheme.math],
        k_tile_weight_bytes=weight_bytes,
        k_tile_token_bytes=token_bytes,
        k_tile_smem_bytes=2 * weight_bytes + token_bytes * (1 + warps),
        k_tile_mmas=mmas,
        k_tile_tensor_mmas=(mmas + of_ones) * MMA_SYNC_IN_WGMMAS,
        k_tile_instructions=instructions,
        instructions_of_a_warp=instructions / warps,
        k_steps=k_steps,
        exposed_k_steps=0.0,
        mmas_per_k_step_of_a_warp=(rows / 16 / warps + has_offsets) * (tokens / 8) * MMA_SYNC_IN_WGMMAS,
        serial_instructions_of_a_warp=0.0,
        epilogue_instructions=rows * tokens / THREADS_PER_WARP * _wgmma_epilogue_instructions(scheme),
        stores_in_turn=tokens,
        output_bytes=2.0 * rows * tokens,
        partial_sum_bytes=4.0 * rows * tokens * (config.split_k - 1),
    )


def _wgmma_epilogue_instructions(scheme: QuantScheme) -> float:
    """A sum's share of packing and stmatrix, of int32 to float32, of token and channel scales."""
    is_narrow, per_channel = scheme.math is not Math.BF16, scheme.weight_bits < 16 and scheme.group_size == -1
    return 0.75 + (scheme.math is Math.INT8 and per_channel) + is_narrow + per_channel


def _k_tile_bytes(config: KernelConfig, scheme: QuantScheme) -> tuple[float, float]:
    """What one iteration copies: weights with their strips, and tokens."""
    rows, tokens, k_tile = config.tile.m, config.tile.n, K_TILE[scheme.math]
    strips = (1 + (not scheme.is_symmetric)) if scheme.group_size != -1 else 0
    weight_bytes = rows * k_tile * scheme.weight_bits / 8 + strips * 2.0 * rows
    token_scale_bytes = 4.0 * tokens if _has_token_groups(scheme) else 0.0
    return weight_bytes, tokens * k_tile * scheme.activation_bits / 8 + token_scale_bytes


def _has_token_groups(scheme: QuantScheme) -> bool:
    """Whether the tokens' scales change along K."""
    return scheme.math is Math.INT4 and scheme.group_size != -1


def _decode_instructions(config: KernelConfig, scheme: QuantScheme, k_steps: int) -> float:
    """From packed weights to A fragments, in every warp column. UnsupportedError where no kernel decodes them."""
    if (scheme.math, scheme.weight_bits) not in _DECODE_INSTRUCTIONS:
        raise UnsupportedError(
            f"a kernel for {scheme.name}",
            [f"{scheme.weight_bits}-bit weights have no packing for {scheme.math.name} tensor cores"],
        )
    registers = config.tile.m / 16 * k_steps * 4 * config.warps.n
    scaled = scheme.group_size != -1 and scheme.math is Math.BF16 and not _scales_sums(config, scheme)
    each = _DECODE_INSTRUCTIONS[scheme.math, scheme.weight_bits] + (_SCALE_INSTRUCTIONS if scaled else 0.0)
    return registers * each


def _group_sum_instructions(config: KernelConfig, scheme: QuantScheme) -> float:
    """What group scales cost where the MMA sums codes: every accumulator is scaled once a k-tile, in bf16 math once in
    two.
    """
    if _scales_sums(config, scheme):
        return config.tile.m * config.tile.n / THREADS_PER_WARP / 2
    if scheme.group_size == -1 or scheme.math is Math.BF16:
        return 0.0
    each = _GROUP_SUM_INSTRUCTIONS[scheme.math] + (_TOKEN_GROUP_INSTRUCTIONS if _has_token_groups(scheme) else 0.0)
    return config.tile.m * config.tile.n / THREADS_PER_WARP * each


def _scales_sums(config: KernelConfig, scheme: QuantScheme) -> bool:
    """Whether bf16 math scales a group's sums instead of its weights: wgmma, few tokens, groups of two k-tiles."""
    return (
        config.family is Family.WGMMA
        and scheme.math is Math.BF16
        and scheme.weight_bits <= 4
        and scheme.group_size != -1
        and scheme.group_size // K_TILE[Math.BF16] % 2 == 0
        and config.tile.n <= _SUMS_UP_TO_TOKENS
    )


def part_k_tiles(scheme: QuantScheme, k: int, parts: int) -> int:
    """k-tiles of the longest of `parts` parts of a reduction, which are cut between groups of scales."""
    whole = 1 if scheme.group_size == -1 else max(scheme.group_size // K_TILE[scheme.math], 1)
    k_tiles = -(-k // K_TILE[scheme.math])
    return min(-(-k_tiles // (whole * parts)) * whole, k_tiles)


def expert_weight_bytes(scheme: QuantScheme, n: int, k: int) -> float:
    """Packed weights, scales and zero points of one expert, padding included, as the kernels read them once."""
    rows, columns = _round_up(n, UNIT_ROWS), _round_up(k, K_TILE[scheme.math])
    codes = rows * columns * scheme.weight_bits / 8
    if scheme.weight_bits == 16:
        return codes
    zero_bytes = 0 if scheme.is_symmetric else 2
    if scheme.group_size == -1:
        return codes + rows * (4 + zero_bytes)
    return codes + rows * -(-k // scheme.group_size) * (2 + zero_bytes)


def token_bytes(scheme: QuantScheme, k: int) -> float:
    """One token's activations as the kernels read them, with their scales."""
    if scheme.math is Math.BF16:
        return 2.0 * k
    row = _round_up(k, K_TILE[scheme.math]) * scheme.activation_bits / 8
    return row + 4.0 * (-(-k // K_TILE[Math.INT4]) if _has_token_groups(scheme) else 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
