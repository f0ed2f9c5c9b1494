"""The second GEMM's rows to tokens: each token's rows times the router's weights, added in float32 in the router's
order, rounded once. A thread takes 8 columns of a token; a row from the last offset on is nobody's and adds nothing.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from kernel_gen.kernels.steps import ptx
from kernel_gen.kernels.steps.rows import Rows
from kernel_gen.kernels.steps.spec import VECTOR, CombineSpec


class CombineKernel:
    """Callable for cute.compile."""

    def __init__(self, spec: CombineSpec) -> None:
        self.overlap = spec.overlap
        self.threads, self.top_k, self.aligned = spec.threads, spec.top_k, spec.aligned
        self.weight_bits = spec.weight_bits
        self.rows = Rows(spec.threads, 1, spec.aligned)

    @cute.jit
    def __call__(
        self,
        offsets: cute.Tensor,
        y: Int64,
        stride: Int32,
        positions: Int64,
        weights: Int64,
        out: Int64,
        tokens: Int32,
        width: Int32,
        stream: cuda.CUstream,
    ):
        parts = (width + (VECTOR * self.threads - 1)) // (VECTOR * self.threads)
        self.kernel(offsets, y, stride, positions, weights, out, width, parts).launch(
            grid=(tokens * parts, 1, 1), block=(self.threads, 1, 1), stream=stream, use_pdl=self.overlap
        )

    @cute.kernel
    def kernel(
        self,
        offsets: cute.Tensor,
        y: Int64,
        stride: Int32,
        positions: Int64,
        weights: Int64,
        out: Int64,
        width: Int32,
        parts: Int32,
    ):
        ptx.begin(self.overlap)
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        token = block // parts
        column = ((block - token * parts) * self.threads + tid) * VECTOR
        num_rows = offsets[cute.size(offsets, mode=[0]) - 1]
        if column < width:
            places, factors, values = [], [], []
            for j in cutlass.range_constexpr(self.top_k):
                index = token * self.top_k + j
                places.append(ptx.ldg32(positions + Int64(index) * 4))
                factors.append(self.factor(weights, index))
            for j in cutlass.range_constexpr(self.top_k):
                left = cutlass.select_(places[j] < num_rows, width, Int32(0))
                values.append(self.rows.load_vector(y + Int64(places[j]) * stride * 2, left, column))
            sums = [Float32(0.0)] * VECTOR
            for j in cutlass.range_constexpr(self.top_k):
                factor = cutlass.select_(places[j] < num_rows, factors[j], Float32(0.0))
                for i in cutlass.range_constexpr(VECTOR):
                    word = values[j][i // 2]
                    bits = word << 16 if i % 2 == 0 else word & Int32(-65536)
                    sums[i] = ptx.add(sums[i], ptx.multiply(ptx.bits_to_f32(bits), factor))
            self.store(out + (Int64(token) * width + column) * 2, width - column, sums)

    def factor(self, weights, index):
        """A router's weight in float32."""
        if self.weight_bits == 16:
            return ptx.ldg_bf16_as_f32(weights + Int64(index) * 2)
        return ptx.ldg_f32(weights + Int64(index) * 4)

    def store(self, address, left, sums):
        words = [ptx.pack_bf16(sums[i], sums[i + 1]) for i in range(0, VECTOR, 2)]
        if self.aligned:
            ptx.stg_words_if(address, left, words)
        else:
            for i in range(VECTOR):
                ptx.stg16_if(address, left, i, words[i // 2], high=i % 2 == 1)


def entry(spec: CombineSpec):
    """(callable, fake arguments) for cute.compile."""
    return CombineKernel(spec), (
        make_fake_compact_tensor(Int32, (cute.sym_int(),), assumed_align=4),
        Int64(0),
        Int32(0),
        *[Int64(0)] * 3,
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
