"""The producer of the wgmma family: fills stages for one scheme's tile."""

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from kernel_gen.kernels import ptx
from kernel_gen.kernels.split_k import k_part
from kernel_gen.kernels.wgmma_mainloop import CODE_TYPE
from kernel_gen.layouts import STRIP_BYTES


class Producer:
    """One warp runs this. A stage is full when all bytes it was promised have come (expect_tx).

    Tokens come in boxes of `box` rows, as many as the tile's width takes. In a cluster each CTA loads its share of the
    boxes into the shared memory of all; with split-K each loads its part of the k-tiles.
    """

    def __init__(self, facts, config, box: int) -> None:
        self.facts, self.tile_m, self.tile_n, self.box = facts, config.tile.m, config.tile.n, box
        self.cluster, self.split_k = config.cluster, config.split_k

    @cute.jit
    def run(self, base, start, arrays, barriers, num_stages: cutlass.Constexpr, stage, phase, at, atom, tensor, layout):
        """All k-tiles of one tile, or this CTA's part of them; returns the ring's next stage and phase."""
        row, width, feature_tile, index, slot_at, k, units, rank = at
        facts = self.facts
        k_tiles = (k + (facts.k_tile - 1)) // facts.k_tile
        unit0 = feature_tile * (self.tile_m // 64)
        present = cutlass.max(cutlass.min(units - unit0, self.tile_m // 64), 0)
        source = ptx.ldg64(slot_at) + (Int64(index) * k_tiles * units + unit0) * facts.unit_bytes
        scales = Int64(0)
        zeros = Int64(0)
        if const_expr(facts.has_group_scales):
            groups = (k + (facts.group_size - 1)) // facts.group_size
            strip = (Int64(index) * groups * units + unit0) * STRIP_BYTES
            scales = ptx.ldg64(slot_at + 8) + strip
            if const_expr(facts.has_zero_points):
                zeros = ptx.ldg64(slot_at + 16) + strip
        tokens = cute.make_tensor(
            cute.recast_ptr(base + arrays.tokens, layout.inner, dtype=CODE_TYPE[facts.math]), layout.outer
        )
        shape = (self.box, facts.k_tile)
        boxes = cute.local_tile(cute.domain_offset((row, 0), tensor), shape, (None, None))
        places = cute.local_tile(tokens, shape, (None, 0, None))
        to, come_from = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(places, 0, 2), cute.group_modes(boxes, 0, 2)
        )
        strips: cutlass.Constexpr = int(facts.has_group_scales) * (1 + int(facts.has_zero_points))
        total = present * (facts.unit_bytes + strips * STRIP_BYTES) + width * facts.x_row_bytes
        first, count = k_part(facts, k, rank, self.split_k)
        for kt in cutlass.range(first, first + count, unroll=1):
            cute.arch.mbarrier_wait(barriers + num_stages + stage, phase)
            full = start + arrays.barriers + stage * 8
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + stage, total)
                if present > 0:  # a cluster's last CTA may have no rows
                    at_w = start + arrays.weights + stage * arrays.weights_stage
                    ptx.bulk_load(at_w, source + Int64(kt) * units * facts.unit_bytes, present * facts.unit_bytes, full)
                    if const_expr(facts.has_group_scales):
                        group = Int64(kt // facts.k_tiles_per_group) * units * STRIP_BYTES
                        at_s = start + arrays.strips + stage * arrays.strips_stage
                        ptx.bulk_load(at_s, scales + group, present * STRIP_BYTES, full)
                        if const_expr(facts.has_zero_points):
                            ptx.bulk_load(at_s + self.tile_m * 2, zeros + group, present * STRIP_BYTES, full)
            if const_expr(self.cluster > 1):
                everyone: cutlass.Constexpr = (1 << self.cluster) - 1
                for i in cutlass.range(rank, width // self.box, self.cluster, unroll=1):
                    cute.copy(
                        atom,
                        come_from[None, i, kt],
                        to[None, i, stage],
                        tma_bar_ptr=barriers + stage,
                        mcast_mask=Int16(everyone),
                    )
            elif const_expr(self.box < self.tile_n):
                for i in cutlass.range(width // self.box, unroll=1):
                    cute.copy(atom, come_from[None, i, kt], to[None, i, stage], tma_bar_ptr=barriers + stage)
            else:
                cute.copy(atom, come_from[None, 0, kt], to[None, 0, stage], tma_bar_ptr=barriers + stage)
            stage += 1
            if stage == num_stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase
