"""Expert ids to places in expert order: a stable counting sort, the same on every run.

`count`: how many ids of each expert a CTA's chunk has. `place`: every CTA adds the counts of all chunks to the experts'
offsets, and those of the chunks before its own to where its ids of an expert begin; its warps then rank their ids. An
id that is no expert's counts as expert E, behind all others.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen.kernels.steps import ptx
from kernel_gen.kernels.steps.spec import CHUNK, MAX_EXPERTS, CountSpec, PlaceSpec

THREADS = 256
WARPS = THREADS // 32
WARP_IDS = CHUNK // WARPS


def id_type(id_bits: int):
    return {32: Int32, 64: Int64}[id_bits]


def id_at(ids_at, index, num_experts, id_bits):
    """An expert's id, num_experts if it is none."""
    if id_bits == 64:
        return ptx.known_expert_64(ptx.ldg64(ids_at + Int64(index) * 8), num_experts)
    return ptx.known_expert_32(ptx.ldg32(ids_at + Int64(index) * 4), num_experts)


@cute.jit
def exclusive_scan(base, size, lane):
    """One warp turns the `size` words at `base`, in shared memory, into the sums of those before each."""
    per_lane = (size + 31) // 32
    begin = cutlass.min(lane * per_lane, size)
    end = cutlass.min(begin + per_lane, size)
    mine = Int32(0)
    for i in cutlass.range(begin, end, unroll=1):
        mine += ptx.lds32(base + i * 4)
    total = mine
    for step in cutlass.range_constexpr(5):
        other = ptx.shuffle_up(total, 1 << step)
        if lane >= (1 << step):
            total += other
    running = total - mine
    for i in cutlass.range(begin, end, unroll=1):
        value = ptx.lds32(base + i * 4)
        ptx.sts32(base + i * 4, running)
        running += value


