"""The k loop of one scheme in the wgmma family.

Fragment ks + 1 is decoded while wgmma ks runs: decoding right before the wgmma that reads it makes the compiler
serialise both. Schemes whose groups are scaled outside the tensor cores multiply one k-tile into a sum of its own, then
add it, scaled, in float32.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float8E4M3FN, Float32, Int8, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup

from kernel_gen.kernels import ptx
from kernel_gen.kernels.dequant import BF16_ONE, Bf16Weights, NarrowWeights
from kernel_gen.layouts import STRIP_BYTES
from profiles.gpus import Math

CODE_TYPE = {Math.BF16: BFloat16, Math.INT8: Int8, Math.E4M3: Float8E4M3FN}
K_STEPS = 4  # a k-tile is 128 bytes of a token's row, a wgmma takes 32
FOLD_UP_TO = 16  # tokens of a tile: at 32 the sums take more registers than three CTAs an SM have
FOLDED_K_TILES = 2  # k-tiles whose sums of codes are added up before they are scaled: a group of 128


class WgmmaMainloop:
    """tile_m x tile_n over `groups` consumer warpgroups; each has m_units units of 64 rows."""

    def __init__(self, facts, tile_m: int, tile_n: int, groups: int) -> None:
        self.facts, self.tile_m, self.tile_n, self.groups = facts, tile_m, tile_n, groups
        self.m_units = tile_m // 64 // groups
        self.math = facts.math
        self.narrow = self.math is not Math.BF16
        self.grouped = facts.has_group_scales and self.narrow
        self.folded = self.math is Math.BF16 and facts.weight_bits <= 4 and tile_n <= FOLD_UP_TO
        self.has_group_zeros = facts.has_group_scales and facts.has_zero_points
        if self.narrow:
            self.weights = NarrowWeights(self.math, facts.weight_bits, K_STEPS, facts.unit_bytes)
            self.extra_scale = self.weights.extra_scale
        else:
            self.weights = Bf16Weights(
                facts.weight_bits, facts.has_zero_points, facts.has_group_scales, facts.unit_bytes
            )
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

    def token_layout(self, num_stages: int):
        """Tokens in shared memory: rows of one k-tile, 128 bytes, swizzled as TMA and wgmma agree on."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, CODE_TYPE[self.math])
        return cute.tile_to_shape(atom, (self.tile_n, self.facts.k_tile, num_stages), order=(0, 1, 2))

    @cute.jit
    def run(self, base, start, arrays, barriers, num_stages: cutlass.Constexpr, stage, phase, at, mma, layout, tid):
        """(float32 sums, next stage, next phase) of one tile."""
        _, _, feature_tile, index, slot_at, k, units = at
        facts = self.facts
        lane = tid % 32
        warp = (tid // 32) % 4
        group = tid // 128 - 1
        thread_mma = mma.get_slice(tid - 128)
        acc = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), self.acc_type())
        acc.fill(0)
        a = thread_mma.make_fragment_A(mma.partition_shape_A((self.tile_m, facts.k_tile)))
        tokens = cute.make_tensor(
            cute.recast_ptr(base + arrays.tokens, layout.inner, dtype=CODE_TYPE[self.math]), layout.outer
        )
        b = thread_mma.make_fragment_B(thread_mma.partition_B(tokens))
        fragments = cute.recast_tensor(a, Int32)
        state = self.registers()
        blocks = (group, warp, lane)
        if const_expr(not self.narrow and facts.weight_bits != 16 and not self.has_group_zeros and not self.folded):
            self.fetch_channel(state, feature_tile, index, slot_at, units, blocks)
        add = cute.make_mma_atom(mma.op)
        add.set(warpgroup.Field.ACCUMULATE, True)
        k_tiles = (k + (facts.k_tile - 1)) // facts.k_tile
        if const_expr(self.grouped):
            sums = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), self.acc_type())
            total = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), Float32)
            total.fill(0.0)
            first = cute.make_mma_atom(mma.op)
            first.set(warpgroup.Field.ACCUMULATE, False)
            cute.arch.mbarrier_wait(barriers + stage, phase)
            at_w = start + arrays.weights + stage * arrays.weights_stage
            for ks in cutlass.range_constexpr(K_STEPS):
                self.decode(fragments, state, ks, at_w, at_w, blocks)
            for kt in cutlass.range(k_tiles, unroll=1):
                at_s = start + arrays.strips + stage * arrays.strips_stage
                warpgroup.fence()
                for ks in cutlass.range_constexpr(K_STEPS):
                    atom = first if const_expr(ks == 0) else add
                    cute.gemm(atom, sums, a[None, None, ks], b[None, None, ks, stage], sums)
                    warpgroup.commit_group()
                scales = self.row_scales(at_s, blocks)
                before = stage
                stage += 1
                if stage == num_stages:
                    stage = Int32(0)
                    phase ^= 1
                if kt + 1 < k_tiles:
                    cute.arch.mbarrier_wait(barriers + stage, phase)
                at_w = start + arrays.weights + stage * arrays.weights_stage
                for ks in cutlass.range_constexpr(K_STEPS):
                    warpgroup.wait_group(K_STEPS - 1 - ks)
                    self.decode(fragments, state, ks, at_w, at_w, blocks)
                self.release(barriers + num_stages + before)
                self.add_group(total, sums, scales)
            acc = total
        elif const_expr(self.folded):
            zeros = self.fold_channel(feature_tile, index, slot_at, units, blocks)
            ones = thread_mma.make_fragment_A(mma.partition_shape_A((64 * self.groups, facts.k_tile)))
            ones_words = cute.recast_tensor(ones, Int32)
            for r in cutlass.range_constexpr(4):
                # Pinned: constants would be made anew, in registers that a running wgmma still reads.
                ones_words[(0, r % 2, r // 2), 0, 0] = ptx.pinned(BF16_ONE)
            token_sums = cute.make_rmem_tensor(mma.partition_shape_C((64 * self.groups, self.tile_n)), Float32)
            total = cute.make_rmem_tensor(mma.partition_shape_C((self.tile_m, self.tile_n)), Float32)
            total.fill(0.0)
            cute.arch.mbarrier_wait(barriers + stage, phase)
            at_w = start + arrays.weights + stage * arrays.weights_stage
            self.decode(fragments, state, 0, at_w, at_w, blocks)
            ring = (start, arrays, barriers, num_stages)
            products = (a, b, fragments, state, ones, acc, token_sums)
            before = stage
            here = stage
            for pair in cutlass.range(k_tiles // 2, unroll=1):
                more = pair * 2 + 2 < k_tiles
                here = stage
                stage, phase = self.fold_tile(ring, products, mma, blocks, stage, phase, before, True, True, pair > 0)
                before = here
                here = stage
                stage, phase = self.fold_tile(ring, products, mma, blocks, stage, phase, before, False, more, True)
                before = here
                warpgroup.wait_group(0)
                self.fold(total, acc, token_sums, zeros, start + arrays.strips + here * arrays.strips_stage, blocks)
            if k_tiles % 2 == 1:
                here = stage
                stage, phase = self.fold_tile(
                    ring, products, mma, blocks, stage, phase, before, True, False, k_tiles > 1
                )
                before = here
                warpgroup.wait_group(0)
                self.fold(total, acc, token_sums, zeros, start + arrays.strips + here * arrays.strips_stage, blocks)
            self.release(barriers + num_stages + before)
            acc = total
        else:
            cute.arch.mbarrier_wait(barriers + stage, phase)
            at_w = start + arrays.weights + stage * arrays.weights_stage
            at_s = start + arrays.strips + stage * arrays.strips_stage
            self.decode(fragments, state, 0, at_w, at_s, blocks)
            before = stage
            for kt in cutlass.range(k_tiles - 1, unroll=1):
                after = stage + 1
                after_phase = phase
                if after == num_stages:
                    after = Int32(0)
                    after_phase = phase ^ 1
                for ks in cutlass.range_constexpr(K_STEPS):
                    if const_expr(ks == K_STEPS - 1):
                        cute.arch.mbarrier_wait(barriers + after, after_phase)
                        at_w = start + arrays.weights + after * arrays.weights_stage
                        at_s = start + arrays.strips + after * arrays.strips_stage
                    self.decode(fragments, state, (ks + 1) % K_STEPS, at_w, at_s, blocks)
                    warpgroup.fence()
                    cute.gemm(add, acc, a[None, None, ks], b[None, None, ks, stage], acc)
                    warpgroup.commit_group()
                    warpgroup.wait_group(2)
                    if const_expr(ks == 1):
                        if kt > 0:
                            self.release(barriers + num_stages + before)
                before = stage
                stage = after
                phase = after_phase
            for ks in cutlass.range_constexpr(K_STEPS):
                if const_expr(ks < K_STEPS - 1):
                    self.decode(fragments, state, ks + 1, at_w, at_s, blocks)
                warpgroup.fence()
                cute.gemm(add, acc, a[None, None, ks], b[None, None, ks, stage], acc)
                warpgroup.commit_group()
                if const_expr(ks < K_STEPS - 1):
                    warpgroup.wait_group(2)
                if const_expr(ks == 1):
                    if k_tiles > 1:
                        self.release(barriers + num_stages + before)
            warpgroup.wait_group(0)
            self.release(barriers + num_stages + stage)
            stage += 1
            if stage == num_stages:
                stage = Int32(0)
                phase ^= 1
        return acc, stage, phase

    @cute.jit
    def release(self, barrier):
        """Tell the producer that this warp has read the stage: all lanes have, before one says so."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)

    @cute.jit
    def decode(self, fragments, state, ks: cutlass.Constexpr, at_w, at_s, blocks):
        """A fragments of k-step ks; on ks = 0 the k-tile's words and scales are read first."""
        group, warp, lane = blocks
        words, scales, biases, consts = state
        for m in cutlass.range_constexpr(self.m_units):
            block = (m * self.groups + group) * 4 + warp
            if const_expr(self.narrow or self.facts.weight_bits == 16):
                self.weights.load(words, m, at_w, block, lane, ks)
            else:
                if const_expr(ks == 0):
                    self.weights.load(words, m, at_w, block, lane, 0)
            if const_expr(ks == 0 and not self.narrow and self.facts.has_group_scales and not self.folded):
                self.fetch_group(scales, biases, m, at_s + block * 32 + (lane // 4) * 4, consts)
            if const_expr(self.narrow):
                regs = self.weights.fragment(words, m, ks)
            elif const_expr(self.folded):
                regs = [self.weights.codes(words, m, ks, r, consts) for r in range(4)]
            else:
                regs = self.weights.decode(words, m, ks, scales, biases, consts)
            fragments[(0, 0, 0), m, ks] = regs[0]
            fragments[(0, 1, 0), m, ks] = regs[1]
            fragments[(0, 0, 1), m, ks] = regs[2]
            fragments[(0, 1, 1), m, ks] = regs[3]

    @cute.jit
    def fetch_group(self, scales, biases, m: cutlass.Constexpr, address, consts):
        """Scale, and zero point where there is one, of rows g and g + 8 in this k-tile's group."""
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
        group, warp, lane = blocks
        _, _, biases, consts = state
        for m in cutlass.range_constexpr(self.m_units):
            pair = None
            if const_expr(self.facts.has_zero_points):
                block = feature_tile * (self.tile_m // 16) + (m * self.groups + group) * 4 + warp
                block = cutlass.min(block, units * 4 - 1)
                strip = ptx.ldg64(slot_at + 16) + Int64(index) * units * STRIP_BYTES
                pair = ptx.ldg32(strip + block * 32 + (lane // 4) * 4)
            bias = self.weights.bias(pair, consts)
            biases[0, m] = bias[0]
            biases[1, m] = bias[1]

    def fold_channel(self, feature_tile, index, slot_at, units, blocks):
        """What a code stands above its weight, 128 + zero point, of rows g and g + 8 of each unit; None where zero
        points change with the group.
        """
        group, warp, lane = blocks
        out = []
        for m in range(self.m_units):
            if self.has_group_zeros:
                out.append(None)
            elif self.facts.has_zero_points:
                block = feature_tile * (self.tile_m // 16) + (m * self.groups + group) * 4 + warp
                block = cutlass.min(block, units * 4 - 1)
                strip = ptx.ldg64(slot_at + 16) + Int64(index) * units * STRIP_BYTES
                pair = ptx.ldg32(strip + block * 32 + (lane // 4) * 4)
                out.append((ptx.bf16_low_to_f32(pair) + 128.0, ptx.bf16_high_to_f32(pair) + 128.0))
            else:
                above = Float32(128.0 + 2.0 ** (self.facts.weight_bits - 1))
                out.append((above, above))
        return out

    @cute.jit
    def fold_tile(
        self, ring, products, mma, blocks, stage, phase, before, is_first: cutlass.Constexpr, more, release_before
    ):
        """Multiply the k-tile in `stage`, decode the first fragment of the next if there are more, release the stage
        before. Returns the ring's next stage and phase.
        """
        start, arrays, barriers, num_stages = ring
        a, b, fragments, state, ones, acc, token_sums = products
        begin = cute.make_mma_atom(mma.op)
        begin.set(warpgroup.Field.ACCUMULATE, False)
        add = cute.make_mma_atom(mma.op)
        add.set(warpgroup.Field.ACCUMULATE, True)
        after = stage + 1
        after_phase = phase
        if after == num_stages:
            after = Int32(0)
            after_phase = phase ^ 1
        at_w = start + arrays.weights + stage * arrays.weights_stage
        for ks in cutlass.range_constexpr(K_STEPS):
            if const_expr(ks == K_STEPS - 1):
                if more:
                    cute.arch.mbarrier_wait(barriers + after, after_phase)
                at_w = start + arrays.weights + after * arrays.weights_stage
            self.decode(fragments, state, (ks + 1) % K_STEPS, at_w, at_w, blocks)
            warpgroup.fence()
            atom = begin if const_expr(is_first and ks == 0) else add
            cute.gemm(atom, token_sums, ones[None, None, 0], b[None, None, ks, stage], token_sums)
            cute.gemm(atom, acc, a[None, None, ks], b[None, None, ks, stage], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(2)
            if const_expr(ks == 1):
                if release_before:
                    self.release(barriers + num_stages + before)
        return after, after_phase

    @cute.jit
    def fold(self, total, sums, token_sums, zeros, at_s, blocks):
        """total += scale * (sums - (128 + zero point) * token_sums), in float32."""
        group, warp, lane = blocks
        for m in cutlass.range_constexpr(self.m_units):
            block = (m * self.groups + group) * 4 + warp
            at = at_s + block * 32 + (lane // 4) * 4
            above = zeros[m]
            scales = None
            if const_expr(self.facts.has_group_scales):
                pair = ptx.lds32(at)
                scales = (ptx.bf16_low_to_f32(pair), ptx.bf16_high_to_f32(pair))
            if const_expr(self.has_group_zeros):
                pair = ptx.lds32(at + self.tile_m * 2)
                above = (ptx.bf16_low_to_f32(pair) + 128.0, ptx.bf16_high_to_f32(pair) + 128.0)
            for n in cutlass.range_constexpr(self.tile_n // 8):
                for half in cutlass.range_constexpr(2):
                    for i in cutlass.range_constexpr(2):
                        value = sums[((i, half, n), m, 0)] - above[half] * token_sums[((i, half, n), 0, 0)]
                        if const_expr(scales is not None):
                            value = value * scales[half]
                        total[((i, half, n), m, 0)] = total[((i, half, n), m, 0)] + value

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
