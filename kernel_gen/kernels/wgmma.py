"""The `wgmma` family: a persistent grouped GEMM for sm_90a, up to four schemes in one launch.

The warps of a producer warpgroup walk the tiles and fill stages in turn: packed weights and strips by bulk copies,
tokens by TMA. Consumer warpgroups turn packed words into A fragments in registers and multiply with wgmma (weights from
registers, tokens from shared memory). The scheduler, the decoding of weights and the packed layouts are the mma
family's.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen import smem_wgmma
from kernel_gen.kernels import ptx
from kernel_gen.kernels.scheduler import TileScheduler
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.kernels.split_k import ClusterSum
from kernel_gen.kernels.swiglu_epilogue import WgmmaSwigluEpilogue
from kernel_gen.kernels.sync_mainloop import SyncMainloop
from kernel_gen.kernels.wgmma_epilogue import WgmmaEpilogue
from kernel_gen.kernels.wgmma_mainloop import CODE_TYPE, WgmmaMainloop
from kernel_gen.kernels.wgmma_producer import Producer
from kernel_gen.layouts import ACTIVATION_ARGUMENT, ActivationKind, layout_of


class Slot:
    """The units of one scheme in this kernel: a k loop and an epilogue for every width of a token tile, full last."""

    def __init__(self, config, scheme, arrays, swiglu, prefetch) -> None:
        self.facts = layout_of(scheme)
        tile_m, groups = config.tile.m, config.warps.m // 4
        self.producer = Producer(self.facts, config, prefetch)
        self.token_scales = self.facts.activation is not ActivationKind.BF16
        self.mainloops = [
            self.mainloop(width)(self.facts, tile_m, width, groups, config.cluster, config.split_k)
            for width in config.token_widths
        ]
        self.cluster_sums = [ClusterSum(config, loop.tile_n) for loop in self.mainloops]
        epilogue = WgmmaSwigluEpilogue if swiglu else WgmmaEpilogue
        self.epilogues = [
            epilogue(config, arrays, loop.tile_n, self.facts.has_channel_scales, self.token_scales, loop.extra_scale)
            for loop in self.mainloops
        ]

    def mainloop(self, width: int) -> type[WgmmaMainloop]:
        """The kind of k loop for tiles of `width` tokens."""
        return SyncMainloop if smem_wgmma.multiplies_in_warps(self.facts, width) else WgmmaMainloop


class WgmmaKernel:
    """Callable for cute.compile: builds the launch of one KernelSpec."""

    def __init__(self, spec: KernelSpec) -> None:
        config = spec.config
        self.tile_m, self.tile_n, self.num_stages = config.tile.m, config.tile.n, config.num_stages
        self.groups = config.warps.m // 4
        self.cluster, self.split_k, self.widths = config.cluster, config.split_k, config.token_widths
        self.ctas = self.cluster * self.split_k
        self.box = smem_wgmma.token_box(config)
        self.producers = smem_wgmma.producer_warps(config)
        self.num_threads = config.num_threads
        self.min_ctas = config.min_ctas_per_sm
        self.overlap, self.prefetch = spec.overlap, spec.prefetch
        self.producer_registers = smem_wgmma.producer_registers(config)
        self.consumer_registers = smem_wgmma.consumer_registers(config)
        self.arrays = smem_wgmma.wgmma_arrays(config, spec.schemes, spec.max_experts)
        self.rows_per_feature = 2 if spec.swiglu else 1
        self.slots = [Slot(config, scheme, self.arrays, spec.swiglu, spec.prefetch) for scheme in spec.schemes]
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
        num_tokens = cute.size(y, mode=[0])
        atoms = []
        tensors = []
        mmas = []
        layouts = []
        for s in cutlass.range_constexpr(len(self.slots)):
            slot = self.slots[s]
            address = activations[ACTIVATION_ARGUMENT[slot.facts.activation]]
            atom, tensor = self.token_copy(slot, address, num_tokens, k)
            atoms.append(atom)
            tensors.append(tensor)
            layouts.append(slot.mainloops[-1].token_layout(self.tile_n, self.num_stages))
            mmas.append([loop.tiled_mma() for loop in slot.mainloops])
        self.kernel(y, offsets, plan, weights, activations, k, atoms, tensors, mmas, layouts).launch(
            grid=(grid, 1, 1),
            block=(self.num_threads, 1, 1),
            cluster=(self.ctas, 1, 1) if self.ctas > 1 else None,
            smem=self.arrays.total,
            stream=stream,
            min_blocks_per_mp=self.min_ctas,
            preferred_smem_carveout=100,
            use_pdl=self.overlap,
        )

    def token_copy(self, slot, address, num_tokens, k):
        """TMA of a box of tokens x one k-tile; rows past T and columns past K are filled with zeros."""
        kind = CODE_TYPE[slot.facts.math]
        columns, stride = k, (k + 7) // 8 * 8
        if slot.facts.activation is not ActivationKind.BF16:
            columns = stride = (k + (slot.facts.k_tile - 1)) // slot.facts.k_tile * slot.facts.k_tile
        pointer = cute.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=16)
        stride = cute.assume(Int64(stride), divby=128 // kind.width)
        x = cute.make_tensor(pointer, cute.make_layout((num_tokens, columns), stride=(stride, 1)))
        layout = cute.slice_(slot.mainloops[-1].token_layout(self.box, 1), (None, None, 0))
        if const_expr(self.cluster > 1):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, x, layout, (self.box, slot.facts.k_tile))

    @cute.kernel
    def kernel(
        self,
        y: cute.Tensor,
        offsets: cute.Tensor,
        plan: cute.Tensor,
        weights: cute.Tensor,
        activations: tuple,
        k: Int32,
        atoms: list,
        tensors: list,
        mmas: list,
        layouts: list,
    ):
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        group = cute.arch.make_warp_uniform(tid // 128)
        lane = tid % 32
        num_tokens = cute.size(y, mode=[0])
        num_features = cute.size(y, mode=[1]) * self.rows_per_feature
        units = (num_features + 63) // 64
        rows: cutlass.Constexpr = self.tile_m * self.cluster
        feature_tiles = (num_features + (rows - 1)) // rows
        base = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        start = Int32(base.toint())
        barriers = cute.recast_ptr(base + self.arrays.barriers, dtype=Int64)
        if tid == 0:
            for i in cutlass.range_constexpr(self.num_stages):
                cute.arch.mbarrier_init(barriers + i, 1)
                cute.arch.mbarrier_init(barriers + self.num_stages + i, 4 * self.groups * self.cluster)
            if const_expr(self.split_k > 1):
                self.slots[0].cluster_sums[-1].init(barriers + 2 * self.num_stages)
            cute.arch.mbarrier_init_fence()
        if const_expr(self.split_k > 1):
            cute.arch.cluster_arrive_relaxed()
        if const_expr(self.overlap and not self.prefetch):
            ptx.wait_for_kernel_ahead()
        table = start + self.arrays.table
        self.scheduler.build(table, tid, self.num_threads, offsets, plan, num_tokens, feature_tiles)
        weights_at = weights.iterator.toint()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
        if const_expr(self.ctas > 1):  # no barrier of another CTA is touched before it is there
            cute.arch.cluster_wait()
        if group == 0:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp < self.producers:
                turn = (warp, warp, Int32(1))
                first, walkers, rank, neighbour = self.place()
                num_tiles = self.scheduler.num_tiles(table)
                ahead = Int32(0)
                if const_expr(self.prefetch):
                    if first < num_tiles:
                        row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, first, feature_tiles)
                        feature_tile = feature_tile * self.cluster + neighbour
                        width = self.width(row, row_end)
                        for s in cutlass.range_constexpr(len(self.slots)):
                            if slot == s:
                                at = (row, width, feature_tile, index, weights_at + s * 32, k, units, rank)
                                ahead = self.slots[s].producer.prefetch(start, self.arrays, warp, at)
                    ptx.wait_for_kernel_ahead()
                for tile in cutlass.range(first, num_tiles, walkers, unroll=1):
                    row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, tile, feature_tiles)
                    feature_tile = feature_tile * self.cluster + neighbour
                    width = self.width(row, row_end)
                    for s in cutlass.range_constexpr(len(self.slots)):
                        if slot == s:
                            at = (row, width, feature_tile, index, weights_at + s * 32, k, units, rank)
                            turn = self.slots[s].producer.run(
                                base, start, self.arrays, barriers, turn, at, ahead, atoms[s], tensors[s], layouts[s]
                            )
                    ahead = Int32(0)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            if const_expr(self.prefetch):
                ptx.wait_for_kernel_ahead()
            stage = Int32(0)
            phase = Int32(0)
            turn = Int32(0)
            first, walkers, rank, neighbour = self.place()
            num_tiles = self.scheduler.num_tiles(table)
            for tile in cutlass.range(first, num_tiles, walkers, unroll=1):
                row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, tile, feature_tiles)
                feature_tile = feature_tile * self.cluster + neighbour
                width = self.width(row, row_end)
                for s in cutlass.range_constexpr(len(self.slots)):
                    for v in cutlass.range_constexpr(len(self.slots[s].mainloops)):
                        if slot == s and width == self.slots[s].mainloops[v].tile_n:
                            slot_at = weights_at + s * 32
                            at = (row, row_end, feature_tile, index, slot_at, (k, rank), units)
                            ring = (base, start, barriers, stage, phase, turn)
                            stage, phase = self.run_tile(s, v, ring, at, mmas[s][v], layouts[s], y, activations, tid)
                turn ^= 1
            if const_expr(self.split_k > 1):
                self.slots[0].cluster_sums[-1].finish(barriers + 2 * self.num_stages, rank, turn)
        if const_expr(self.cluster > 1):  # nor after it is gone
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def place(self):
        """(first tile, tiles from one to the next, rank in the cluster, and the same if it means a feature tile). Each
        role asks itself: what is alive in both, ptxas spills.
        """
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        first, walkers, rank = block, blocks, Int32(0)
        if const_expr(self.ctas > 1):  # a cluster walks the tiles together, each CTA its feature tile or part of each
            first, walkers, rank = block // self.ctas, blocks // self.ctas, block % self.ctas
        return first, walkers, rank, rank if const_expr(self.cluster > 1) else Int32(0)

    @cute.jit
    def width(self, row, row_end):
        """Tokens that a tile multiplies."""
        width = Int32(self.tile_n)
        for narrower in cutlass.range_constexpr(len(self.widths) - 2, -1, -1):
            if row_end - row <= self.widths[narrower]:
                width = Int32(self.widths[narrower])
        return width

    @cute.jit
    def run_tile(self, s: cutlass.Constexpr, v: cutlass.Constexpr, ring, at, mma, layout, y, activations, tid):
        """One tile of slot s and width v: k loop, sum over the parts, epilogue. Returns the ring's next stage and
        phase.
        """
        slot = self.slots[s]
        base, start, barriers, stage, phase, turn = ring
        tokens = Int64(0)
        if const_expr(slot.token_scales):
            tokens = activations[ACTIVATION_ARGUMENT[slot.facts.activation] + 1]
        scales = slot.epilogues[v].fetch(at, tokens, tid)
        acc, stage, phase = slot.mainloops[v].run(
            base, start, self.arrays, self.num_stages, stage, phase, at, mma, layout, tid
        )
        output, token_scales = start + self.arrays.output, start + self.arrays.token_scales
        if const_expr(self.split_k == 1):
            slot.epilogues[v].run(acc, scales, output, token_scales, tid, at, y)
        else:
            row, row_end, _, _, _, (_, part), _ = at
            sums, full = start + self.arrays.partial_sums, barriers + 2 * self.num_stages
            slot.cluster_sums[v].run(acc, sums, full, part, turn, row_end - row, tid)
            if part == self.split_k - 1:
                slot.epilogues[v].run(acc, scales, output, token_scales, tid, at, y)
        return stage, phase


def entry(spec: KernelSpec):
    """(callable, fake arguments) for cute.compile."""
    tokens, features, experts = cute.sym_int(), cute.sym_int(divisibility=8), cute.sym_int()
    return WgmmaKernel(spec), (
        make_fake_compact_tensor(BFloat16, (tokens, features), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        make_fake_compact_tensor(Int32, (experts, 4), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int64, (len(spec.schemes), 4), stride_order=(1, 0), assumed_align=16),
        *[Int64(0)] * 7,
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
