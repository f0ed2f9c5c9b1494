"""What a tile costs, counted, not timed: bytes, instructions and tensor work of one k-tile of one scheme, and how a
token load splits into tiles.

Counts follow the `mma` family's structure: weights are the MMA's M operand, every warp column decodes the weights
again for its own tokens, every warp row reads the tokens again, and the copies of a k-tile are spread over the CTA's
threads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from costmodel.constants import MMA_K
from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.kernels import THREADS_PER_WARP, KernelConfig
from profiles.schemes import QuantScheme

K_TILE = MappingProxyType({Math.BF16: 64, Math.INT8: 128, Math.E4M3: 128, Math.INT4: 128})
"""Reduction of one pipeline stage; ARCHITECTURE.md, "Layouts"."""
UNIT_ROWS = 64
"""Packed weights come in units of 64 rows."""
WARP_COPY_BYTES = 16 * THREADS_PER_WARP
"""One cp.async or 128-bit shared-memory load of a warp."""

# The counts below were held against the sm_89 machine code of 12 kernels (2026-11-24): a k loop's body, less the search
# for the next tile that runs once a tile (91 to 107 instructions), is within 12% of `k_tile_instructions`.
#
# Instructions from packed code to one 32-bit register of the A fragment, without the group scale. BF16 math, two
# weights a register: shift (half of them are free), mask-and-or, subtract the magic number and zero point; 8 bits go
# through two float32 and back; 3 bits merge two planes. INT8 math with 4-bit weights: shift and mask for one register
# in two, mask for the other.
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
        (Math.E4M3, 4): 4.0,
        (Math.INT4, 4): 0.0,
    }
)
_SCALE_INSTRUCTIONS = 1.0  # one fma.bf16x2 a register with group scales and BF16 math
_GROUP_SUM_INSTRUCTIONS = 2.0  # integer or fp8 math: a group's sum to float32 and one fma, an accumulator
_TOKEN_GROUP_INSTRUCTIONS = 1.25  # and with token groups: the product of both scales, a share of loading them
_COPY_INSTRUCTIONS = 4.0  # cp.async and its address and bound
_LOOP_INSTRUCTIONS = 40.0  # a warp's barrier, wait, stage and k counters, scale loads
_EPILOGUE_INSTRUCTIONS = 3.0  # an accumulator's share of scale, convert, transpose, address, store
_LDMATRIX_BYTES = 512  # x4: four 8x8 matrices of 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class TileWork:
    """One tile of one scheme under one configuration. `k_tile_` fields are per iteration of the main loop, of the
    whole CTA.
    """

    math: Math
    k_tile: int
    k_tile_weight_bytes: float
    k_tile_token_bytes: float
    k_tile_smem_bytes: float
    k_tile_mmas: float
    k_tile_instructions: float
    k_steps: int
    mmas_per_k_step_of_a_warp: float
    epilogue_instructions: float
    output_bytes: float

    @property
    def k_tile_bytes(self) -> float:
        """What one iteration copies into shared memory."""
        return self.k_tile_weight_bytes + self.k_tile_token_bytes


@functools.lru_cache(maxsize=65536)
def tile_work(config: KernelConfig, scheme: QuantScheme) -> TileWork:
    """Counts for one tile; they depend on nothing else. UnsupportedError for a scheme that no kernel decodes."""
    rows, tokens, k_tile = config.tile.m, config.tile.n, K_TILE[scheme.math]
    mma_k = MMA_K[scheme.math]
    k_steps = k_tile // mma_k
    grouped = scheme.group_size != -1
    strips = (1 + (not scheme.is_symmetric)) if grouped else 0
    weight_bytes = rows * k_tile * scheme.weight_bits / 8 + strips * 2.0 * rows
    token_bytes = tokens * k_tile * scheme.activation_bits / 8 + (4.0 * tokens if _has_token_groups(scheme) else 0.0)
    mmas = (rows / 16) * (tokens / 8) * k_steps
    fragment_bytes = weight_bytes * config.warps.n + token_bytes * config.warps.m
    return TileWork(
        math=scheme.math,
        k_tile=k_tile,
        k_tile_weight_bytes=weight_bytes,
        k_tile_token_bytes=token_bytes,
        k_tile_smem_bytes=weight_bytes + token_bytes + fragment_bytes,
        k_tile_mmas=mmas,
        k_tile_instructions=(
            mmas
            + _decode_instructions(config, scheme, k_steps)
            + _group_sum_instructions(config, scheme)
            + fragment_bytes / _LDMATRIX_BYTES
            + (weight_bytes + token_bytes) / WARP_COPY_BYTES * _COPY_INSTRUCTIONS
            + config.warps.num_warps * _LOOP_INSTRUCTIONS
        ),
        k_steps=k_steps,
        mmas_per_k_step_of_a_warp=(rows / 16 / config.warps.m) * (tokens / 8 / config.warps.n),
        epilogue_instructions=rows * tokens / THREADS_PER_WARP * _EPILOGUE_INSTRUCTIONS,
        output_bytes=2.0 * rows * tokens,
    )


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
    scaled = scheme.group_size != -1 and scheme.math is Math.BF16
    each = _DECODE_INSTRUCTIONS[scheme.math, scheme.weight_bits] + (_SCALE_INSTRUCTIONS if scaled else 0.0)
    return registers * each


def _group_sum_instructions(config: KernelConfig, scheme: QuantScheme) -> float:
    """What group scales cost where the MMA sums codes: every accumulator is scaled once a k-tile."""
    if scheme.group_size == -1 or scheme.math is Math.BF16:
        return 0.0
    each = _GROUP_SUM_INSTRUCTIONS + (_TOKEN_GROUP_INSTRUCTIONS if _has_token_groups(scheme) else 0.0)
    return config.tile.m * config.tile.n / THREADS_PER_WARP * each


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSplit:
    """A token load under one scheme, cut into token tiles of one width."""

    num_tokens: int
    num_active_experts: int
    num_token_tiles: int
    max_tokens: int


@functools.lru_cache(maxsize=65536)
def split_load(tokens_per_expert: tuple[int, ...], tile_n: int) -> LoadSplit:
    """Sums over the experts that have tokens."""
    tokens: npt.NDArray[np.int64] = np.asarray(tokens_per_expert, dtype=np.int64)
    return LoadSplit(
        num_tokens=int(tokens.sum()),
        num_active_experts=int(np.count_nonzero(tokens)),
        num_token_tiles=int((-(-tokens // tile_n)).sum()),
        max_tokens=int(tokens.max(initial=0)),
    )


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
