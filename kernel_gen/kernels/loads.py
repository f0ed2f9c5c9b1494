"""Global to shared memory for one k-tile of one scheme, by cp.async: packed weights, activations, scale and zero
strips.

Everything that does not change along K is worked out once a tile (`aim`); a k-tile then costs a thread its copies and
an addition a pointer.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from kernel_gen.kernels import ptx
from kernel_gen.layouts import ACTIVATION_ARGUMENT, STRIP_BYTES, ActivationKind

# The load cursor: Int32 words ...
TILE, SLOT, K_LEFT, STAGE, PHASE, W_LEFT, X_ROWS_LEFT, X_BYTES_LEFT, S_LEFT = range(9)
NUM_WORDS = 9
# ... and Int64 addresses, this thread's own.
WEIGHTS, TOKENS, SCALES, ZEROS, TOKEN_SCALES = range(5)
NUM_ADDRESSES = 5


class StageLoader:
    """Fills stages for one scheme. `facts` is kernel_gen.layouts' description of the scheme, `stage` the offsets inside
    a stage.
    """

    def __init__(self, facts, stage, tile_m: int, tile_n: int, num_threads: int) -> None:
        self.facts, self.stage = facts, stage
        self.tile_m, self.tile_n, self.num_threads = tile_m, tile_n, num_threads
        self.row_bytes = facts.x_row_bytes
        self.chunks = self.row_bytes // 16  # 8 with 128-byte rows, 4 with 64
        self.rows_per_pass = num_threads // self.chunks  # a multiple of 8: a thread's rows share their swizzle

    @cute.jit
    def aim(self, words, addresses, tid, at, slot_at, activations, k, units):
        """Point the cursor at a tile's first k-tile. at: (first row, end of the expert's rows, feature tile, index in
        the slot's stack).
        """
        row, row_end, feature_tile, index = at
        facts = self.facts
        k_tiles = (k + (facts.k_tile - 1)) // facts.k_tile
        words[K_LEFT] = k_tiles
        words[PHASE] = Int32(0)
        unit0 = feature_tile * (self.tile_m // 64)
        unit = Int64(index) * k_tiles * units + unit0
        addresses[WEIGHTS] = ptx.ldg64(slot_at) + unit * facts.unit_bytes + tid * 16
        words[W_LEFT] = (units - unit0) * facts.unit_bytes - tid * 16
        self.aim_tokens(words, addresses, tid, row, row_end, activations, k, k_tiles)
        if const_expr(facts.has_group_scales):
            groups = (k + (facts.group_size - 1)) // facts.group_size
            strip = (Int64(index) * groups * units + unit0) * STRIP_BYTES + tid * 16
            words[S_LEFT] = (units - unit0) * STRIP_BYTES - tid * 16
            addresses[SCALES] = ptx.ldg64(slot_at + 8) + strip
            if const_expr(facts.has_zero_points):
                addresses[ZEROS] = ptx.ldg64(slot_at + 16) + strip

    @cute.jit
    def aim_tokens(self, words, addresses, tid, row, row_end, activations, k, k_tiles):
        argument = ACTIVATION_ARGUMENT[self.facts.activation]
        stride = k_tiles * self.row_bytes
        if const_expr(self.facts.activation is ActivationKind.BF16):
            stride = (k * 2 + 15) // 16 * 16
        first = row + tid // self.chunks
        chunk = (tid % self.chunks) * 16
        addresses[TOKENS] = activations[argument] + Int64(first) * stride + chunk
        words[X_ROWS_LEFT] = row_end - first
        words[X_BYTES_LEFT] = stride - chunk
        if const_expr(self.facts.activation_groups):
            addresses[TOKEN_SCALES] = activations[argument + 1] + Int64(row + tid) * k_tiles * 4

    @cute.jit
    def issue(self, words, addresses, tid, k, units):
        """Start the copies of the next k-tile into the cursor's stage, and step the addresses along K."""
        self.issue_weights(words, addresses, tid, units)
        self.issue_tokens(words, addresses, tid, k)
        if const_expr(self.facts.has_group_scales):
            self.issue_strips(words, addresses, tid, units)

    @cute.jit
    def issue_weights(self, words, addresses, tid, units):
        """tile_m rows' units lie side by side for one k-tile; rows past N's last unit are zero-filled."""
        per_tile: cutlass.Constexpr = self.tile_m // 64
        total: cutlass.Constexpr = per_tile * self.facts.unit_bytes
        stage = words[STAGE] + tid * 16
        left = words[W_LEFT]
        if const_expr(per_tile == 1):
            left = Int32(1 << 30)
        for i in cutlass.range_constexpr((total // 16 + self.num_threads - 1) // self.num_threads):
            offset: cutlass.Constexpr = i * self.num_threads * 16
            if const_expr(offset + self.num_threads * 16 <= total):
                ptx.cp_async_16_if_more(stage + offset, addresses[WEIGHTS] + offset, left, offset)
            else:
                if tid * 16 < total - offset:
                    ptx.cp_async_16_if_more(stage + offset, addresses[WEIGHTS] + offset, left, offset)
        addresses[WEIGHTS] = addresses[WEIGHTS] + Int64(units) * self.facts.unit_bytes

    @cute.jit
    def issue_tokens(self, words, addresses, tid, k):
        """tile_n rows, swizzled so that ldmatrix meets no bank conflict; rows of other experts and k past the end are
        zeros.
        """
        r = tid // self.chunks
        target = (
            words[STAGE] + self.stage.x_offset + r * self.row_bytes + (swizzle(r, tid % self.chunks, self.chunks) << 4)
        )
        left = words[X_ROWS_LEFT]
        stride = (k + (self.facts.k_tile - 1)) // self.facts.k_tile * self.row_bytes
        if const_expr(self.facts.activation is ActivationKind.BF16):
            stride = (k * 2 + 15) // 16 * 16
            if words[X_BYTES_LEFT] <= 0:
                left = Int32(0)
            words[X_BYTES_LEFT] = words[X_BYTES_LEFT] - self.row_bytes
        step = Int64(stride) * self.rows_per_pass
        source = addresses[TOKENS]
        for i in cutlass.range_constexpr((self.tile_n + self.rows_per_pass - 1) // self.rows_per_pass):
            rows: cutlass.Constexpr = i * self.rows_per_pass
            if const_expr(rows + self.rows_per_pass <= self.tile_n):
                ptx.cp_async_16_if_more(target + rows * self.row_bytes, source, left, rows)
            else:
                if r < self.tile_n - rows:
                    ptx.cp_async_16_if_more(target + rows * self.row_bytes, source, left, rows)
            source += step
        addresses[TOKENS] = addresses[TOKENS] + self.row_bytes
        if const_expr(self.facts.activation_groups):
            self.issue_token_scales(words, addresses, tid, k)

    @cute.jit
    def issue_token_scales(self, words, addresses, tid, k):
        """float32 scales [T, k-tiles] of the tile's rows in this k-tile's group."""
        k_tiles = (k + (self.facts.k_tile - 1)) // self.facts.k_tile
        left = words[X_ROWS_LEFT] + tid // self.chunks - tid
        source = addresses[TOKEN_SCALES]
        for i in cutlass.range_constexpr((self.tile_n + self.num_threads - 1) // self.num_threads):
            rows: cutlass.Constexpr = i * self.num_threads
            if tid < self.tile_n - rows:
                ptx.cp_async_4_if_more(words[STAGE] + self.stage.sx_offset + (tid + rows) * 4, source, left, rows)
            source += Int64(k_tiles) * (self.num_threads * 4)
        addresses[TOKEN_SCALES] = addresses[TOKEN_SCALES] + 4

    @cute.jit
    def issue_strips(self, words, addresses, tid, units):
        """Scales, and zero points where there are any, of tile_m rows in this k-tile's group."""
        if tid * 16 < self.tile_m * 2:
            at = words[STAGE] + self.stage.scale_offset + tid * 16
            ptx.cp_async_16_if_more(at, addresses[SCALES], words[S_LEFT], 0)
            if const_expr(self.facts.has_zero_points):
                at = words[STAGE] + self.stage.zero_offset + tid * 16
                ptx.cp_async_16_if_more(at, addresses[ZEROS], words[S_LEFT], 0)
        words[PHASE] = words[PHASE] + 1
        if words[PHASE] == self.facts.k_tiles_per_group:
            words[PHASE] = Int32(0)
            addresses[SCALES] = addresses[SCALES] + Int64(units) * STRIP_BYTES
            if const_expr(self.facts.has_zero_points):
                addresses[ZEROS] = addresses[ZEROS] + Int64(units) * STRIP_BYTES


def swizzle(row, chunk, chunks):
    """Which 16-byte chunk of its row the data goes to. 128-byte rows: 8 rows cover all banks; 64-byte rows: pairs of
    rows do.
    """
    return chunk ^ (row & 7) if chunks == 8 else chunk ^ ((row >> 1) & 3)
