"""Tokens to their places in expert order, in the forms that the first GEMM reads. A CTA takes one token: reads it once,
quantises it once a form, and writes it to each of its top_k places.

With `ranks`, for few tokens, the routing is worked out here too: an id's place is the number of ids before it in expert
order, which every CTA counts for its own token; one more CTA makes the experts' offsets. An id that is no expert's goes
behind all others.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen.kernels.steps import ptx
from kernel_gen.kernels.steps.route import exclusive_scan, id_at, id_type
from kernel_gen.kernels.steps.rows import MAX_WARPS, Form, Rows
from kernel_gen.kernels.steps.spec import MAX_EXPERTS, GatherSpec


class GatherKernel:
    """Callable for cute.compile."""

    def __init__(self, spec: GatherSpec) -> None:
        self.overlap = spec.overlap
        self.top_k, self.id_bits = spec.top_k, spec.id_bits
        self.ranks, self.writes_formats = spec.ranks, spec.writes_formats
        self.rows = Rows(spec.threads, spec.vectors, spec.aligned)
        self.forms = [Form(kind, self.rows) for kind in spec.kinds]
        self.needs_largest = any(form.is_quantized and not form.by_group for form in self.forms)
        self.needs_formats = len(self.forms) > 1 or self.writes_formats
        words = (1 + spec.top_k) * MAX_WARPS
        self.smem_bytes = 4 * (max(words, MAX_EXPERTS + 2) if self.ranks else words)

    @cute.jit
    def __call__(
        self,
        ids: cute.Tensor,
        hidden: Int64,
        hidden_stride: Int32,
        positions: Int64,
        offsets: Int64,
        formats: Int64,
        row_formats: Int64,
        x_bf16: Int64,
        x_int8: Int64,
        sx_int8: Int64,
        x_e4m3: Int64,
        sx_e4m3: Int64,
        x_int4: Int64,
        sx_int4: Int64,
        num_experts: Int32,
        width: Int32,
        stream: cuda.CUstream,
    ):
        addresses = (x_bf16, x_int8, sx_int8, x_e4m3, sx_e4m3, x_int4, sx_int4)
        tokens = cute.size(ids, mode=[0])
        self.kernel(
            ids, hidden, hidden_stride, positions, offsets, formats, row_formats, addresses, num_experts, width
        ).launch(
            grid=(tokens + (1 if self.ranks else 0), 1, 1),
            block=(self.rows.threads, 1, 1),
            smem=self.smem_bytes,
            stream=stream,
            use_pdl=self.overlap,
        )

    @cute.kernel
    def kernel(
        self,
        ids: cute.Tensor,
        hidden: Int64,
        hidden_stride: Int32,
        positions: Int64,
        offsets: Int64,
        formats: Int64,
        row_formats: Int64,
        addresses: tuple[Int64, Int64, Int64, Int64, Int64, Int64, Int64],
        num_experts: Int32,
        width: Int32,
    ):
        ptx.begin(self.overlap)
        tid, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        scratch = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        ids_at = ids.iterator.toint()
        tokens = cute.size(ids, mode=[0])
        what = (ids_at, tokens, hidden, hidden_stride, positions, formats, row_formats, addresses, num_experts, width)
        if const_expr(self.ranks):
            if token == tokens:
                self.make_offsets(ids_at, tokens * self.top_k, num_experts, offsets, scratch, tid)
            else:
                self.move(token, what, scratch, tid)
        else:
            self.move(token, what, scratch, tid)

    @cute.jit
    def move(self, token, what, scratch, tid):
        """One token to its places."""
        ids_at, tokens, hidden, hidden_stride, positions, formats, row_formats, addresses, num_experts, width = what
        row = self.rows.load(hidden + Int64(token) * hidden_stride * 2, width, tid)
        first = token * self.top_k
        experts = []
        if const_expr(self.ranks or self.needs_formats):
            for j in cutlass.range_constexpr(self.top_k):
                experts.append(id_at(ids_at, first + j, num_experts, self.id_bits))
        ranks = []
        if const_expr(self.ranks):
            ranks = self.count_before(experts, ids_at, first, tokens * self.top_k, num_experts, tid)
        largest = Int32(0)
        if const_expr(self.needs_largest):
            largest = self.rows.thread_largest(row)
        places = []
        if const_expr(self.needs_largest or self.ranks):
            largest, places = self.rows.reduce(largest, ranks, scratch, tid)
        if const_expr(self.ranks):
            if tid == 0:
                for j in cutlass.range_constexpr(self.top_k):
                    ptx.stg32(positions + Int64(first + j) * 4, places[j])
        else:
            places = []
            for j in cutlass.range_constexpr(self.top_k):
                places.append(ptx.ldg32(positions + Int64(first + j) * 4))
        wanted = []
        if const_expr(self.needs_formats):
            for j in cutlass.range_constexpr(self.top_k):
                wanted.append(ptx.ldg32(formats + Int64(experts[j]) * 4))
            if const_expr(self.writes_formats):
                if tid == 0:
                    for j in cutlass.range_constexpr(self.top_k):
                        ptx.stg32(row_formats + Int64(places[j]) * 4, wanted[j])
        for f in cutlass.range_constexpr(len(self.forms)):
            codes, scales = self.forms[f].quantize(row, largest)
            for j in cutlass.range_constexpr(self.top_k):
                if const_expr(len(self.forms) == 1):
                    self.forms[f].store(codes, scales, places[j], width, addresses, tid)
                else:
                    if (wanted[j] & 255) == self.forms[f].code:
                        self.forms[f].store(codes, scales, places[j], width, addresses, tid)

    @cute.jit
    def count_before(self, experts, ids_at, first, num_ids, num_experts, tid):
        """This thread's part of how many ids stand before each of the token's own, in expert order, then by place."""
        counts = cute.make_rmem_tensor((self.top_k,), Int32)
        counts.fill(0)
        for i in cutlass.range(tid, num_ids, self.rows.threads, unroll=4):
            key = id_at(ids_at, i, num_experts, self.id_bits) * num_ids + i
            for j in cutlass.range_constexpr(self.top_k):
                counts[j] = counts[j] + ptx.is_less(key, experts[j] * num_ids + (first + j))
        return [counts[j] for j in range(self.top_k)]

    @cute.jit
    def make_offsets(self, ids_at, num_ids, num_experts, offsets, scratch, tid):
        """The experts' offsets, by one CTA."""
        for e in cutlass.range(tid, num_experts + 1, self.rows.threads, unroll=1):
            ptx.sts32(scratch + e * 4, Int32(0))
        cute.arch.sync_threads()
        for i in cutlass.range(tid, num_ids, self.rows.threads, unroll=4):
            ptx.add_shared(scratch + id_at(ids_at, i, num_experts, self.id_bits) * 4, Int32(1))
        cute.arch.sync_threads()
        if tid < 32:
            exclusive_scan(scratch, num_experts + 1, tid)
        cute.arch.sync_threads()
        for e in cutlass.range(tid, num_experts + 1, self.rows.threads, unroll=1):
            ptx.stg32(offsets + Int64(e) * 4, ptx.lds32(scratch + e * 4))


def entry(spec: GatherSpec):
    """(callable, fake arguments) for cute.compile."""
    ids = make_fake_compact_tensor(id_type(spec.id_bits), (cute.sym_int(), spec.top_k), stride_order=(1, 0))
    return GatherKernel(spec), (
        ids,
        Int64(0),
        Int32(0),
        *[Int64(0)] * 4,
        *[Int64(0)] * 7,
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
