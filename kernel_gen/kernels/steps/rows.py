"""A CTA holds one row in registers, each thread `vectors` vectors of 8 values as packed bf16 pairs: vector i of thread
t covers columns 8 * (t + i * threads) and on.

Quantising is kernel_gen.formats.activations', bit for bit: scale = largest / limit, at least 2^-126; code = value /
scale, rounded to nearest, ties to even.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from kernel_gen.kernels.steps import ptx
from kernel_gen.kernels.steps.spec import FORMAT_CODE, VECTOR
from kernel_gen.layouts import ACTIVATION_ARGUMENT, X_K_MULTIPLE, ActivationKind

LIMIT = {
    ActivationKind.INT8: 127.0,
    ActivationKind.E4M3: 448.0,
    ActivationKind.INT4: 7.0,
    ActivationKind.INT4_GROUP: 7.0,
}
MIN_SCALE_BITS = 0x00800000
"""2^-126 in float32. Positive floats are ordered as their bits, and NaN's are the largest."""
BITS = {ActivationKind.BF16: 16, ActivationKind.INT8: 8, ActivationKind.E4M3: 8}
MAX_WARPS = 32


class Rows:
    """How rows lie over a CTA's threads."""

    def __init__(self, threads: int, vectors: int, aligned: bool) -> None:
        self.threads, self.vectors, self.aligned = threads, vectors, aligned
        self.warps = threads // 32

    def column(self, tid, i):
        """The first column of a thread's vector i."""
        return (tid + i * self.threads) * VECTOR

    def load(self, row, width, tid):
        """The row at this address, zeros past its width: [vectors][4] words."""
        return [self.load_vector(row, width, self.column(tid, i)) for i in range(self.vectors)]

    def load_vector(self, row, width, column):
        address, left = row + Int64(column) * 2, width - column
        if self.aligned:
            return list(ptx.ldg128_if(address, left))
        halves = [ptx.ldg16_if(address, left, i) for i in range(VECTOR)]
        return [halves[i] | (halves[i + 1] << 16) for i in range(0, VECTOR, 2)]

    def largest_bits(self, words):
        """The largest magnitude in these words, as the bits of a float32."""
        largest = Int32(0)
        for word in words:
            largest = cutlass.max(largest, (word << 16) & Int32(0x7FFFFFFF))
            largest = cutlass.max(largest, word & Int32(0x7FFF0000))
        return largest

    def thread_largest(self, row):
        """This thread's part of a row's largest magnitude."""
        largest = Int32(0)
        for words in row:
            largest = cutlass.max(largest, self.largest_bits(words))
        return largest

    @cute.jit
    def reduce(self, largest, sums, scratch, tid):
        """(the CTA's largest, the CTA's sum of each of `sums`), on every thread. scratch: shared memory, a word a warp
        and value.
        """
        lane = tid % 32
        warp = tid // 32
        parts = [ptx.warp_max(largest)]
        for value in sums:
            parts.append(ptx.warp_sum(value))
        if lane == 0:
            for i in cutlass.range_constexpr(len(parts)):
                ptx.sts32(scratch + (i * MAX_WARPS + warp) * 4, parts[i])
        cute.arch.sync_threads()
        results = []
        for i in cutlass.range_constexpr(len(parts)):
            value = ptx.lds32(scratch + (i * MAX_WARPS + cutlass.min(lane, self.warps - 1)) * 4)
            if const_expr(i == 0):
                results.append(ptx.warp_max(value))
            else:
                results.append(ptx.warp_sum(cutlass.select_(lane < self.warps, value, Int32(0))))
        return results[0], results[1:]


class Form:
    """One form of a row: what a GEMM reads. `codes` once, then `store` to each place."""

    def __init__(self, kind: ActivationKind, rows: Rows) -> None:
        self.kind, self.rows = kind, rows
        self.bits = BITS.get(kind, 4)
        self.is_quantized = kind is not ActivationKind.BF16
        self.by_group = kind is ActivationKind.INT4_GROUP
        self.code = FORMAT_CODE[kind]

    def padded(self, width):
        """Columns of a stored row."""
        multiple = X_K_MULTIPLE[self.kind]
        return (width + (multiple - 1)) // multiple * multiple

    def scale(self, largest_bits):
        """Float32, from a largest magnitude's bits."""
        exact = ptx.divide(ptx.bits_to_f32(largest_bits), Float32(LIMIT[self.kind]))
        return ptx.bits_to_f32(cutlass.max(ptx.f32_to_bits(exact), Int32(MIN_SCALE_BITS)))

    def quantize(self, row, largest_bits):
        """([vectors] lists of words to store, [vectors] scales or one, none for bf16)."""
        if not self.is_quantized:
            return row, []
        if not self.by_group:
            scales = [self.scale(largest_bits)]
            return [self.encode(words, scales[0]) for words in row], scales
        scales = [self.scale(self.group_largest(words)) for words in row]
        return [self.encode(words, scale) for words, scale in zip(row, scales, strict=True)], scales

    def group_largest(self, words):
        """Over the 16 neighbouring threads whose vectors make a group of 128."""
        largest = self.rows.largest_bits(words)
        for mask in (8, 4, 2, 1):
            largest = cutlass.max(largest, ptx.shuffle_xor(largest, mask))
        return largest

    def encode(self, words, scale):
        """8 values to 8 codes."""
        steps = []
        for word in words:
            steps.append(ptx.divide(ptx.bits_to_f32(word << 16), scale))
            steps.append(ptx.divide(ptx.bits_to_f32(word & Int32(-65536)), scale))
        if self.kind is ActivationKind.E4M3:
            return [ptx.pack_e4m3(*steps[:4]), ptx.pack_e4m3(*steps[4:])]
        codes = [ptx.round_to_int(step) for step in steps]
        if self.kind is ActivationKind.INT8:
            return [ptx.pack_s8(*codes[:4]), ptx.pack_s8(*codes[4:])]
        packed = codes[0] & 15
        for i in range(1, VECTOR):
            packed = packed | ((codes[i] & 15) << (4 * i))
        return [packed]

    @cute.jit
    def store(self, codes, scales, at_row, width, addresses, tid):
        """Write the row to place `at_row` of this form's tensors, zeros up to the padded width."""
        padded = self.padded(width)
        target = addresses[ACTIVATION_ARGUMENT[self.kind]] + Int64(at_row) * (padded * self.bits // 8)
        for i in cutlass.range_constexpr(self.rows.vectors):
            column = self.rows.column(tid, i)
            ptx.stg_words_if(target + Int64(column) * self.bits // 8, padded - column, codes[i])
        if const_expr(self.by_group):
            groups = padded // 128
            for i in cutlass.range_constexpr(self.rows.vectors):
                column = self.rows.column(tid, i)
                if column < padded and tid % 16 == 0:
                    to = addresses[ACTIVATION_ARGUMENT[self.kind] + 1] + (Int64(at_row) * groups + column // 128) * 4
                    ptx.stg_f32(to, scales[i])
        elif const_expr(self.is_quantized):
            if tid == 0:
                ptx.stg_f32(addresses[ACTIVATION_ARGUMENT[self.kind] + 1] + Int64(at_row) * 4, scales[0])
