"""Sums of a wgmma tile to Y: scales, bf16, transpose through shared memory (stmatrix), whole lines to global memory.

A warpgroup stores its own rows and waits for no other, so that another one's k loop may go on meanwhile. Tokens go a
few at a time through two buffers in turn: small ones leave the room to the stages, and one barrier each suffices.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from kernel_gen import smem_wgmma
from kernel_gen.kernels import ptx

FIRST_BARRIER = 1
"""Named barrier of the first consumer warpgroup; the others have those after it."""


class WgmmaEpilogue:
    """tile_m x tile_n sums, of which each consumer warpgroup has some units of 64 rows; `extra_scale` undoes what
    decoding multiplied by.
    """

    def __init__(self, config, arrays, tile_n: int, channel_scales: bool, token_scales: bool, extra_scale: float):
        self.tile_m, self.tile_n, self.groups = config.tile.m, tile_n, config.warps.m // 4
        self.m_units = self.tile_m // 64 // self.groups
        self.channel_scales, self.token_scales, self.extra_scale = channel_scales, token_scales, extra_scale
        self.row_bytes = smem_wgmma.output_row_bytes(config)
        self.chunk = smem_wgmma.output_tokens(config)
        self.buffer_bytes = arrays.output_buffer
        self.group_bytes = min(2, -(-config.tile.n // self.chunk)) * self.buffer_bytes
        self.group_scale_bytes = config.tile.n * 4
        self.unit_features = 64  # of Y, that a unit of 64 rows becomes

    @cute.jit
    def fetch(self, at, tokens, tid):
        """What the epilogue needs from global memory, asked for before the k loop: float32 scales of this thread's
        rows [units][2] (or None), and of tokens tid % 128 and 128 after it (or none). tokens: address of the tokens'
        scales.
        """
        row, row_end, feature_tile, index, slot_at, _, units = at
        lane = tid % 32
        warp = (tid // 32) % 4
        group = tid // 128 - 1
        columns = []
        if const_expr(self.token_scales):
            for i in cutlass.range_constexpr((self.tile_n + 127) // 128):
                column = cutlass.min(row + tid % 128 + i * 128, row_end - 1)
                columns.append(ptx.ldg_f32(tokens + Int64(column) * 4))
        return self.channel_row_scales(slot_at, index, feature_tile, units, group, warp, lane), columns

    @cute.jit
    def run(self, acc, scales, output, token_scales, tid, at, y):
        """acc: the mainloop's sums; scales: of `fetch`; output, token_scales: shared-memory addresses."""
        row, row_end, feature_tile, _, _, _, _ = at
        row_scales, columns = scales
        lane = tid % 32
        warp = (tid // 32) % 4
        group = tid // 128 - 1
        buffers = output + group * self.group_bytes
        scales_at = token_scales + group * self.group_scale_bytes
        self.barrier(group)  # all have read what the tile before left
        if const_expr(self.token_scales):
            for i in cutlass.range_constexpr(len(columns)):
                if tid % 128 + i * 128 < self.tile_n:
                    ptx.sts_f32(scales_at + (tid % 128 + i * 128) * 4, columns[i] * Float32(self.extra_scale))
            self.barrier(group)
        to = self.place(warp, lane)
        for first in cutlass.range_constexpr(0, self.tile_n, self.chunk):
            buffer = buffers + (first // self.chunk % 2) * self.buffer_bytes
            num: cutlass.Constexpr = min(self.chunk, self.tile_n - first)
            for pair in cutlass.range_constexpr(first // 16, (first + num + 15) // 16):
                column_scales = self.column_scales(scales_at, pair, lane)
                for m in cutlass.range_constexpr(self.m_units):
                    at_unit = buffer + (pair * 16 - first) * self.row_bytes + m * (2 * self.unit_features) + to
                    self.put(acc, m, pair, row_scales[m], column_scales, at_unit)
            self.barrier(group)
            self.store(buffer, first, num, row, row_end, feature_tile, group, tid, y)

    def place(self, warp, lane):
        """Where in a buffer a lane stores its row of the 8x8 matrices of a unit and 16 tokens."""
        return ((lane & 7) + ((lane >> 4) << 3)) * self.row_bytes + (warp * 16 + ((lane >> 3) & 1) * 8) * 2

    def put(self, acc, m, pair, row_scales, column_scales, at_unit):
        """A unit's sums for 16 tokens, or the only 8, to a buffer."""
        packed = []
        for j, scales in enumerate(column_scales):
            for half in range(2):
                values = self.pair_of(acc, m, 2 * pair + j, half, row_scales, scales)
                packed.append(ptx.pack_bf16(values[0], values[1]))
        ptx.stmatrix_trans(at_unit, packed)

    def pair_of(self, acc, m, block, half, row_scales, column_scales):
        """A row's sums for two tokens, scaled."""
        return [self.scaled(acc[(i, half, block), m, 0], row_scales[half], column_scales[i]) for i in range(2)]

    @cute.jit
    def store(
        self, buffer, first: cutlass.Constexpr, num: cutlass.Constexpr, row, row_end, feature_tile, group, tid, y
    ):
        """Tokens first .. first + num of the warpgroup's rows to Y: a lane 8 features, a line a unit's."""
        num_features = cute.size(y, mode=[1])
        thread = tid % 128
        lanes: cutlass.Constexpr = self.unit_features // 8
        lines: cutlass.Constexpr = 128 // lanes
        for i in cutlass.range_constexpr((num * self.m_units + lines - 1) // lines):
            line = i * lines + thread // lanes
            token = line // self.m_units
            m = line % self.m_units
            unit = feature_tile * (self.tile_m // 64) + m * self.groups + group
            feature = unit * self.unit_features + (thread % lanes) * 8
            last = row_end
            if const_expr(num * self.m_units % lines):
                last = cutlass.min(row_end, row + first + num)
            if row + first + token < last and feature < num_features:
                a, b, c, d = ptx.lds128(
                    buffer + token * self.row_bytes + m * (2 * self.unit_features) + (thread % lanes) * 16
                )
                target = y.iterator.toint() + (Int64(row + first + token) * num_features + feature) * 2
                ptx.stg128(target, a, b, c, d)

    @cute.jit
    def barrier(self, group):
        """Of one warpgroup."""
        cute.arch.barrier(barrier_id=FIRST_BARRIER + group, number_of_threads=128)

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

    def column_scales(self, scales_at, pair, lane):
        """Float32 scales, or None, of this thread's columns in each block of 8 tokens, two blocks or the only one."""
        blocks = range(2 * pair, min(2 * pair + 2, self.tile_n // 8))
        if not self.token_scales:
            return [[None, None] for _ in blocks]
        return [ptx.lds64_f32(scales_at + block * 32 + (lane % 4) * 8) for block in blocks]
