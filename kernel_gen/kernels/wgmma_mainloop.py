"""The k loop of one scheme in the wgmma family.

Fragments are decoded while wgmmas before theirs run: decoding right before the wgmma that reads it makes the compiler
serialise both. What the tensor cores sum is `SumOf`: weights that were scaled as they were decoded, or one group at a
time, scaled in float32 afterwards.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float8E4M3FN, Float32, Int8, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from kernel_gen.kernels import ptx
from kernel_gen.kernels.dequant import Bf16Weights, NarrowWeights
from kernel_gen.kernels.split_k import k_part
from kernel_gen.layouts import STRIP_BYTES
from kernel_gen.smem_wgmma import SumOf, sum_of
from profiles.gpus import Math

CODE_TYPE = {Math.BF16: BFloat16, Math.INT8: Int8, Math.E4M3: Float8E4M3FN}
K_STEPS = 4  # a k-tile is 128 bytes of a token's row, a wgmma takes 32


class WgmmaMainloop:
    """tile_m x tile_n over `groups` consumer warpgroups; each has m_units units of 64 rows."""

    def __init__(self, facts, tile_m: int, tile_n: int, groups: int, cluster: int = 1, split_k: int = 1) -> None:
        self.facts, self.tile_m, self.tile_n, self.groups = facts, tile_m, tile_n, groups
        self.cluster, self.split_k = cluster, split_k
        self.m_units = tile_m // 64 // groups
        self.math = facts.math
        self.narrow = self.math is not Math.BF16
        self.sum_of = sum_of(facts, tile_n)
        self.scales_weights = facts.has_group_scales and self.sum_of is SumOf.WEIGHTS
        has_codes = not self.narrow and facts.weight_bits != 16
        has_group_zeros = facts.has_group_scales and facts.has_zero_points
        self.has_tile_biases = has_codes and not has_group_zeros
        self.fetches_groups = has_codes and (self.scales_weights or has_group_zeros)
        if self.narrow:
            self.weights = NarrowWeights(self.math, facts.weight_bits, K_STEPS, facts.unit_bytes)
            self.extra_scale = self.weights.extra_scale
        else:
            self.weights = Bf16Weights(facts.weight_bits, facts.has_zero_points, self.scales_weights, facts.unit_bytes)
            self.extra_scale = 1.0

    def acc_type(self):
        return Int32 if self.math is Math.INT8 else Float32

    def tiled_mma(self):
        kind = CODE_TYPE[self.math]
        major = cute.nvgpu.OperandMajorMode.K
        return hopper.make_trivial_tiled_mma(
            kind,
            kind,
            major,
            major,
            self.acc_type(),
            (self.groups, 1, 1),
            tiler_mn=(64, self.tile_n),
            a_source=warpgroup.OperandSource.RMEM,
        )

    def token_layout(self, rows: int, num_stages: int):
        """Tokens in shared memory: rows of one k-tile, 128 bytes, swizzled as TMA and wgmma agree on."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, CODE_TYPE[self.math])
        return cute.tile_to_shape(atom, (rows, self.facts.k_tile, num_stages), order=(0, 1, 2))

    @cute.jit
    def run(self, base, start, arrays, num_stages: cutlass.Constexpr, stage, phase, at, mma, layout, tid):
        """(float32 sums, or int32 ones of int8 math without groups; next stage; next phase) of one tile, or of this
        CTA's part of it.
        """
        _, _, feature_tile, index, slot_at, (k, part), units = at
        facts = self.facts
        thread_mma = mma.get_slice(tid - 128)
        acc = self.sums(mma, self.acc_type())
        acc.fill(0)
        a = thread_mma.make_fragment_A(mma.partition_shape_A((self.tile_m, facts.k_tile)))
        tokens = cute.make_tensor(
            cute.recast_ptr(base + arrays.tokens, layout.inner, dtype=CODE_TYPE[self.math]), layout.outer
        )
        tokens = cute.local_tile(tokens, (self.tile_n, facts.k_tile), (0, 0, None))  # a tail's come first
        b = thread_mma.make_fragment_B(thread_mma.partition_B(tokens))
        state = (cute.recast_tensor(a, Int32), *self.registers())
        blocks = (tid // 128 - 1, (tid // 32) % 4, tid % 32)
        if const_expr(self.has_tile_biases):
            self.fetch_channel(state, feature_tile, index, slot_at, units, blocks)
        ring = (start, arrays, num_stages)
        _, k_tiles = k_part(facts, k, part, self.split_k)
        work = (mma, a, b, acc, state, blocks, k_tiles)
        total = acc
        if const_expr(self.sum_of is SumOf.GROUPS):
            total = self.sums(mma, Float32)
            total.fill(0.0)
        if const_expr(self.split_k == 1):
            stage, phase = self.loop(ring, work, total, stage, phase)
        elif k_tiles > 0:  # a part may have none
            stage, phase = self.loop(ring, work, total, stage, phase)
        return self.numbered(total), stage, phase

    @cute.jit
    def loop(self, ring, work, total, stage, phase):
        """The k loop that fits what the tensor cores sum; total holds the sums afterwards."""
        if const_expr(self.sum_of is SumOf.WEIGHTS):
            stage, phase = self.multiply(ring, work, stage, phase)
        elif const_expr(self.narrow):
            stage, phase = self.multiply_groups(ring, work, total, stage, phase)
        else:
            stage, phase = self.multiply_pairs(ring, work, total, stage, phase)
        return stage, phase

    def sums(self, mma, kind):
        """Registers for the tile's sums."""
        return cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), kind)

    def numbered(self, sums):
        """The same registers, numbered ((token, row half, 8-token block), unit, 0), one block or more."""
        return cute.make_tensor(sums.iterator, cute.make_layout(((2, 2, self.tile_n // 8), self.m_units, 1)))

    def atoms(self, mma):
        """(wgmma that starts sums, wgmma that adds to them)."""
        begin = cute.make_mma_atom(mma.op)
        begin.set(warpgroup.Field.ACCUMULATE, False)
        add = cute.make_mma_atom(mma.op)
        add.set(warpgroup.Field.ACCUMULATE, True)
        return begin, add

    def addresses(self, ring, stage):
        """(packed words, strips) of a stage."""
        start, arrays, _ = ring
        return (
            start + arrays.weights + stage * arrays.weights_stage,
            start + arrays.strips + stage * arrays.strips_stage,
        )

    @cute.jit
    def advance(self, ring, stage, phase):
        """The ring's stage and phase after this one."""
        after = stage + 1
        after_phase = phase
        if after == ring[2]:
            after = Int32(0)
            after_phase = phase ^ 1
        return after, after_phase

    @cute.jit
    def multiply(self, ring, work, stage, phase):
        """acc += weights x tokens; a k-tile's last fragments are decoded as its last but one are multiplied."""
        mma, a, b, acc, state, blocks, k_tiles = work
        _, add = self.atoms(mma)
        self.wait(ring, stage, phase)
        at_w, at_s = self.addresses(ring, stage)
        self.decode(state, 0, at_w, at_s, blocks)
        before = stage
        for kt in cutlass.range(k_tiles - 1, unroll=1):
            after, after_phase = self.advance(ring, stage, phase)
            for ks in cutlass.range_constexpr(K_STEPS):
                if const_expr(ks == K_STEPS - 1):
                    self.wait(ring, after, after_phase)
                    at_w, at_s = self.addresses(ring, after)
                self.decode(state, (ks + 1) % K_STEPS, at_w, at_s, blocks)
                warpgroup.fence()
                cute.gemm(add, acc, a[None, None, ks], b[None, None, ks, stage], acc)
                warpgroup.commit_group()
                warpgroup.wait_group(2)
                if const_expr(ks == 1):
                    if kt > 0:
                        self.release(ring, before)
            before = stage
            stage = after
            phase = after_phase
        for ks in cutlass.range_constexpr(K_STEPS):
            if const_expr(ks < K_STEPS - 1):
                self.decode(state, ks + 1, at_w, at_s, blocks)
            warpgroup.fence()
            cute.gemm(add, acc, a[None, None, ks], b[None, None, ks, stage], acc)
            warpgroup.commit_group()
            if const_expr(ks < K_STEPS - 1):
                warpgroup.wait_group(2)
            if const_expr(ks == 1):
                if k_tiles > 1:
                    self.release(ring, before)
        warpgroup.wait_group(0)
        self.release(ring, stage)
        return self.advance(ring, stage, phase)

    @cute.jit
    def multiply_groups(self, ring, work, total, stage, phase):
        """total += scale x (the codes of one group, one k-tile of 8-bit math, x tokens). The next k-tile's words are
        read as this one is multiplied (behind the last one, words that nobody uses). Fragments wait for the end:
        several slots with fragments of a running wgmma changed piece by piece are serialised.
        """
        mma, a, b, acc, state, blocks, k_tiles = work
        begin, add = self.atoms(mma)
        self.wait(ring, stage, phase)
        at_w, at_s = self.addresses(ring, stage)
        for ks in cutlass.range_constexpr(K_STEPS):
            self.decode(state, ks, at_w, at_s, blocks)
        for kt in cutlass.range(k_tiles, unroll=1):
            _, at_s = self.addresses(ring, stage)
            warpgroup.fence()
            for ks in cutlass.range_constexpr(K_STEPS):
                atom = begin if const_expr(ks == 0) else add
                cute.gemm(atom, acc, a[None, None, ks], b[None, None, ks, stage], acc)
                warpgroup.commit_group()
            scales = self.row_scales(at_s, blocks)
            before = stage
            stage, phase = self.advance(ring, stage, phase)
            if kt + 1 < k_tiles:
                self.wait(ring, stage, phase)
            at_w, _ = self.addresses(ring, stage)
            for ks in cutlass.range_constexpr(K_STEPS):
                self.load(state, ks, at_w, at_s, blocks)
            warpgroup.wait_group(0)
            for ks in cutlass.range_constexpr(K_STEPS):
                self.fill(state, ks)
            self.release(ring, before)
            self.add_group(total, acc, scales)
        return stage, phase

    @cute.jit
    def multiply_pairs(self, ring, work, total, stage, phase):
        """total += scale x (the codes of one group, two k-tiles of bf16 math, x tokens)."""
        _, _, _, acc, state, blocks, k_tiles = work
        self.wait(ring, stage, phase)
        at_w, at_s = self.addresses(ring, stage)
        self.decode(state, 0, at_w, at_s, blocks)
        before = stage
        last = stage
        for pair in cutlass.range(k_tiles // 2, unroll=1):
            last = stage
            stage, phase = self.half_group(ring, work, stage, phase, before, True, True, pair > 0)
            before = last
            last = stage
            more = pair * 2 + 2 < k_tiles
            stage, phase = self.half_group(ring, work, stage, phase, before, False, more, True)
            before = last
            scales = self.row_scales(self.addresses(ring, last)[1], blocks)
            warpgroup.wait_group(0)
            self.add_group(total, acc, scales)
        if k_tiles % 2 == 1:
            last = stage
            stage, phase = self.half_group(ring, work, stage, phase, before, True, False, k_tiles > 1)
            before = last
            scales = self.row_scales(self.addresses(ring, last)[1], blocks)
            warpgroup.wait_group(0)
            self.add_group(total, acc, scales)
        self.release(ring, before)
        return stage, phase

    @cute.jit
    def half_group(self, ring, work, stage, phase, before, starts: cutlass.Constexpr, more, release_before):
        """Multiply the k-tile in `stage`, decode the first fragment of the next, waiting for it if there is one, and
        release the stage before. Returns the ring's next stage and phase.
        """
        mma, a, b, acc, state, blocks, _ = work
        begin, add = self.atoms(mma)
        after, after_phase = self.advance(ring, stage, phase)
        at_w, at_s = self.addresses(ring, stage)
        for ks in cutlass.range_constexpr(K_STEPS):
            if const_expr(ks == K_STEPS - 1):
                if more:
                    self.wait(ring, after, after_phase)
                at_w, at_s = self.addresses(ring, after)
            self.decode(state, (ks + 1) % K_STEPS, at_w, at_s, blocks)
            warpgroup.fence()
            atom = begin if const_expr(starts and ks == 0) else add
            cute.gemm(atom, acc, a[None, None, ks], b[None, None, ks, stage], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(2)
            if const_expr(ks == 1):
                if release_before:
                    self.release(ring, before)
        return after, after_phase

    def wait(self, ring, stage, phase):
        """Until the producer has filled a stage."""
        start, arrays, _ = ring
        ptx.mbarrier_wait(start + arrays.barriers + stage * 8, phase)

    @cute.jit
    def release(self, ring, stage):
        """Tell the producers that this warp has read the stage: all lanes have, before one says so. In a cluster every
        CTA's producer fills it.
        """
        start, arrays, num_stages = ring
        barrier = start + arrays.barriers + (stage + num_stages) * 8
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if const_expr(self.cluster == 1):
                ptx.mbarrier_arrive(barrier)
            else:
                for rank in cutlass.range_constexpr(self.cluster):
                    ptx.mbarrier_arrive_at(barrier, rank)

    @cute.jit
    def decode(self, state, ks: cutlass.Constexpr, at_w, at_s, blocks):
        """A fragments of k-step ks; on ks = 0 the k-tile's words and scales are read first."""
        self.load(state, ks, at_w, at_s, blocks)
        self.fill(state, ks)

    @cute.jit
    def load(self, state, ks: cutlass.Constexpr, at_w, at_s, blocks):
        """Packed words of k-step ks to registers, or of the whole k-tile on ks = 0; then scales of weights too."""
        group, warp, lane = blocks
        _, words, scales, biases, consts = state
        for m in cutlass.range_constexpr(self.m_units):
            block = (m * self.groups + group) * 4 + warp
            if const_expr(ks == 0 or self.narrow or self.facts.weight_bits == 16):
                self.weights.load(words, m, at_w, block, lane, ks)
            if const_expr(ks == 0 and self.fetches_groups):
                self.fetch_group(scales, biases, m, at_s + block * 32 + (lane // 4) * 4, consts)

    @cute.jit
    def fill(self, state, ks: cutlass.Constexpr):
        """A fragments of k-step ks from the words."""
        fragments, words, scales, biases, consts = state
        for m in cutlass.range_constexpr(self.m_units):
            if const_expr(self.narrow):
                regs = self.weights.fragment(words, m, ks)
            else:
                regs = self.weights.decode(words, m, ks, scales, biases, consts)
            fragments[(0, 0, 0), m, ks] = regs[0]
            fragments[(0, 1, 0), m, ks] = regs[1]
            fragments[(0, 0, 1), m, ks] = regs[2]
            fragments[(0, 1, 1), m, ks] = regs[3]

    @cute.jit
    def fetch_group(self, scales, biases, m: cutlass.Constexpr, address, consts):
        """Scale, if weights are multiplied by it, and zero point, if there is one, of rows g and g + 8 in this k-tile's
        group.
        """
        if const_expr(self.scales_weights):
            pair = ptx.lds32(address)
            scales[0, m] = ptx.broadcast_low(pair)
            scales[1, m] = ptx.broadcast_high(pair)
        if const_expr(self.facts.has_zero_points):
            bias = self.weights.bias(ptx.lds32(address + self.tile_m * 2), consts)
            biases[0, m] = bias[0]
            biases[1, m] = bias[1]

    @cute.jit
    def fetch_channel(self, state, feature_tile, index, slot_at, units, blocks):
        """Biases that hold for a whole tile: zero points per channel from global memory, or the symmetric schemes'
        constant.
        """
        _, _, _, biases, consts = state
        for m in cutlass.range_constexpr(self.m_units):
            pair = None
            if const_expr(self.facts.has_zero_points):
                pair = self.channel_zeros(m, feature_tile, index, slot_at, units, blocks)
            bias = self.weights.bias(pair, consts)
            biases[0, m] = bias[0]
            biases[1, m] = bias[1]

    def channel_zeros(self, m, feature_tile, index, slot_at, units, blocks):
        """Zero points per channel of rows g and g + 8 of a unit, a bf16 pair, from global memory."""
        group, warp, lane = blocks
        block = feature_tile * (self.tile_m // 16) + (m * self.groups + group) * 4 + warp
        block = cutlass.min(block, units * 4 - 1)
        strip = ptx.ldg64(slot_at + 16) + Int64(index) * units * STRIP_BYTES
        return ptx.ldg32(strip + block * 32 + (lane // 4) * 4)

    def row_scales(self, at_s, blocks):
        """Float32 scales of rows g and g + 8 of each unit in this group."""
        group, warp, lane = blocks
        out = []
        for m in range(self.m_units):
            block = (m * self.groups + group) * 4 + warp
            pair = ptx.lds32(at_s + block * 32 + (lane // 4) * 4)
            out.append((ptx.bf16_low_to_f32(pair), ptx.bf16_high_to_f32(pair)))
        return out

    def add_group(self, total, sums, scales):
        """total += sums * scale of the row, in float32."""
        total, sums = self.numbered(total), self.numbered(sums)
        for m in range(self.m_units):
            for n in range(self.tile_n // 8):
                for half in range(2):
                    for i in range(2):
                        at = ((i, half, n), m, 0)
                        value = sums[at]
                        if self.acc_type() is Int32:
                            value = ptx.int_to_f32(value)
                        total[at] = total[at] + value * scales[m][half]

    def registers(self):
        """Words of the k-tile (or k-step), scale pairs, bias pairs, constants."""
        if self.narrow:
            return cute.make_rmem_tensor((self.weights.words, self.m_units), Int32), None, None, None
        words = cute.make_rmem_tensor((self.weights.words, self.m_units), Int32)
        scales = cute.make_rmem_tensor((2, self.m_units), Int32)
        biases = cute.make_rmem_tensor((2, self.m_units), Int32)
        return words, scales, biases, self.weights.constants()
