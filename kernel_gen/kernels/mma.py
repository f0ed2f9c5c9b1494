"""The `mma` family: a persistent grouped GEMM on mma.sync and cp.async, sm_80 and up, up to four schemes in one launch.

Each CTA walks its tiles (scheduler.py). A pipeline of num_stages stages runs across tiles: while one tile is multiplied, the loader is already in the
next, which may have another scheme. The scheme is chosen once per tile, outside the k loop (inside it, registers spill: see ARCHITECTURE.md).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen import smem
from kernel_gen.kernels import ptx
from kernel_gen.kernels.epilogue import Epilogue
from kernel_gen.kernels.loads import StageLoader
from kernel_gen.kernels.mainloop import Mainloop
from kernel_gen.kernels.scheduler import TileScheduler
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.layouts import ActivationKind, layout_of

# Registers of the load cursor.
TILE, K_TILE, K_TILES, STAGE, ROW, ROW_END, FEATURE_TILE, SLOT, INDEX = range(9)

ACTIVATION_ARGUMENT = {
    ActivationKind.BF16: 0,
    ActivationKind.INT8: 1,
    ActivationKind.E4M3: 3,
    ActivationKind.INT4: 5,
    ActivationKind.INT4_GROUP: 5,
}
"""Where an activation's address stands among the seven; its scales' address follows it (bf16 has none)."""


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
        self.epilogue = Epilogue(
            m_blocks,
            n_blocks,
            self.facts.has_channel_scales,
            token_scales,
            1 / 16 if self.mainloop.widen else 1.0,
        )


class MmaKernel:
    """Callable for cute.compile: builds the launch of one KernelSpec."""

    def __init__(self, spec: KernelSpec) -> None:
        config = spec.config
        self.tile_m, self.tile_n = config.tile.m, config.tile.n
        self.warps_m, self.num_threads, self.num_stages = config.warps.m, config.num_threads, config.num_stages
        self.min_ctas = config.min_ctas_per_sm
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
        self.kernel(
            y, offsets, plan, weights, x_bf16, x_int8, sx_int8, x_e4m3, sx_e4m3, x_int4, sx_int4, k
        ).launch(
            grid=(grid, 1, 1),
            block=(self.num_threads, 1, 1),
            smem=self.smem_bytes,
            stream=stream,
            min_blocks_per_mp=self.min_ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
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
    ):
        tid, _, _ = cute.arch.thread_idx()
        first, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = tid % 32
        warp = cute.arch.make_warp_uniform(tid // 32)
        warp_m = warp % self.warps_m
        warp_n = warp // self.warps_m
        activations = (x_bf16, x_int8, sx_int8, x_e4m3, sx_e4m3, x_int4, sx_int4)
        num_tokens = cute.size(y, mode=[0])
        num_features = cute.size(y, mode=[1])
        units = (num_features + 63) // 64
        feature_tiles = (num_features + (self.tile_m - 1)) // self.tile_m
        stages = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        table = stages + self.num_stages * self.stage_bytes
        weights_at = weights.iterator.toint()
        y_at = y.iterator.toint()
        num_tiles = self.scheduler.build(
            table, tid, self.num_threads, offsets, plan, num_tokens, feature_tiles
        )
        where = (table, lane, num_tiles, feature_tiles, ctas, k)
        what = (stages, tid, weights_at, activations, k, units)
        cursor = cute.make_rmem_tensor((9,), Int32)
        for i in cutlass.range_constexpr(9):
            cursor[i] = Int32(0)
        cursor[TILE] = first
        self.locate(cursor, where)
        for _ in cutlass.range_constexpr(self.num_stages - 1):
            self.load_next(cursor, where, what)
        stage = cute.make_rmem_tensor((1,), Int32)
        stage[0] = Int32(0)
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
    def locate(self, cursor, where):
        """Point the load cursor at the first k-tile of its tile."""
        table, lane, num_tiles, feature_tiles, _, k = where
        if cursor[TILE] < num_tiles:
            row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, cursor[TILE], feature_tiles)
            cursor[ROW] = row
            cursor[ROW_END] = row_end
            cursor[FEATURE_TILE] = feature_tile
            cursor[SLOT] = slot
            cursor[INDEX] = index
            cursor[K_TILE] = Int32(0)
            for s in cutlass.range_constexpr(len(self.slots)):
                k_tile = self.slots[s].facts.k_tile
                if slot == s:
                    cursor[K_TILES] = (k + (k_tile - 1)) // k_tile

    @cute.jit
    def load_next(self, cursor, where, what):
        """Start the copy of one more k-tile, if there is one, and close its cp.async group either way, so that groups count stages."""
        _, _, num_tiles, _, ctas, _ = where
        if cursor[TILE] < num_tiles:
            for s in cutlass.range_constexpr(len(self.slots)):
                if const_expr(len(self.slots) == 1):
                    self.load_stage(s, cursor, what)
                else:
                    if cursor[SLOT] == s:
                        self.load_stage(s, cursor, what)
            cursor[K_TILE] = cursor[K_TILE] + 1
            if cursor[K_TILE] == cursor[K_TILES]:
                cursor[TILE] = cursor[TILE] + ctas
                self.locate(cursor, where)
        cute.arch.cp_async_commit_group()
        cursor[STAGE] = cursor[STAGE] + 1
        if cursor[STAGE] == self.num_stages:
            cursor[STAGE] = Int32(0)

    @cute.jit
    def load_stage(self, s: cutlass.Constexpr, cursor, what):
        """Copy one k-tile of slot s."""
        stages, tid, weights_at, activations, k, units = what
        loader = self.slots[s].loader
        facts = self.slots[s].facts
        where_x = ACTIVATION_ARGUMENT[facts.activation]
        x = activations[where_x]
        k_tile = cursor[K_TILE]
        k_tiles = cursor[K_TILES]
        index = cursor[INDEX]
        feature_tile = cursor[FEATURE_TILE]
        stage = stages + cursor[STAGE] * self.stage_bytes
        slot_at = weights_at + s * 32
        loader.weights(stage, tid, ptx.ldg64(slot_at), index, feature_tile, k_tile, k_tiles, units)
        row_bytes = k_tiles * facts.x_row_bytes
        if const_expr(facts.activation is ActivationKind.BF16):
            row_bytes = (k * 2 + 15) // 16 * 16
        loader.activations(stage, tid, x, cursor[ROW], cursor[ROW_END], k_tile, row_bytes)
        if const_expr(facts.has_group_scales):
            groups = (k + (facts.group_size - 1)) // facts.group_size
            group = k_tile // facts.k_tiles_per_group
            at = stage + loader.stage.scale_offset
            loader.strip(at, tid, ptx.ldg64(slot_at + 8), index, groups, group, feature_tile, units)
            if const_expr(facts.has_zero_points):
                at = stage + loader.stage.zero_offset
                loader.strip(at, tid, ptx.ldg64(slot_at + 16), index, groups, group, feature_tile, units)
        if const_expr(facts.activation is ActivationKind.INT4_GROUP):
            at = stage + loader.stage.sx_offset
            loader.activation_scales(at, tid, activations[where_x + 1], cursor[ROW], cursor[ROW_END], k_tile, k_tiles)

    @cute.jit
    def run_tile(self, s: cutlass.Constexpr, stage, cursor, where, what, at, threads):
        """One tile of slot s: k loop, epilogue."""
        stages, _, weights_at, activations, k, units = what
        row, row_end, feature_tile, index, y_at, num_features = at
        warp_m, warp_n, lane = threads
        unit = self.slots[s]
        loop = unit.mainloop
        state = loop.registers()
        acc = state[0]
        acc.fill(0)
        if const_expr(unit.facts.has_zero_points and not unit.facts.has_group_scales):
            zeros = state[4]
            for m in cutlass.range_constexpr(loop.m_blocks):
                block = feature_tile * (self.tile_m // 16) + warp_m * loop.m_blocks + m
                block = cutlass.min(block, units * 4 - 1)
                zeros[m] = ptx.ldg32(
                    ptx.ldg64(weights_at + s * 32 + 16) + (Int64(index) * units * 4 + block) * 32 + (lane // 4) * 4
                )
        k_tiles = (k + (unit.facts.k_tile - 1)) // unit.facts.k_tile
        for _ in cutlass.range(k_tiles, unroll=1):
            cute.arch.cp_async_wait_group(self.num_stages - 2)
            cute.arch.sync_threads()
            self.load_next(cursor, where, what)
            self.slots[s].mainloop.step(state, stages + stage[0] * self.stage_bytes, warp_m, warp_n, lane)
            stage[0] = stage[0] + 1
            if stage[0] == self.num_stages:
                stage[0] = Int32(0)
        sums = acc
        if const_expr(loop.integer and not loop.grouped):
            sums = cute.make_rmem_tensor((4, loop.m_blocks, loop.n_blocks), cutlass.Float32)
            for i in cutlass.range_constexpr(cute.size(acc)):
                sums[i] = ptx.int_to_f32(acc[i])
        feature0 = feature_tile * self.tile_m + warp_m * (16 * loop.m_blocks)
        token0 = row + warp_n * (8 * loop.n_blocks)
        where_x = ACTIVATION_ARGUMENT[unit.facts.activation]
        tokens = activations[where_x + 1] if unit.epilogue.token_scales else Int64(0)
        channels = ptx.ldg64(weights_at + s * 32 + 24) if unit.epilogue.channel_scales else Int64(0)
        unit.epilogue.run(
            sums, lane, y_at, num_features, feature0, token0, row_end, channels, units * 64, index, tokens
        )


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
