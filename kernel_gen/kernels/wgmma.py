"""The `wgmma` family: a persistent grouped GEMM for sm_90a, up to four schemes in one launch.

One warp of a producer warpgroup walks the tiles and fills stages: packed weights and strips by bulk copies, tokens by
TMA. Consumer warpgroups turn packed words into A fragments in registers and multiply with wgmma (weights from
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
from kernel_gen.kernels.loads import ACTIVATION_ARGUMENT
from kernel_gen.kernels.scheduler import TileScheduler
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.kernels.wgmma_epilogue import WgmmaEpilogue
from kernel_gen.kernels.wgmma_mainloop import CODE_TYPE, WgmmaMainloop
from kernel_gen.kernels.wgmma_producer import Producer
from kernel_gen.layouts import ActivationKind, layout_of

CONSUMER_BARRIER = 1


class Slot:
    """The units of one scheme in this kernel."""

    def __init__(self, spec: KernelSpec, scheme) -> None:
        config = spec.config
        self.facts = layout_of(scheme)
        self.producer = Producer(self.facts, config.tile.m, config.tile.n)
        self.mainloop = WgmmaMainloop(self.facts, config.tile.m, config.tile.n, config.warps.m // 4)
        token_scales = self.facts.activation in (ActivationKind.INT8, ActivationKind.E4M3)
        self.epilogue = WgmmaEpilogue(
            config.tile.m,
            config.tile.n,
            config.warps.m // 4,
            self.facts.has_channel_scales,
            token_scales,
            self.mainloop.extra_scale,
        )


class WgmmaKernel:
    """Callable for cute.compile: builds the launch of one KernelSpec."""

    def __init__(self, spec: KernelSpec) -> None:
        config = spec.config
        self.tile_m, self.tile_n, self.num_stages = config.tile.m, config.tile.n, config.num_stages
        self.groups = config.warps.m // 4
        self.num_threads = config.num_threads
        self.min_ctas = config.min_ctas_per_sm
        self.producer_registers = smem_wgmma.producer_registers(config)
        self.consumer_registers = smem_wgmma.consumer_registers(config)
        self.slots = [Slot(spec, scheme) for scheme in spec.schemes]
        self.arrays = smem_wgmma.wgmma_arrays(config, spec.schemes, spec.max_experts)
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
            layout = slot.mainloop.token_layout(self.num_stages)
            address = activations[ACTIVATION_ARGUMENT[slot.facts.activation]]
            atom, tensor = self.token_copy(slot, layout, address, num_tokens, k)
            atoms.append(atom)
            tensors.append(tensor)
            layouts.append(layout)
            mmas.append(slot.mainloop.tiled_mma())
        self.kernel(y, offsets, plan, weights, activations, k, atoms, tensors, mmas, layouts).launch(
            grid=(grid, 1, 1),
            block=(self.num_threads, 1, 1),
            smem=self.arrays.total,
            stream=stream,
            min_blocks_per_mp=self.min_ctas,
            preferred_smem_carveout=100,
        )

    def token_copy(self, slot, layout, address, num_tokens, k):
        """TMA of tile_n tokens x one k-tile; rows past T and columns past K are filled with zeros."""
        kind = CODE_TYPE[slot.facts.math]
        columns, stride = k, (k + 7) // 8 * 8
        if slot.facts.activation is not ActivationKind.BF16:
            columns = stride = (k + (slot.facts.k_tile - 1)) // slot.facts.k_tile * slot.facts.k_tile
        pointer = cute.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=16)
        stride = cute.assume(Int64(stride), divby=128 // kind.width)
        x = cute.make_tensor(pointer, cute.make_layout((num_tokens, columns), stride=(stride, 1)))
        return cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(), x, cute.slice_(layout, (None, None, 0)), (self.tile_n, slot.facts.k_tile)
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
        atoms: list,
        tensors: list,
        mmas: list,
        layouts: list,
    ):
        tid, _, _ = cute.arch.thread_idx()
        first, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(tid // 32)
        group = cute.arch.make_warp_uniform(tid // 128)
        lane = tid % 32
        num_tokens = cute.size(y, mode=[0])
        num_features = cute.size(y, mode=[1])
        units = (num_features + 63) // 64
        feature_tiles = (num_features + (self.tile_m - 1)) // self.tile_m
        base = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        start = Int32(base.toint())
        barriers = cute.recast_ptr(base + self.arrays.barriers, dtype=Int64)
        if tid == 0:
            for i in cutlass.range_constexpr(self.num_stages):
                cute.arch.mbarrier_init(barriers + i, 1)
                cute.arch.mbarrier_init(barriers + self.num_stages + i, 4 * self.groups)
            cute.arch.mbarrier_init_fence()
        table = start + self.arrays.table
        num_tiles = self.scheduler.build(table, tid, self.num_threads, offsets, plan, num_tokens, feature_tiles)
        weights_at = weights.iterator.toint()
        stage = Int32(0)
        if group == 0:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp == 0:
                phase = Int32(1)
                for tile in cutlass.range(first, num_tiles, ctas, unroll=1):
                    row, _, feature_tile, slot, index = self.scheduler.find(table, lane, tile, feature_tiles)
                    for s in cutlass.range_constexpr(len(self.slots)):
                        if slot == s:
                            at = (row, feature_tile, index, weights_at + s * 32, k, units)
                            stage, phase = self.slots[s].producer.run(
                                base,
                                start,
                                self.arrays,
                                barriers,
                                self.num_stages,
                                stage,
                                phase,
                                at,
                                atoms[s],
                                tensors[s],
                                layouts[s],
                            )
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            phase = Int32(0)
            for tile in cutlass.range(first, num_tiles, ctas, unroll=1):
                row, row_end, feature_tile, slot, index = self.scheduler.find(table, lane, tile, feature_tiles)
                for s in cutlass.range_constexpr(len(self.slots)):
                    if slot == s:
                        slot_at = weights_at + s * 32
                        at = (row, row_end, feature_tile, index, slot_at, k, units)
                        stage, phase = self.run_tile(
                            s, base, start, barriers, stage, phase, at, mmas[s], layouts[s], y, activations, tid
                        )
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def run_tile(self, s: cutlass.Constexpr, base, start, barriers, stage, phase, at, mma, layout, y, activations, tid):
        """One tile of slot s: k loop, epilogue. Returns the ring's next stage and phase."""
        slot = self.slots[s]
        acc, stage, phase = slot.mainloop.run(
            base, start, self.arrays, barriers, self.num_stages, stage, phase, at, mma, layout, tid
        )
        tokens = Int64(0)
        if const_expr(slot.epilogue.token_scales):
            tokens = activations[ACTIVATION_ARGUMENT[slot.facts.activation] + 1]
        slot.epilogue.run(acc, start + self.arrays.output, tid, at, y, tokens, CONSUMER_BARRIER)
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
