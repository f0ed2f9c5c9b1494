"""The k loop of one scheme: wait for a stage, let the loader go on, multiply. One class a kind of math; the kernel
picks one per tile, outside the loop.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from kernel_gen.kernels import ptx
from kernel_gen.kernels.dequant import Bf16Weights, NarrowWeights
from kernel_gen.kernels.loads import swizzle
from kernel_gen.layouts import ActivationKind
from profiles.gpus import Math

# float32 1.5 * 2^23 as an integer start value: the sum read as a float is 1.5 * 2^23 + sum, exact below 2^22
MAGIC_INT = 0x4B400000
MAGIC_FLOAT = 12582912.0


class Mainloop:
    """Warp tile of m_blocks x n_blocks m16n8 accumulators."""

    def __init__(self, facts, stage, warps_m: int, m_blocks: int, n_blocks: int) -> None:
        self.facts, self.stage = facts, stage
        self.warps_m, self.m_blocks, self.n_blocks = warps_m, m_blocks, n_blocks
        self.math = facts.math
        self.chunks = facts.x_row_bytes // 16
        self.k_steps = self.chunks // 2  # an MMA takes 32 bytes of a token's row
        self.grouped = facts.has_group_scales and self.math is not Math.BF16
        self.has_group_zeros = facts.has_zero_points and facts.has_group_scales
        self.token_groups = facts.activation is ActivationKind.INT4_GROUP
        if self.math is Math.BF16:
            self.weights = Bf16Weights(
                facts.weight_bits, facts.has_zero_points, facts.has_group_scales, facts.unit_bytes
            )
        else:
            self.weights = NarrowWeights(self.math, facts.weight_bits, self.k_steps, facts.unit_bytes)

    @property
    def extra_scale(self) -> float:
        """What the sums are still to be multiplied by, scales aside."""
        return 1.0 if self.math is Math.BF16 else self.weights.extra_scale

    @property
    def integer(self) -> bool:
        return self.math in (Math.INT8, Math.INT4)

    @property
    def has_tile_biases(self) -> bool:
        """Whether what is subtracted from the codes holds for a whole tile, not for a k-group."""
        return self.math is Math.BF16 and self.facts.weight_bits != 16 and not self.has_group_zeros

    @cute.jit
    def tokens(self, fragments, stage, warp_n, lane, ks: cutlass.Constexpr):
        """B fragments of k-step ks for the warp's n_blocks: rows of 16 tokens by ldmatrix."""
        row = warp_n * (8 * self.n_blocks) + (lane & 7) + ((lane >> 4) << 3)
        chunk = 2 * ks + ((lane >> 3) & 1)
        if const_expr(self.n_blocks == 1):
            row = warp_n * 8 + (lane & 7)
        address = stage + self.stage.x_offset + row * (self.chunks * 16) + (swizzle(row, chunk, self.chunks) << 4)
        if const_expr(self.n_blocks == 1):
            got = ptx.ldmatrix_x2(address)
            fragments[0, 0] = got[0]
            fragments[1, 0] = got[1]
        else:
            for pair in cutlass.range_constexpr(self.n_blocks // 2):
                got = ptx.ldmatrix_x4(address + pair * 16 * (self.chunks * 16))
                for j in cutlass.range_constexpr(2):
                    fragments[j, 2 * pair] = got[j]
                    fragments[j, 2 * pair + 1] = got[2 + j]

    @cute.jit
    def multiply(self, acc, a, fragments, m: cutlass.Constexpr, fresh: cutlass.Constexpr):
        """One m16 block against all token blocks. fresh: start from MAGIC_INT instead of the sum so far."""
        for n in cutlass.range_constexpr(self.n_blocks):
            c = [acc[i, m, n] for i in range(4)]
            if const_expr(fresh):
                c = [Int32(MAGIC_INT)] * 4
            d = ptx.mma_sync(self.math.value, a, [fragments[0, n], fragments[1, n]], c)
            for i in cutlass.range_constexpr(4):
                acc[i, m, n] = d[i]

    @cute.jit
    def step(self, state, stage, warp_m, warp_n, lane):
        """One k-tile."""
        if const_expr(self.math is Math.BF16):
            self.step_bf16(state, stage, warp_m, warp_n, lane)
        else:
            self.step_narrow(state, stage, warp_m, warp_n, lane)

    @cute.jit
    def step_bf16(self, state, stage, warp_m, warp_n, lane):
        acc, words, fragments, scales, biases, consts = state
        for m in cutlass.range_constexpr(self.m_blocks):
            block = warp_m * self.m_blocks + m
            if const_expr(self.facts.weight_bits != 16):
                self.weights.load(words, m, stage, block, lane, 0)
            if const_expr(self.facts.has_group_scales):
                self.fetch_group(scales, biases, m, stage + block * 32 + (lane // 4) * 4, consts)
        for ks in cutlass.range_constexpr(self.k_steps):
            self.tokens(fragments, stage, warp_n, lane, ks)
            for m in cutlass.range_constexpr(self.m_blocks):
                if const_expr(self.facts.weight_bits == 16):
                    self.weights.load(words, m, stage, warp_m * self.m_blocks + m, lane, ks)
                a = self.weights.decode(words, m, ks, scales, biases, consts)
                self.multiply(acc, a, fragments, m, False)

    @cute.jit
    def fetch_group(self, scales, biases, m: cutlass.Constexpr, address, consts):
        """Scale, and zero point where there is one, of rows g and g + 8 in this k-tile's group."""
        pair = ptx.lds32(address + self.stage.scale_offset)
        scales[0, m] = ptx.broadcast_low(pair)
        scales[1, m] = ptx.broadcast_high(pair)
        if const_expr(self.facts.has_zero_points):
            bias = self.weights.bias(ptx.lds32(address + self.stage.zero_offset), consts)
            biases[0, m] = bias[0]
            biases[1, m] = bias[1]

    @cute.jit
    def fetch_channel(self, state, zero_strip, block0, num_blocks, lane):
        """Biases that hold for a whole tile: zero points per channel from global memory, or the symmetric schemes'
        constant.
        """
        biases, consts = state[4], state[5]
        for m in cutlass.range_constexpr(self.m_blocks):
            pair = None
            if const_expr(self.facts.has_zero_points):
                block = cutlass.min(block0 + m, num_blocks - 1)
                pair = ptx.ldg32(zero_strip + block * 32 + (lane // 4) * 4)
            bias = self.weights.bias(pair, consts)
            biases[0, m] = bias[0]
            biases[1, m] = bias[1]

    @cute.jit
    def step_narrow(self, state, stage, warp_m, warp_n, lane):
        acc, words, fragments, sums = state
        for ks in cutlass.range_constexpr(self.k_steps):
            self.tokens(fragments, stage, warp_n, lane, ks)
            for m in cutlass.range_constexpr(self.m_blocks):
                self.weights.load(words, m, stage, warp_m * self.m_blocks + m, lane, ks)
                a = self.weights.fragment(words, m, ks)
                self.multiply(sums if self.grouped else acc, a, fragments, m, self.grouped and ks == 0)
        if const_expr(self.grouped):
            self.scale_group(acc, sums, stage, warp_m, warp_n, lane)

    @cute.jit
    def scale_group(self, acc, sums, stage, warp_m, warp_n, lane):
        """acc += (this group's integer sums) * weight scale * activation scale of the group, in float32."""
        for m in cutlass.range_constexpr(self.m_blocks):
            block = warp_m * self.m_blocks + m
            pair = ptx.lds32(stage + self.stage.scale_offset + block * 32 + (lane // 4) * 4)
            row_scales = (ptx.bf16_low_to_f32(pair), ptx.bf16_high_to_f32(pair))
            for n in cutlass.range_constexpr(self.n_blocks):
                columns = (Float32(1.0), Float32(1.0))
                if const_expr(self.token_groups):
                    token = warp_n * (8 * self.n_blocks) + n * 8 + (lane % 4) * 2
                    columns = ptx.lds64_f32(stage + self.stage.sx_offset + token * 4)
                for i in cutlass.range_constexpr(4):
                    value = ptx.bits_to_f32(sums[i, m, n]) - Float32(MAGIC_FLOAT)
                    scale = row_scales[i // 2]
                    if const_expr(self.token_groups):
                        scale = scale * columns[i % 2]
                    acc[i, m, n] = acc[i, m, n] + value * scale

    def to_float(self, acc):
        """Integer sums as float32; |sum| < 2^24 is exact, and beyond it the output's rounding is far coarser."""
        sums = cute.make_rmem_tensor((4, self.m_blocks, self.n_blocks), Float32)
        for m in range(self.m_blocks):
            for n in range(self.n_blocks):
                for i in range(4):
                    sums[i, m, n] = ptx.int_to_f32(acc[i, m, n])
        return sums

    def registers(self):
        """Register tensors of one tile: what `step` takes as state."""
        float_sums = not self.integer or self.grouped
        acc = cute.make_rmem_tensor((4, self.m_blocks, self.n_blocks), Float32 if float_sums else Int32)
        fragments = cute.make_rmem_tensor((2, self.n_blocks), Int32)
        if self.math is Math.BF16:
            words = cute.make_rmem_tensor((self.weights.words, self.m_blocks), Int32)
            scales = cute.make_rmem_tensor((2, self.m_blocks), Int32)
            biases = cute.make_rmem_tensor((2, self.m_blocks), Int32)
            return acc, words, fragments, scales, biases, self.weights.constants()
        words = cute.make_rmem_tensor((self.weights.words, self.m_blocks), Int32)
        sums = cute.make_rmem_tensor((4, self.m_blocks, self.n_blocks), Int32) if self.grouped else acc
        return acc, words, fragments, sums
