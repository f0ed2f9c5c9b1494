"""Global to shared memory for one k-tile of one scheme, by cp.async: packed weights, activations, scale and zero strips."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from kernel_gen.kernels import ptx

STRIP_BYTES_PER_ROW = 2  # bf16 scale or zero point, stored as pairs


class StageLoader:
    """Fills stages for one scheme. `facts` is kernel_gen.layouts' description of the scheme, `stage` the offsets inside a stage."""

    def __init__(self, facts, stage, tile_m: int, tile_n: int, num_threads: int) -> None:
        self.facts, self.stage = facts, stage
        self.tile_m, self.tile_n, self.num_threads = tile_m, tile_n, num_threads
        self.row_bytes = facts.x_row_bytes
        self.chunks = self.row_bytes // 16  # 8 with 128-byte rows, 4 with 64

    @cute.jit
    def weights(self, stage, tid, blob, expert_index, feature_tile, k_tile, k_tiles, units):
        """tile_m rows' units lie side by side for one k-tile; rows past N's last unit are zero-filled."""
        per_tile: cutlass.Constexpr = self.tile_m // 64
        unit = (Int64(expert_index) * k_tiles + k_tile) * units + feature_tile * per_tile
        source = blob + unit * self.facts.unit_bytes
        valid = (units - feature_tile * per_tile) * self.facts.unit_bytes
        total: cutlass.Constexpr = per_tile * self.facts.unit_bytes
        for i in cutlass.range_constexpr((total // 16 + self.num_threads - 1) // self.num_threads):
            offset = (tid + i * self.num_threads) * 16
            if const_expr((i + 1) * self.num_threads * 16 <= total):
                self.chunk(stage + offset, source, offset, offset < valid)
            else:
                if offset < total:
                    self.chunk(stage + offset, source, offset, offset < valid)

    @cute.jit
    def chunk(self, smem, source, offset, wanted):
        size = Int32(16)
        at = source + offset
        if not wanted:
            size = Int32(0)
            at = source
        ptx.cp_async_16(smem, at, size)

    @cute.jit
    def activations(self, stage, tid, x, row, row_end, k_tile, row_bytes):
        """Rows row..row+tile_n of x (row_bytes apart), swizzled so that ldmatrix meets no bank conflict; rows of other experts and k past the end are zeros."""
        target = stage + self.stage.x_offset
        total: cutlass.Constexpr = self.tile_n * self.chunks
        for i in cutlass.range_constexpr((total + self.num_threads - 1) // self.num_threads):
            c = tid + i * self.num_threads
            r = c // self.chunks
            chunk = c % self.chunks
            if c < total:
                at = target + r * self.row_bytes + (swizzle(r, chunk, self.chunks) << 4)
                byte = k_tile * self.row_bytes + chunk * 16
                offset = Int64(row + r) * row_bytes + byte
                size = Int32(16)
                if row + r >= row_end or byte >= row_bytes:
                    size = Int32(0)
                    offset = Int64(0)
                ptx.cp_async_16(at, x + offset, size)

    @cute.jit
    def strip(self, target, tid, strip, expert_index, groups, group, feature_tile, units):
        """Scales or zero points of tile_m rows in one group: tile_m * 2 bytes side by side."""
        per_tile: cutlass.Constexpr = self.tile_m // 64
        unit = (Int64(expert_index) * groups + group) * units + feature_tile * per_tile
        source = strip + unit * (64 * STRIP_BYTES_PER_ROW)
        valid = (units - feature_tile * per_tile) * (64 * STRIP_BYTES_PER_ROW)
        offset = tid * 16
        if offset < self.tile_m * STRIP_BYTES_PER_ROW:
            self.chunk(target + offset, source, offset, offset < valid)

    @cute.jit
    def activation_scales(self, target, tid, scales, row, row_end, group, groups):
        """float32 scales [T, groups] of the tile's rows in one group."""
        for i in cutlass.range_constexpr((self.tile_n + self.num_threads - 1) // self.num_threads):
            r = tid + i * self.num_threads
            if r < self.tile_n:
                size = Int32(4)
                offset = (Int64(row + r) * groups + group) * 4
                if row + r >= row_end:
                    size = Int32(0)
                    offset = Int64(0)
                ptx.cp_async_4(target + r * 4, scales + offset, size)


def swizzle(row, chunk, chunks):
    """Which 16-byte chunk of its row the data goes to. 128-byte rows: 8 rows cover all banks; 64-byte rows: pairs of rows do."""
    return chunk ^ (row & 7) if chunks == 8 else chunk ^ ((row >> 1) & 3)
