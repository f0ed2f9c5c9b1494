"""Tile list from the offsets, on the GPU, inside the launch.

Every CTA builds the same table in shared memory when it starts: for each position of the plan the number of its first
tile, its token rows, its slot and its index in the slot's weights. A CTA then walks tiles blockIdx, blockIdx + gridDim,
... and finds each in the table by two ballots. Nothing leaves the GPU, nothing is allocated, and a launch can be
captured in a graph. The plan lists experts of slow schemes first, so long tiles go first.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from kernel_gen.kernels import ptx
from profiles.kernels import Raster

# Words of a table entry.
FIRST_TILE, ROW_BEGIN, ROW_END, SLOT_INDEX = range(4)
ENTRY_BYTES = 16


class TileScheduler:
    """tile_m x tile_n tiles of a grouped GEMM over at most max_experts experts. `base` below is the table's shared-
    memory address.
    """

    def __init__(self, tile_m: int, tile_n: int, max_experts: int, raster: Raster) -> None:
        self.tile_m, self.tile_n, self.max_experts, self.raster = tile_m, tile_n, max_experts, raster
        self.per_lane = max_experts // 32
        self.table_bytes = ENTRY_BYTES * max_experts + 16

    @cute.jit
    def build(self, base, tid, num_threads: cutlass.Constexpr, offsets, plan, num_tokens, feature_tiles):
        """Fill the table; returns the number of tiles. Offsets are clamped into 0..num_tokens, so that none can reach
        outside the tensors.
        """
        num_experts = cute.size(plan, mode=[0])
        for i in cutlass.range_constexpr((self.max_experts + num_threads - 1) // num_threads):
            position = tid + i * num_threads
            if position < self.max_experts:
                begin = Int32(0)
                end = Int32(0)
                slot_index = Int32(0)
                if position < num_experts:
                    expert = plan[position, 0]
                    slot_index = (plan[position, 1] << 24) | plan[position, 2]
                    begin = cutlass.max(cutlass.min(offsets[expert], num_tokens), 0)
                    end = cutlass.max(cutlass.min(offsets[expert + 1], num_tokens), begin)
                tiles = (end - begin + (self.tile_n - 1)) // self.tile_n * feature_tiles
                ptx.sts128(base + position * ENTRY_BYTES, tiles, begin, end, slot_index)
        cute.arch.sync_threads()
        if tid < 32:
            self.scan(base, tid)
        cute.arch.sync_threads()
        return self.num_tiles(base)

    def num_tiles(self, base):
        """Of a table that is built."""
        return ptx.lds32(base + self.max_experts * ENTRY_BYTES)

    @cute.jit
    def scan(self, base, lane):
        """One warp turns tile counts into the number of the first tile; each lane owns per_lane consecutive entries."""
        counts = cute.make_rmem_tensor((self.per_lane,), Int32)
        mine = Int32(0)
        for i in cutlass.range_constexpr(self.per_lane):
            counts[i] = ptx.lds32(base + (lane * self.per_lane + i) * ENTRY_BYTES)
            mine += counts[i]
        total = mine
        for step in cutlass.range_constexpr(5):
            other = ptx.shuffle_up(total, 1 << step)
            if lane >= (1 << step):
                total += other
        running = total - mine
        for i in cutlass.range_constexpr(self.per_lane):
            ptx.sts32(base + (lane * self.per_lane + i) * ENTRY_BYTES, running)
            running += counts[i]
        if lane == 31:
            ptx.sts32(base + self.max_experts * ENTRY_BYTES, total)

    @cute.jit
    def find(self, base, lane, tile, feature_tiles):
        """(first token row, end of the expert's rows, feature tile, slot, index in the slot) of a tile. Called by whole
        warps.
        """
        segment = ptx.count_le(ptx.lds32(base + lane * (self.per_lane * ENTRY_BYTES)), tile) - 1
        position = segment
        if const_expr(self.per_lane > 1):
            inner = segment * self.per_lane + lane % self.per_lane
            found = ptx.count_le(ptx.lds32(base + inner * ENTRY_BYTES), tile)
            position = segment * self.per_lane + found // (32 // self.per_lane) - 1
        first, begin, end, slot_index = ptx.lds128(base + position * ENTRY_BYTES)
        within = tile - first
        if const_expr(self.raster is Raster.ALONG_TOKENS):
            token_tiles = (end - begin + (self.tile_n - 1)) // self.tile_n
            feature_tile = within // token_tiles
            token_tile = within - feature_tile * token_tiles
        else:
            token_tile = within // feature_tiles
            feature_tile = within - token_tile * feature_tiles
        return begin + token_tile * self.tile_n, end, feature_tile, slot_index >> 24, slot_index & 0xFFFFFF
