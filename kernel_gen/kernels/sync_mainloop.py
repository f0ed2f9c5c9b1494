"""The k loop of bf16 math for few tokens in the wgmma family: mma.sync instead of wgmma.

A wgmma of 64 rows takes as long for 8 tokens as for 32, an mma.sync of 8 tokens takes what it multiplies, and warps
need not wait for each other. The A fragments of both are the same, so packed weights are too. Words and tokens of the
next k-tile are read into a second set of registers before this one is multiplied.

Weights are multiplied as codes, with what lies above them in the mantissa (`Bf16Codes`). A row of ones is multiplied
beside them: its sums, times what lies above the codes and the zero point, are taken off every two k-tiles, in float32.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from kernel_gen.kernels import ptx
from kernel_gen.kernels.dequant import Bf16Codes
from kernel_gen.kernels.split_k import k_part
from kernel_gen.kernels.wgmma_mainloop import K_STEPS, WgmmaMainloop
from kernel_gen.smem_wgmma import TOKEN_ROW_BYTES
from profiles.gpus import Math

TOKENS = 8
"""Of one mma.sync."""


class SyncMainloop(WgmmaMainloop):
    """tile_m x tile_n over `groups` consumer warpgroups, whose four warps have 16 rows each of every unit."""

    def __init__(self, facts, tile_m: int, tile_n: int, groups: int, cluster: int = 1, split_k: int = 1) -> None:
        super().__init__(facts, tile_m, tile_n, groups, cluster, split_k)
        self.token_blocks = tile_n // TOKENS
        self.weights = Bf16Codes(facts.weight_bits, facts.has_zero_points, facts.unit_bytes)
        self.has_offsets = self.weights.has_offsets
        self.sums_apart = facts.has_group_scales or self.has_offsets
        self.ends_each_tile = facts.k_tiles_per_group == 1

    @cute.jit
    def run(self, base, start, arrays, num_stages: cutlass.Constexpr, stage, phase, at, mma, layout, tid):
        """(float32 sums; next stage; next phase) of one tile, or of this CTA's part of it."""
        _, _, feature_tile, index, slot_at, (k, part), units = at
        total = self.sums(mma, Float32)
        total.fill(0.0)
        ring = (start, arrays, num_stages)
        blocks = (tid // 128 - 1, (tid // 32) % 4, tid % 32)
        zeros = self.tile_zeros(feature_tile, index, slot_at, units, blocks)
        _, k_tiles = k_part(self.facts, k, part, self.split_k)
        if const_expr(self.split_k == 1):
            stage, phase = self.multiply_all(ring, total, zeros, k_tiles, stage, phase, blocks)
        elif k_tiles > 0:  # a part may have none
            stage, phase = self.multiply_all(ring, total, zeros, k_tiles, stage, phase, blocks)
        return total, stage, phase

    @cute.jit
    def multiply_all(self, ring, total, zeros, k_tiles, stage, phase, blocks):
        """total += weights x tokens; the next k-tile is read before this one is multiplied.

        A stage is released behind the wait for the stage that its registers hold next. An arrival does not wait for
        loads that were issued before it, nor for what uses them: released right behind its loads, a stage was now and
        then written over before they were served. No instruction passes a wait, and what is behind it overwrites the
        registers, so that the loads are done there. Two stages are held while a third is waited for. Where no wait
        follows, a fence waits for the loads. Stages are released in the order of k-tiles (see `Producer`).
        """
        part = total
        if const_expr(self.sums_apart):
            part = self.sums(None, Float32)
        ones = cute.make_rmem_tensor((4, self.token_blocks), Float32)
        consts = self.weights.constants()
        even, odd = self.register_set(), self.register_set()
        even_stage, odd_stage = stage, stage
        self.wait(ring, stage, phase)
        self.read(ring, even, stage, blocks)
        stage, phase = self.advance(ring, stage, phase)
        for pair in cutlass.range((k_tiles + 1) // 2, unroll=1):
            whole = pair * 2 + 1 < k_tiles
            if whole:
                self.wait(ring, stage, phase)
                if pair > 0:
                    self.release(ring, odd_stage)
                odd_stage = stage
                self.read(ring, odd, stage, blocks)
                stage, phase = self.advance(ring, stage, phase)
            self.multiply_tile(part, ones, consts, even, True)
            factors = self.factors(even, zeros)
            if const_expr(self.ends_each_tile):
                self.add_part(total, part, ones, factors)
            if whole:
                if pair * 2 + 2 < k_tiles:
                    self.wait(ring, stage, phase)
                    self.release(ring, even_stage)
                    even_stage = stage
                    self.read(ring, even, stage, blocks)
                    stage, phase = self.advance(ring, stage, phase)
                self.multiply_tile(part, ones, consts, odd, self.ends_each_tile)
                if const_expr(self.ends_each_tile):
                    self.add_part(total, part, ones, self.factors(odd, zeros))
            if const_expr(self.sums_apart and not self.ends_each_tile):
                self.add_part(total, part, ones, factors)
        last, before = odd_stage, even_stage
        if k_tiles % 2 == 1:
            last, before = even_stage, odd_stage
        ptx.fence_reads()
        if k_tiles > 1:
            self.release(ring, before)
        self.release(ring, last)
        return stage, phase

    def sums(self, mma, kind):
        """Registers for the tile's sums, numbered as a wgmma's."""
        return cute.make_rmem_tensor(((2, 2, self.token_blocks), self.m_units, 1), kind)

    def register_set(self):
        """What is read of a k-tile: packed words; B fragments; scales and zero points of rows g and g + 8."""
        return (
            cute.make_rmem_tensor((self.weights.tile_words, self.m_units), Int32),
            cute.make_rmem_tensor((2 * K_STEPS, self.token_blocks), Int32),
            cute.make_rmem_tensor((2, self.m_units), Int32),
        )

    @cute.jit
    def read(self, ring, registers, stage, blocks):
        """A stage that is full, to registers."""
        start, arrays, _ = ring
        words, tokens, strips = registers
        group, warp, lane = blocks
        at_w, at_s = self.addresses(ring, stage)
        for m in cutlass.range_constexpr(self.m_units):
            block = (m * self.groups + group) * 4 + warp
            self.weights.load_tile(words, m, at_w, block, lane)
            if const_expr(self.facts.has_group_scales):
                address = at_s + block * 32 + (lane // 4) * 4
                strips[0, m] = ptx.lds32(address)
                if const_expr(self.facts.has_zero_points):
                    strips[1, m] = ptx.lds32(address + self.tile_m * 2)
        row = lane % 8
        at_x = start + arrays.tokens + stage * arrays.tokens_stage + row * TOKEN_ROW_BYTES
        chunk = ((lane // 8) ^ row) * 16  # TMA's 128-byte swizzle
        for n in cutlass.range_constexpr(self.token_blocks):
            for half in cutlass.range_constexpr(2):
                got = ptx.ldmatrix_x4(at_x + n * (TOKENS * TOKEN_ROW_BYTES) + (chunk ^ (half * 64)))
                for i in cutlass.range_constexpr(4):
                    tokens[4 * half + i, n] = got[i]

    @cute.jit
    def multiply_tile(self, part, ones, consts, registers, starts: cutlass.Constexpr):
        """part (+)= weights x tokens of one k-tile, ones (+)= 1 x tokens; `starts`: sums apart begin here."""
        words, tokens, _ = registers
        for ks in cutlass.range_constexpr(K_STEPS):
            begin: cutlass.Constexpr = starts and ks == 0
            b = [[tokens[2 * ks + i, n] for i in range(2)] for n in range(self.token_blocks)]
            if const_expr(self.has_offsets):
                for n in cutlass.range_constexpr(self.token_blocks):
                    self.multiply_block(ones, [(i, n) for i in range(4)], [consts[1]] * 4, b[n], begin)
            for m in cutlass.range_constexpr(self.m_units):
                a = self.weights.fragment(words, m, ks, consts)
                for n in cutlass.range_constexpr(self.token_blocks):
                    at = [((i % 2, i // 2, n), m, 0) for i in range(4)]
                    self.multiply_block(part, at, a, b[n], begin and self.sums_apart)

    def multiply_block(self, sums, at, a, b, begins):
        """sums += 16 x 16 weights times 8 tokens, or = where they begin."""
        before = [Float32(0.0)] * 4 if begins else [sums[at[i]] for i in range(4)]
        after = ptx.mma_sync(Math.BF16.value, a, b, before)
        for i in range(4):
            sums[at[i]] = after[i]

    def factors(self, registers, zeros):
        """(scale, what to take off a row of ones' sums) of rows g and g + 8 of each unit, float32; None: 1, or
        nothing.
        """
        strips = registers[2]
        out = []
        for m in range(self.m_units):
            scales = halves(strips[0, m]) if self.facts.has_group_scales else (None, None)
            zero = zeros[m]
            if self.facts.has_group_scales and self.facts.has_zero_points:
                zero = halves(strips[1, m])
            out.append([self.weights.factors(scales[half], zero[half], half) for half in range(2)])
        return out

    def add_part(self, total, part, ones, factors):
        """total += scale x (part - offset x ones)."""
        for m in range(self.m_units):
            for n in range(self.token_blocks):
                for i in range(4):
                    at = ((i % 2, i // 2, n), m, 0)
                    scale, offset = factors[m][i // 2]
                    value = part[at]
                    if offset is not None:
                        value = value - offset * ones[i % 2, n]
                    total[at] = total[at] + (value if scale is None else value * scale)

    def tile_zeros(self, feature_tile, index, slot_at, units, blocks):
        """Zero points per channel, float32, of rows g and g + 8 of each unit; None where there are none."""
        if not self.facts.has_zero_points or self.facts.has_group_scales:
            return [(None, None)] * self.m_units
        return [halves(self.channel_zeros(m, feature_tile, index, slot_at, units, blocks)) for m in range(self.m_units)]


def halves(pair):
    """A bf16 pair as two float32."""
    return ptx.bf16_low_to_f32(pair), ptx.bf16_high_to_f32(pair)
