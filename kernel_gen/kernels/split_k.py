"""Split-K: the CTAs of a cluster take a part of one tile's k-tiles each, and the last of them adds up their sums.

The others send theirs, float32 or int32, to its shared memory as they finish (st.async: an mbarrier there counts the
bytes), and go on to their next tile. It adds them in the order of the parts, so that repeats give the same bits, and
stores the tile. Nothing is allocated, and no other memory is touched.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from kernel_gen.kernels import ptx


@cute.jit
def k_part(facts: cutlass.Constexpr, k, part, parts: cutlass.Constexpr):
    """(first k-tile, number of k-tiles) of one of `parts` parts: whole groups of scales, none if there are too few."""
    k_tiles = (k + (facts.k_tile - 1)) // facts.k_tile
    first = Int32(0)
    count = k_tiles
    if const_expr(parts > 1):
        whole: cutlass.Constexpr = max(facts.k_tiles_per_group, 1)
        most = (k_tiles + (whole * parts - 1)) // (whole * parts) * whole
        first = cutlass.min(part * most, k_tiles)
        count = cutlass.min(k_tiles - first, most)
    return first, count


class ClusterSum:
    """Adds the sums of a tile's parts; called by all consumer threads of the cluster, tile after tile.

    Two mbarriers: `full` in the last CTA, complete when all sums of a tile have come; `empty` in each of the others,
    complete when it may send the next tile's.
    """

    def __init__(self, config, tile_n: int) -> None:
        self.parts, self.tile_m, self.tile_n = config.split_k, config.tile.m, tile_n
        self.threads = config.warps.m * 32
        self.m_units = self.tile_m // 64 // (config.warps.m // 4)
        self.part_bytes = self.tile_m * config.tile.n * 4
        self.block_bytes = self.tile_m * 8 * 4  # of eight tokens, the least that is sent

    @cute.jit
    def init(self, full):
        """One thread of each CTA."""
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init(full + 1, self.threads // 32)

    @cute.jit
    def run(self, acc, at_sums, full, part, turn, num_tokens, tid):
        """acc of the last part becomes the tile's. at_sums: shared-memory address of `parts` - 1 tiles; full: `full`,
        followed by `empty`; turn: parity of the number of tiles before; num_tokens: what the tile has, or more.
        """
        mine = at_sums + (tid - 128) * 16
        if part == self.parts - 1:
            if tid == 128:
                blocks = cutlass.min((num_tokens + 7) // 8, self.tile_n // 8)
                cute.arch.mbarrier_arrive_and_expect_tx(full, blocks * (self.block_bytes * (self.parts - 1)))
            cute.arch.mbarrier_wait(full, turn)
            for n in cutlass.range_constexpr(self.tile_n // 8):
                if num_tokens > n * 8:
                    for other in cutlass.range_constexpr(self.parts - 1):
                        for m in cutlass.range_constexpr(self.m_units):
                            self.add(acc, n, m, mine + other * self.part_bytes + self.offset(n, m))
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                for other in cutlass.range_constexpr(self.parts - 1):
                    cute.arch.mbarrier_arrive(full + 1, other)
        else:
            cute.arch.mbarrier_wait(full + 1, turn ^ 1)
            to = ptx.remote(mine + part * self.part_bytes, self.parts - 1)
            barrier = ptx.remote(Int32(full.toint()), self.parts - 1)
            for n in cutlass.range_constexpr(self.tile_n // 8):
                if num_tokens > n * 8:
                    for m in cutlass.range_constexpr(self.m_units):
                        values = [acc[(i, half, n), m, 0] for half in range(2) for i in range(2)]
                        ptx.st_async_128(to + self.offset(n, m), values, barrier)

    @cute.jit
    def finish(self, full, part, turn):
        """After the last tile: no CTA ends before the last one has used its sums and said so."""
        if part < self.parts - 1:
            cute.arch.mbarrier_wait(full + 1, turn ^ 1)

    def offset(self, n, m):
        """Of a thread's four sums of one unit and eight tokens, from those of its first."""
        return (n * self.m_units + m) * self.threads * 16

    def add(self, acc, n, m, address):
        """Another part's four sums to this thread's."""
        for position, bits in enumerate(ptx.lds128(address)):
            at = ((position % 2, position // 2, n), m, 0)
            acc[at] = acc[at] + (bits if acc[at].dtype is Int32 else ptx.bits_to_f32(bits))
