"""The producers of the wgmma family: warps that fill stages for one scheme's tile, a k-tile each in turn."""

import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from kernel_gen import smem_wgmma
from kernel_gen.kernels import ptx
from kernel_gen.kernels.split_k import k_part
from kernel_gen.kernels.wgmma_mainloop import CODE_TYPE
from kernel_gen.layouts import STRIP_BYTES


class Producer:
    """What each producer warp runs. A stage is full when all bytes it was promised have come (expect_tx).

    Tokens come in boxes, as many as the tile's width takes. In a cluster each CTA loads its share of the boxes into the
    shared memory of all; with split-K each loads its part of the k-tiles.

    Consumers release stages in the order of k-tiles. A barrier tells a producer the parity of its phase only, and with
    5 stages and 4 warps k-tile t and t + 5, of one stage, are different warps'. The warp of t + 5 filled t + 1 before,
    for which t - 4 was released: if that did not mean that t - 5 was too, it would take the barrier to be a phase ahead
    and fill the stage beside the warp of t, whose arrival then is one too many: an illegal instruction.
    """

    def __init__(self, facts, config, prefetches: bool) -> None:
        self.prefetches = prefetches
        self.facts, self.tile_m, self.tile_n = facts, config.tile.m, config.tile.n
        self.box, self.cluster, self.split_k = smem_wgmma.token_box(config), config.cluster, config.split_k
        self.warps, self.num_stages = smem_wgmma.producer_warps(config), config.num_stages
        self.strips = facts.has_group_scales * (1 + facts.has_zero_points)
        self.groups_ahead = self.warps // max(1, facts.k_tiles_per_group)

    @cute.jit
    def run(self, base, start, arrays, barriers, turn, at, ahead, atom, tensor, layout):
        """This warp's k-tiles of one tile, or of this CTA's part of it. `turn`: k-tiles until its first, and the stage
        and phase of that; returns its next turn. `ahead`: k-tiles whose weights were prefetched.
        """
        row, width, _, _, _, k, _, rank = at
        skipped, stage, phase = turn
        facts = self.facts
        part_begin, count = k_part(facts, k, rank, self.split_k)
        present, total, weights, scales, zeros, next_weights, next_strips = self.copies(at, skipped)
        tokens = cute.make_tensor(
            cute.recast_ptr(base + arrays.tokens, layout.inner, dtype=CODE_TYPE[facts.math]), layout.outer
        )
        shape = (self.box, facts.k_tile)
        boxes = cute.local_tile(cute.domain_offset((row, 0), tensor), shape, (None, None))
        places = cute.local_tile(tokens, shape, (None, 0, None))
        to, come_from = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(places, 0, 2), cute.group_modes(boxes, 0, 2)
        )
        for kt in cutlass.range(part_begin + skipped, part_begin + count, self.warps, unroll=1):
            full = start + arrays.barriers + stage * 8
            if const_expr(self.prefetches):
                if kt >= part_begin + ahead:
                    ptx.mbarrier_wait(full + self.num_stages * 8, phase, patient=True)
                    self.load_weights(start, arrays, stage, full, total, weights, scales, zeros, present)
            else:
                ptx.mbarrier_wait(full + self.num_stages * 8, phase, patient=True)
                self.load_weights(start, arrays, stage, full, total, weights, scales, zeros, present)
            weights += next_weights
            scales += next_strips
            zeros += next_strips
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
            stage += self.warps
            if stage >= self.num_stages:
                stage -= self.num_stages
                phase ^= 1
        return (skipped - count) & (self.warps - 1), stage, phase

    @cute.jit
    def prefetch(self, start, arrays, warp, at):
        """Ask for the weights of this warp's first k-tiles of the CTA's first tile, as far as there are stages. Returns
        how many k-tiles all warps asked for together.
        """
        _, _, _, _, _, k, _, rank = at
        _, count = k_part(self.facts, k, rank, self.split_k)
        present, total, weights, scales, zeros, next_weights, next_strips = self.copies(at, warp)
        ahead = cutlass.min(count, self.num_stages)
        for stage in cutlass.range(warp, ahead, self.warps, unroll=1):
            full = start + arrays.barriers + stage * 8
            self.load_weights(start, arrays, stage, full, total, weights, scales, zeros, present)
            weights += next_weights
            scales += next_strips
            zeros += next_strips
        return ahead

    def copies(self, at, skipped):
        """A tile's (units of 64 rows; bytes a k-tile, tokens among them; addresses of this warp's first weights, scales
        and zero points; bytes from weights to its next ones; from strips to its next ones).
        """
        _, width, feature_tile, index, slot_at, k, units, rank = at
        facts = self.facts
        k_tiles = (k + (facts.k_tile - 1)) // facts.k_tile
        unit0 = feature_tile * (self.tile_m // 64)
        present = cutlass.max(cutlass.min(units - unit0, self.tile_m // 64), 0)
        part_begin, _ = k_part(facts, k, rank, self.split_k)
        weights, scales, zeros = self.sources(index, slot_at, k, k_tiles, units, unit0, part_begin + skipped)
        next_weights = Int64(units) * (self.warps * facts.unit_bytes)
        next_strips = Int64(units) * (self.groups_ahead * STRIP_BYTES)
        total = present * (facts.unit_bytes + self.strips * STRIP_BYTES) + width * facts.x_row_bytes
        return present, total, weights, scales, zeros, next_weights, next_strips

    def sources(self, index, slot_at, k, k_tiles, units, unit0, first):
        """Global addresses of the tile's packed weights, scales and zero points (0 where there are none) in k-tile
        `first`.
        """
        facts = self.facts
        weights = ptx.ldg64(slot_at) + ((Int64(index) * k_tiles + first) * units + unit0) * facts.unit_bytes
        strips = [Int64(0), Int64(0)]
        for i in range(self.strips):
            groups = (k + (facts.group_size - 1)) // facts.group_size
            group = Int64(index) * groups + first // facts.k_tiles_per_group
            strips[i] = ptx.ldg64(slot_at + 8 * (1 + i)) + (group * units + unit0) * STRIP_BYTES
        return weights, *strips

    @cute.jit
    def load_weights(self, start, arrays, stage, full, total, weights, scales, zeros, present):
        """Promise the stage its `total` bytes, and start the copies of packed weights, scales and zero points: one
        thread does.
        """
        with cute.arch.elect_one():
            ptx.mbarrier_expect(full, total)
            if present > 0:  # a cluster's last CTA may have no rows
                at_w = start + arrays.weights + stage * arrays.weights_stage
                ptx.bulk_load(at_w, weights, present * self.facts.unit_bytes, full)
                if const_expr(self.strips):
                    at_s = start + arrays.strips + stage * arrays.strips_stage
                    ptx.bulk_load(at_s, scales, present * STRIP_BYTES, full)
                    if const_expr(self.strips == 2):
                        ptx.bulk_load(at_s + self.tile_m * 2, zeros, present * STRIP_BYTES, full)
