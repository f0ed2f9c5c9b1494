"""SwiGLU in the epilogue: rows of gate and up that belong together are eight apart (Experts.interleaved), so that one
thread has both sums. Y gets silu(gate) * up, half as many features as there are rows, rounded once.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64, const_expr

from kernel_gen.kernels import ptx
from kernel_gen.kernels.epilogue import Epilogue
from kernel_gen.kernels.steps.ptx import silu
from kernel_gen.kernels.wgmma_epilogue import WgmmaEpilogue


class SwigluEpilogue(Epilogue):
    """The mma family's."""

    @cute.jit
    def run(self, acc, lane, y, num_features, feature0, token0, token_end, channels, padded_features, tokens):
        """As Epilogue.run; num_features are Y's, feature0 and padded_features count rows."""
        row_scales = cute.make_rmem_tensor((2, self.m_blocks), Float32)
        if const_expr(self.channel_scales):
            for m in cutlass.range_constexpr(self.m_blocks):
                for half in cutlass.range_constexpr(2):
                    row = cutlass.min(feature0 + m * 16 + half * 8 + lane // 4, padded_features - 1)
                    row_scales[half, m] = ptx.ldg_f32(channels + Int64(row) * 4)
        for n in cutlass.range_constexpr(self.n_blocks):
            columns = [Float32(self.extra_scale), Float32(self.extra_scale)]
            if const_expr(self.token_scales):
                for i in cutlass.range_constexpr(2):
                    column = cutlass.min(token0 + n * 8 + (lane % 4) * 2 + i, token_end - 1)
                    columns[i] = columns[i] * ptx.ldg_f32(tokens + Int64(column) * 4)
            token = token0 + n * 8 + lane // 4
            for m in cutlass.range_constexpr(self.m_blocks):
                products = []
                for i in cutlass.range_constexpr(2):
                    gate = self.scaled(acc[i, m, n], columns[i], row_scales, 0, m)
                    up = self.scaled(acc[2 + i, m, n], columns[i], row_scales, 1, m)
                    products.append(silu(gate) * up)
                pair = ptx.movmatrix_trans(ptx.pack_bf16(products[0], products[1]))
                feature = feature0 // 2 + m * 8
                if token < token_end and feature < num_features:
                    ptx.stg32(y + (Int64(token) * num_features + feature + (lane % 4) * 2) * 2, pair)

    def scaled(self, value, column_scale, row_scales, half, m):
        """A sum times whatever scales are left."""
        if self.token_scales or self.extra_scale != 1.0:
            value = value * column_scale
        if self.channel_scales:
            value = value * row_scales[half, m]
        return value


class WgmmaSwigluEpilogue(WgmmaEpilogue):
    """The wgmma family's: a unit of 64 rows becomes 32 features."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unit_features = 32

    def place(self, warp, lane):
        """Of two 8x8 matrices, eight tokens each; lanes from 16 on store none."""
        return (lane & 15) * self.row_bytes + warp * 16

    def put(self, acc, m, pair, row_scales, column_scales, at_unit):
        """Products of a unit for 16 tokens, or the only 8, to a buffer."""
        packed = []
        for j, scales in enumerate(column_scales):
            gate, up = (self.pair_of(acc, m, 2 * pair + j, half, row_scales, scales) for half in range(2))
            packed.append(ptx.pack_bf16(silu(gate[0]) * up[0], silu(gate[1]) * up[1]))
        ptx.stmatrix_trans(at_unit, packed)
