"""Accumulators to Y: scales, bf16, transpose in registers (weights are the M operand, Y is token-major), stores."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int64, const_expr

from kernel_gen.kernels import ptx


class Epilogue:
    """Stores m_blocks x n_blocks m16n8 accumulators a warp."""

    def __init__(
        self, m_blocks: int, n_blocks: int, channel_scales: bool, token_scales: bool, extra_scale: float
    ) -> None:
        self.m_blocks, self.n_blocks = m_blocks, n_blocks
        self.channel_scales, self.token_scales, self.extra_scale = channel_scales, token_scales, extra_scale

    @cute.jit
    def run(self, acc, lane, y, num_features, feature0, token0, token_end, channels, padded_features, tokens):
        """acc: rmem [4, m_blocks, n_blocks] float32. feature0 and token0 are this warp's first; channels and tokens are
        the addresses of the expert's and the tokens' float32 scales.
        """
        row_scales = cute.make_rmem_tensor((2, self.m_blocks), Float32)
        if const_expr(self.channel_scales):
            for m in cutlass.range_constexpr(self.m_blocks):
                for half in cutlass.range_constexpr(2):
                    row = cutlass.min(feature0 + m * 16 + half * 8 + lane // 4, padded_features - 1)
                    row_scales[half, m] = ptx.ldg_f32(channels + Int64(row) * 4)
        for n in cutlass.range_constexpr(self.n_blocks):
            scale0 = Float32(self.extra_scale)
            scale1 = Float32(self.extra_scale)
            if const_expr(self.token_scales):
                column = token0 + n * 8 + (lane % 4) * 2
                if column < token_end:
                    scale0 *= ptx.ldg_f32(tokens + Int64(column) * 4)
                if column + 1 < token_end:
                    scale1 *= ptx.ldg_f32(tokens + Int64(column + 1) * 4)
            token = token0 + n * 8 + lane // 4
            for m in cutlass.range_constexpr(self.m_blocks):
                for half in cutlass.range_constexpr(2):
                    a = acc[2 * half, m, n]
                    b = acc[2 * half + 1, m, n]
                    if const_expr(self.token_scales or self.extra_scale != 1.0):
                        a *= scale0
                        b *= scale1
                    if const_expr(self.channel_scales):
                        a *= row_scales[half, m]
                        b *= row_scales[half, m]
                    pair = ptx.movmatrix_trans(ptx.pack_bf16(a, b))
                    feature = feature0 + m * 16 + half * 8
                    if token < token_end and feature < num_features:
                        ptx.stg32(y + (Int64(token) * num_features + feature + (lane % 4) * 2) * 2, pair)
