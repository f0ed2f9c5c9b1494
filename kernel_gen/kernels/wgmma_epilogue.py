"""Sums of a wgmma tile to Y: scales, bf16, transpose through shared memory (stmatrix), one bulk store a token row."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from kernel_gen.kernels import ptx


class WgmmaEpilogue:
    """tile_m x tile_n sums of `groups` warpgroups; `extra_scale` undoes what decoding multiplied by."""

    def __init__(
        self, tile_m: int, tile_n: int, groups: int, channel_scales: bool, token_scales: bool, extra_scale: float
    ) -> None:
        self.tile_m, self.tile_n, self.groups = tile_m, tile_n, groups
        self.m_units = tile_m // 64 // groups
        self.channel_scales, self.token_scales, self.extra_scale = channel_scales, token_scales, extra_scale
        self.row_bytes = tile_m * 2 + 16  # 16 more, so that rows start in different banks

    @cute.jit
    def run(self, acc, output, tid, at, y, tokens, barrier_id: cutlass.Constexpr):
        """acc: the mainloop's sums; output: shared memory, tile_n rows of row_bytes; tokens: address of float32 token
        scales.
        """
        row, row_end, feature_tile, index, slot_at, _, units = at
        lane = tid % 32
        warp = (tid // 32) % 4
        group = tid // 128 - 1
        threads: cutlass.Constexpr = 128 * self.groups
        num_features = cute.size(y, mode=[1])
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the tile before may still be read from `output`
        cute.arch.barrier(barrier_id=barrier_id, number_of_threads=threads)
        to = output + ((lane & 7) + ((lane >> 4) << 3)) * self.row_bytes + (warp * 16 + ((lane >> 3) & 1) * 8) * 2
        row_scales = self.channel_row_scales(slot_at, index, feature_tile, units, group, warp, lane)
        for pair in cutlass.range_constexpr(self.tile_n // 16):
            column_scales = self.column_scales(tokens, row, row_end, pair, lane)
            for m in cutlass.range_constexpr(self.m_units):
                packed = []
                for j in cutlass.range_constexpr(2):
                    for half in cutlass.range_constexpr(2):
                        values = []
                        for i in cutlass.range_constexpr(2):
                            values.append(
                                self.scaled(
                                    acc[(i, half, 2 * pair + j), m, 0], row_scales[m][half], column_scales[j][i]
                                )
                            )
                        packed.append(ptx.pack_bf16(values[0], values[1]))
                ptx.stmatrix_x4_trans(
                    to + pair * (16 * self.row_bytes) + (m * self.groups + group) * 128,
                    packed[0],
                    packed[1],
                    packed[2],
                    packed[3],
                )
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=barrier_id, number_of_threads=threads)
        feature0 = feature_tile * self.tile_m
        size = cutlass.min(num_features - feature0, self.tile_m) * 2
        for i in cutlass.range_constexpr((self.tile_n + threads - 1) // threads):
            token = tid - 128 + i * threads
            if token < self.tile_n and row + token < row_end:
                target = y.iterator.toint() + (Int64(row + token) * num_features + feature0) * 2
                ptx.bulk_store(target, output + token * self.row_bytes, size)
        cute.arch.cp_async_bulk_commit_group()

    def scaled(self, value, row_scale, column_scale):
        """One sum in float32, times whatever scales are left."""
        if value.dtype is Int32:
            value = ptx.int_to_f32(value)
        if column_scale is not None:
            value = value * column_scale
        if row_scale is not None:
            value = value * row_scale
        return value

    def channel_row_scales(self, slot_at, index, feature_tile, units, group, warp, lane):
        """Float32 scales of rows g and g + 8 of each unit, or None."""
        out = []
        for m in range(self.m_units):
            halves = [None, None]
            if self.channel_scales:
                channels = ptx.ldg64(slot_at + 24) + Int64(index) * units * 256
                for half in range(2):
                    r = feature_tile * self.tile_m + (m * self.groups + group) * 64 + warp * 16 + half * 8 + lane // 4
                    halves[half] = ptx.ldg_f32(channels + Int64(cutlass.min(r, units * 64 - 1)) * 4)
            out.append(halves)
        return out

    @cute.jit
    def column_scales(self, tokens, row, row_end, pair: cutlass.Constexpr, lane):
        """Float32 scales of this thread's columns in two blocks of 8 tokens, [2][2], or None."""
        out = []
        for j in cutlass.range_constexpr(2):
            columns = []
            for i in cutlass.range_constexpr(2):
                if const_expr(self.token_scales):
                    column = cutlass.min(row + (2 * pair + j) * 8 + (lane % 4) * 2 + i, row_end - 1)
                    columns.append(ptx.ldg_f32(tokens + Int64(column) * 4) * Float32(self.extra_scale))
                else:
                    columns.append(None)
            out.append(columns)
        return out
