"""The `mma` family: a persistent grouped GEMM on mma.sync and cp.async, sm_80 and up, up to four schemes in one launch.

Each CTA walks its tiles (scheduler.py). A pipeline of num_stages stages runs across tiles: while one tile is
multiplied, the loader is already in the next, which may have another scheme. The scheme is chosen once per tile,
outside the k loop (inside it, registers spill: see ARCHITECTURE.md).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen import smem
from kernel_gen.kernels import ptx
from kernel_gen.kernels.epilogue import Epilogue
from kernel_gen.kernels.loads import (
    K_LEFT,
    NUM_ADDRESSES,
    NUM_WORDS,
    SLOT,
    STAGE,
    TILE,
    StageLoader,
)
from kernel_gen.kernels.mainloop import Mainloop
from kernel_gen.kernels.scheduler import TileScheduler
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.kernels.swiglu_epilogue import SwigluEpilogue
from kernel_gen.layouts import ACTIVATION_ARGUMENT, STRIP_BYTES, ActivationKind, layout_of


class Slot:
    """The units of one scheme in this kernel."""

    def __init__(self, spec: KernelSpec, scheme) -> None:
        config = spec.config
        self.facts = layout_of(scheme)
        self.stage = smem.stage_layout(config, scheme)
        m_blocks = config.tile.m // 16 // config.warps.m
        n_blocks = config.tile.n // 8 // config.warps.n
        self.loader = StageLoader(self.facts, self.stage, config.tile.m, config.tile.n, config.num_threads)
        self.mainloop = Mainloop(self.facts, self.stage, config.warps.m, m_blocks, n_blocks)
        token_scales = self.facts.activation in (ActivationKind.INT8, ActivationKind.E4M3, ActivationKind.INT4)
        epilogue = SwigluEpilogue if spec.swiglu else Epilogue
        self.epilogue = epilogue(
            m_blocks,
            n_blocks,
            self.facts.has_channel_scales,
            token_scales,
            self.mainloop.extra_scale,
        )


class MmaKernel:
    """Callable for cute.compile: builds the launch of one KernelSpec."""

    def __init__(self, spec: KernelSpec) -> None:
        config = spec.config
        self.tile_m, self.tile_n = config.tile.m, config.tile.n
        self.warps_m, self.num_threads, self.num_stages = config.warps.m, config.num_threads, config.num_stages
        self.min_ctas = config.min_ctas_per_sm
        self.overlap, self.prefetch = spec.overlap, spec.prefetch
        self.rows_per_feature = 2 if spec.swiglu else 1
        self.slots = [Slot(spec, scheme) for scheme in spec.schemes]
        self.stage_bytes = smem.stage_bytes(config, spec.schemes)
        self.smem_bytes = smem.smem_bytes(config, spec.schemes, spec.max_experts)
        self.scheduler = TileScheduler(self.tile_m, self.tile_n, spec.max_experts, config.raster)

    @cute.jit
    def __call__(
        self,
        y: cute.Tensor,
        offsets: cute.Tensor,
        plan: cute.Tensor,
        weights: cute.Tensor,
        x_bf16: Int64,
        x_int8: Int64,
        sx_int8: Int64,
        x_e4m3: Int64,
        sx_e4m3: Int64,
        x_int4: Int64,
        sx_int4: Int64,
        k: Int32,
        grid: Int32,
        stream: cuda.CUstream,
    ):
        activations = (x_bf16, x_int8, sx_int8, x_e4m3, sx_e4m3, x_int4, sx_int4)
        self.kernel(y, offsets, plan, weights, activations, k).launch(
            grid=(grid, 1, 1),
            block=(self.num_threads, 1, 1),
            smem=self.smem_bytes,
            stream=stream,
            min_blocks_per_mp=self.min_ctas,
            preferred_smem_carveout=100,
            use_pdl=self.overlap,
        )

    @cute.kernel
    def kernel(
        self,
        y: cute.Tensor,
        offsets: cute.Tensor,
        plan: cute.Tensor,
        weights: cute.Tensor,
        activations: tuple,
        k: Int32,
    ):
        tid, _, _ = cute.arch.thread_idx()
        first, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = tid % 32
        warp = cute.arch.make_warp_uniform(tid // 32)
        warp_m = warp % self.warps_m
        warp_n = warp // self.warps_m
        num_tokens = cute.size(y, mode=[0])
        num_features = cute.size(y, mode=[1])
        num_rows = num_features * self.rows_per_feature
        units = (num_rows + 63) // 64
        feature_tiles = (num_rows + (self.tile_m - 1)) // self.tile_m
        stages = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        table = stages + self.num_stages * self.stage_bytes
        weights_at = weights.iterator.toint()
        y_at = y.iterator.toint()
        if const_expr(self.overlap and not self.prefetch):
            ptx.wait_for_kernel_ahead()
        num_tiles = self.scheduler.build(table, tid, self.num_threads, offsets, plan, num_tokens, feature_tiles)
        if const_expr(self.prefetch):
            ptx.wait_for_kernel_ahead()
        where = (table, lane, num_tiles, feature_tiles, ctas)
        what = (stages, tid, weights_at, activations, k, units)
        words = cute.make_rmem_tensor((NUM_WORDS,), Int32)
        addresses = cute.make_rmem_tensor((NUM_ADDRESSES,), Int64)
        words.fill(0)
        addresses.fill(0)
        words[TILE] = first
        words[STAGE] = stages
        cursor = (words, addresses)
        self.aim(cursor, where, what)
        for _ in cutlass.range_constexpr(self.num_stages - 1):
            self.load_next(cursor, where, what)
        stage = cute.make_rmem_tensor((1,), Int32)
        stage[0] = stages
        for tile in cutlass.range(first, num_tiles, ctas, unroll=1):
            row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, tile, feature_tiles)
            at = (row, row_end, feature_tile, index, y_at, num_features)
            threads = (warp_m, warp_n, lane)
            for s in cutlass.range_constexpr(len(self.slots)):
                if const_expr(len(self.slots) == 1):
                    self.run_tile(s, stage, cursor, where, what, at, threads)
                else:
                    if slot == s:
                        self.run_tile(s, stage, cursor, where, what, at, threads)

    @cute.jit
    def aim(self, cursor, where, what):
        """Point the load cursor at the first k-tile of its tile, if there is one."""
        words, addresses = cursor
        table, lane, num_tiles, feature_tiles, _ = where
        _, tid, weights_at, activations, k, units = what
        if words[TILE] < num_tiles:
            row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, words[TILE], feature_tiles)
            words[SLOT] = slot
            at = (row, row_end, feature_tile, index)
            for s in cutlass.range_constexpr(len(self.slots)):
                if const_expr(len(self.slots) == 1):
                    self.slots[s].loader.aim(words, addresses, tid, at, weights_at, activations, k, units)
                else:
                    if slot == s:
                        self.slots[s].loader.aim(words, addresses, tid, at, weights_at + s * 32, activations, k, units)

    @cute.jit
    def load_next(self, cursor, where, what):
        """Start the copy of one more k-tile, if there is one, and close its cp.async group either way, so that groups
        count stages.
        """
        words, addresses = cursor
        stages, tid, _, _, k, units = what
        if words[TILE] < where[2]:
            for s in cutlass.range_constexpr(len(self.slots)):
                if const_expr(len(self.slots) == 1):
                    self.slots[s].loader.issue(words, addresses, tid, k, units)
                else:
                    if words[SLOT] == s:
                        self.slots[s].loader.issue(words, addresses, tid, k, units)
            words[K_LEFT] = words[K_LEFT] - 1
            if words[K_LEFT] == 0:
                words[TILE] = words[TILE] + where[4]
                self.aim(cursor, where, what)
        cute.arch.cp_async_commit_group()
        words[STAGE] = self.next_stage(words[STAGE], stages)

    @cute.jit
    def next_stage(self, stage, stages):
        """The address of the stage after this one, in a ring."""
        following = stage + self.stage_bytes
        if following == stages + self.num_stages * self.stage_bytes:
            following = stages
        return following

    @cute.jit
    def run_tile(self, s: cutlass.Constexpr, stage, cursor, where, what, at, threads):
        """One tile of slot s: k loop, epilogue."""
        stages, _, weights_at, activations, k, units = what
        row, row_end, feature_tile, index, y_at, num_features = at
        warp_m, warp_n, lane = threads
        unit = self.slots[s]
        loop = unit.mainloop
        slot_at = weights_at + s * 32
        state = loop.registers()
        acc = state[0]
        acc.fill(0)
        if const_expr(loop.has_tile_biases):
            block0 = feature_tile * (self.tile_m // 16) + warp_m * loop.m_blocks
            zero_strip = ptx.ldg64(slot_at + 16) + Int64(index) * units * STRIP_BYTES
            loop.fetch_channel(state, zero_strip, block0, units * 4, lane)
        k_tiles = (k + (unit.facts.k_tile - 1)) // unit.facts.k_tile
        for _ in cutlass.range(k_tiles, unroll=1):
            cute.arch.cp_async_wait_group(self.num_stages - 2)
            cute.arch.sync_threads()
            self.load_next(cursor, where, what)
            self.slots[s].mainloop.step(state, stage[0], warp_m, warp_n, lane)
            stage[0] = self.next_stage(stage[0], stages)
        sums = acc
        if const_expr(loop.integer and not loop.grouped):
            sums = loop.to_float(acc)
        feature0 = feature_tile * self.tile_m + warp_m * (16 * loop.m_blocks)
        token0 = row + warp_n * (8 * loop.n_blocks)
        tokens = Int64(0)
        if const_expr(unit.epilogue.token_scales):
            tokens = activations[ACTIVATION_ARGUMENT[unit.facts.activation] + 1]
        channels = ptx.ldg64(slot_at + 24) + Int64(index) * units * 256
        unit.epilogue.run(sums, lane, y_at, num_features, feature0, token0, row_end, channels, units * 64, tokens)


def entry(spec: KernelSpec):
    """(callable, fake arguments) for cute.compile."""
    tokens, features, experts = cute.sym_int(), cute.sym_int(divisibility=8), cute.sym_int()
    return MmaKernel(spec), (
        make_fake_compact_tensor(BFloat16, (tokens, features), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        make_fake_compact_tensor(Int32, (experts, 4), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int64, (len(spec.schemes), 4), stride_order=(1, 0), assumed_align=16),
        *[Int64(0)] * 7,
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