class CountKernel:
    """Callable for cute.compile. counts: int32 [chunks, E + 1]."""

    def __init__(self, spec: CountSpec) -> None:
        self.id_bits, self.overlap = spec.id_bits, spec.overlap

    @cute.jit
    def __call__(self, ids: cute.Tensor, counts: Int64, num_experts: Int32, stream: cuda.CUstream):
        chunks = (cute.size(ids, mode=[0]) + (CHUNK - 1)) // CHUNK
        self.kernel(ids, counts, num_experts).launch(
            grid=(chunks, 1, 1), block=(THREADS, 1, 1), smem=4 * (MAX_EXPERTS + 1), stream=stream, use_pdl=self.overlap
        )

    @cute.kernel
    def kernel(self, ids: cute.Tensor, counts: Int64, num_experts: Int32):
        ptx.begin(self.overlap)
        tid, _, _ = cute.arch.thread_idx()
        chunk, _, _ = cute.arch.block_idx()
        table = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        num_ids = cute.size(ids, mode=[0])
        for e in cutlass.range(tid, num_experts + 1, THREADS, unroll=1):
            ptx.sts32(table + e * 4, Int32(0))
        cute.arch.sync_threads()
        for step in cutlass.range_constexpr(CHUNK // THREADS):
            i = chunk * CHUNK + step * THREADS + tid
            if i < num_ids:
                ptx.add_shared(table + id_at(ids.iterator.toint(), i, num_experts, self.id_bits) * 4, Int32(1))
        cute.arch.sync_threads()
        for e in cutlass.range(tid, num_experts + 1, THREADS, unroll=1):
            ptx.stg32(counts + (Int64(chunk) * (num_experts + 1) + e) * 4, ptx.lds32(table + e * 4))


class PlaceKernel:
    """Callable for cute.compile. positions: int32, one an id; offsets: int32 [E + 1]."""

    def __init__(self, spec: PlaceSpec) -> None:
        self.id_bits, self.overlap = spec.id_bits, spec.overlap
        self.bins = MAX_EXPERTS + 2  # one for ids of no expert, one for what is past the last id

    @cute.jit
    def __call__(
        self,
        ids: cute.Tensor,
        counts: Int64,
        positions: Int64,
        offsets: Int64,
        num_experts: Int32,
        stream: cuda.CUstream,
    ):
        chunks = (cute.size(ids, mode=[0]) + (CHUNK - 1)) // CHUNK
        self.kernel(ids, counts, positions, offsets, num_experts).launch(
            grid=(chunks, 1, 1),
            block=(THREADS, 1, 1),
            smem=4 * self.bins * (WARPS + 2),
            stream=stream,
            use_pdl=self.overlap,
        )

    @cute.kernel
    def kernel(self, ids: cute.Tensor, counts: Int64, positions: Int64, offsets: Int64, num_experts: Int32):
        ptx.begin(self.overlap)
        tid, _, _ = cute.arch.thread_idx()
        chunk, _, _ = cute.arch.block_idx()
        chunks, _, _ = cute.arch.grid_dim()
        lane = tid % 32
        starts = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        before = starts + self.bins * 4
        warp_bins = before + (1 + tid // 32) * self.bins * 4
        ids_at = ids.iterator.toint()
        num_ids = cute.size(ids, mode=[0])
        size = num_experts + 1
        first = chunk * CHUNK + tid // 32 * WARP_IDS + lane
        self.add_chunks(counts, starts, before, size, chunk, chunks, tid)
        for e in cutlass.range(lane, size + 1, 32, unroll=1):
            ptx.sts32(warp_bins + e * 4, Int32(0))
        cute.arch.sync_warp()
        experts = []
        for step in cutlass.range_constexpr(WARP_IDS // 32):
            expert = size
            if first + step * 32 < num_ids:
                expert = id_at(ids_at, first + step * 32, num_experts, self.id_bits)
            ptx.add_shared(warp_bins + expert * 4, Int32(1))
            experts.append(expert)
        cute.arch.sync_threads()
        if tid < 32:
            exclusive_scan(starts, size, tid)
        cute.arch.sync_threads()
        for e in cutlass.range(tid, size, THREADS, unroll=1):
            running = ptx.lds32(starts + e * 4)
            if chunk == 0:
                ptx.stg32(offsets + Int64(e) * 4, running)
            running += ptx.lds32(before + e * 4)
            for warp in cutlass.range_constexpr(WARPS):
                at = before + ((1 + warp) * self.bins + e) * 4
                count = ptx.lds32(at)
                ptx.sts32(at, running)
                running += count
        cute.arch.sync_threads()
        for step in cutlass.range_constexpr(WARP_IDS // 32):
            like, rank = ptx.lanes_like(experts[step], lane)
            at = warp_bins + experts[step] * 4
            base = ptx.lds32(at)
            cute.arch.sync_warp()
            if rank == 0:
                ptx.sts32(at, base + like)
            cute.arch.sync_warp()
            if first + step * 32 < num_ids:
                ptx.stg32(positions + Int64(first + step * 32) * 4, base + rank)

    @cute.jit
    def add_chunks(self, counts, starts, before, size, chunk, chunks, tid):
        """Each expert's ids in all chunks, and in those before this one."""
        for e in cutlass.range(tid, size, THREADS, unroll=1):
            total = Int32(0)
            earlier = Int32(0)
            for c in cutlass.range(0, chunks, unroll=8):
                count = ptx.ldg32(counts + (Int64(c) * size + e) * 4)
                if c < chunk:
                    earlier += count
                total += count
            ptx.sts32(starts + e * 4, total)
            ptx.sts32(before + e * 4, earlier)


def entry(spec: CountSpec | PlaceSpec):
    """(callable, fake arguments) for cute.compile."""
    ids = make_fake_compact_tensor(id_type(spec.id_bits), (cute.sym_int(),), assumed_align=spec.id_bits // 8)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    if isinstance(spec, CountSpec):
        return CountKernel(spec), (ids, Int64(0), Int32(0), stream)
    return PlaceKernel(spec), (ids, *[Int64(0)] * 3, Int32(0), stream)
