"""The smallest kernel with the wgmma family's pipeline: one warp fills stages by bulk copies, another reads them, two
mbarriers a stage order both.

It is right by construction, so what racecheck reports of it, racecheck reports of any such pipeline: the control for
its verdict on the wgmma family (tests/run_sanitizer.py).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen.kernels import ptx

STAGES, STAGE_BYTES, THREADS = 2, 512, 64
WORDS = STAGE_BYTES // 4


class BulkPipeline:
    """y[word] = sum over blocks of x[block, word], int32: blocks of 128 words pass through a ring of two stages."""

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream):
        self.kernel(x, y).launch(grid=(1, 1, 1), block=(THREADS, 1, 1), smem=2048, stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        base = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        start = Int32(base.toint())
        barriers = cute.recast_ptr(base + STAGES * STAGE_BYTES, dtype=Int64)
        if tid == 0:
            for i in cutlass.range_constexpr(STAGES):
                cute.arch.mbarrier_init(barriers + i, 1)
                cute.arch.mbarrier_init(barriers + STAGES + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        blocks = cute.size(x, mode=[0])
        if warp == 0:
            for block in cutlass.range(blocks, unroll=1):
                stage = block % STAGES
                cute.arch.mbarrier_wait(barriers + STAGES + stage, (block // STAGES + 1) % 2)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(barriers + stage, STAGE_BYTES)
                    source = x.iterator.toint() + Int64(block) * STAGE_BYTES
                    full = start + STAGES * STAGE_BYTES + stage * 8
                    ptx.bulk_load(start + stage * STAGE_BYTES, source, Int32(STAGE_BYTES), full)
        else:
            sums = cute.make_rmem_tensor((4,), Int32)
            sums.fill(0)
            for block in cutlass.range(blocks, unroll=1):
                stage = block % STAGES
                cute.arch.mbarrier_wait(barriers + stage, block // STAGES % 2)
                got = ptx.lds128(start + stage * STAGE_BYTES + lane * 16)
                for i in cutlass.range_constexpr(4):
                    sums[i] = sums[i] + got[i]
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(barriers + STAGES + stage)
            for i in cutlass.range_constexpr(4):
                y[lane * 4 + i] = sums[i]


def compiled(arch: str = "sm_90a"):
    """The kernel, callable on torch tensors x int32 [blocks, 128] and y int32 [128]."""
    arguments = (
        make_fake_compact_tensor(Int32, (cute.sym_int(), WORDS), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int32, (WORDS,), assumed_align=16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    return cute.compile(BulkPipeline(), *arguments, options=f"--enable-tvm-ffi --gpu-arch {arch}")
