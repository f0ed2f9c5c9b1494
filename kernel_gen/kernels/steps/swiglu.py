"""silu(gate) * up of each row, rounded once to bf16, in the forms that the second GEMM reads. A CTA takes one row."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen.kernels.steps import ptx
from kernel_gen.kernels.steps.rows import MAX_WARPS, Form, Rows
from kernel_gen.kernels.steps.spec import FORMAT_CODE, SwigluSpec
from kernel_gen.layouts import ActivationKind


class SwigluKernel:
    """Callable for cute.compile. Rows from the last offset on are nobody's and left alone."""

    def __init__(self, spec: SwigluSpec) -> None:
        self.overlap = spec.overlap
        self.gated, self.by_row = spec.gated, spec.by_row
        self.rows = Rows(spec.threads, spec.vectors, spec.aligned)
        self.forms = [Form(kind, self.rows) for kind in spec.kinds]
        self.writes_bf16 = ActivationKind.BF16 in spec.kinds
        self.needs_largest = any(form.is_quantized and not form.by_group for form in self.forms)

    @cute.jit
    def __call__(
        self,
        offsets: cute.Tensor,
        gate_up: Int64,
        stride: Int32,
        row_formats: Int64,
        x_bf16: Int64,
        x_int8: Int64,
        sx_int8: Int64,
        x_e4m3: Int64,
        sx_e4m3: Int64,
        x_int4: Int64,
        sx_int4: Int64,
        num_rows: Int32,
        width: Int32,
        stream: cuda.CUstream,
    ):
        addresses = (x_bf16, x_int8, sx_int8, x_e4m3, sx_e4m3, x_int4, sx_int4)
        self.kernel(offsets, gate_up, stride, row_formats, addresses, width).launch(
            grid=(num_rows, 1, 1),
            block=(self.rows.threads, 1, 1),
            smem=4 * MAX_WARPS,
            stream=stream,
            use_pdl=self.overlap,
        )

    @cute.kernel
    def kernel(
        self,
        offsets: cute.Tensor,
        gate_up: Int64,
        stride: Int32,
        row_formats: Int64,
        addresses: tuple[Int64, Int64, Int64, Int64, Int64, Int64, Int64],
        width: Int32,
    ):
        ptx.begin(self.overlap)
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        scratch = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=128).toint())
        wanted = Int32(0)
        if const_expr(self.by_row):
            wanted = (ptx.ldg32(row_formats + Int64(row) * 4) >> 8) & 255
        if row < offsets[cute.size(offsets, mode=[0]) - 1]:
            if const_expr(self.by_row and not self.writes_bf16):
                if wanted != FORMAT_CODE[ActivationKind.BF16]:
                    self.take(row, gate_up + Int64(row) * stride * 2, width, wanted, addresses, scratch, tid)
            else:
                self.take(row, gate_up + Int64(row) * stride * 2, width, wanted, addresses, scratch, tid)

    @cute.jit
    def take(self, row, source, width, wanted, addresses, scratch, tid):
        """One row, read at `source`."""
        product = self.rows.load(source, width, tid)
        if const_expr(self.gated):
            product = self.product(product, self.rows.load(source + Int64(width) * 2, width, tid))
        largest = Int32(0)
        if const_expr(self.needs_largest):
            largest, _ = self.rows.reduce(self.rows.thread_largest(product), [], scratch, tid)
        for f in cutlass.range_constexpr(len(self.forms)):
            if const_expr(not self.by_row):
                codes, scales = self.forms[f].quantize(product, largest)
                self.forms[f].store(codes, scales, row, width, addresses, tid)
            else:
                if wanted == self.forms[f].code:
                    codes, scales = self.forms[f].quantize(product, largest)
                    self.forms[f].store(codes, scales, row, width, addresses, tid)

    def product(self, gate, up):
        """Vector by vector."""
        return [[self.pair(a, b) for a, b in zip(*words, strict=True)] for words in zip(gate, up, strict=True)]

    def pair(self, gate, up):
        """Two values of the product."""
        halves = []
        for of in (lambda word: word << 16, lambda word: word & Int32(-65536)):
            halves.append(ptx.silu(ptx.bits_to_f32(of(gate))) * ptx.bits_to_f32(of(up)))
        return ptx.pack_bf16(halves[0], halves[1])


def entry(spec: SwigluSpec):
    """(callable, fake arguments) for cute.compile."""
    return SwigluKernel(spec), (
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        Int64(0),
        Int32(0),
        *[Int64(0)] * 8,
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
