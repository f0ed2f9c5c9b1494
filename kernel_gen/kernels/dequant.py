"""From packed words to the A operand's registers, for each kind of weights. What the bits mean is in
kernel_gen.layouts.

BF16 math: codes u become (u - z), exact in bf16, then times the group's scale where there is one (a per-channel scale
waits for the epilogue). The integer u sits in the mantissa of bf16 128 + u (u < 16); 8 bits are u - 128 = a - b with
the low seven bits in a = 128 + u mod 128 and the top one in b = 256 or 128. So no conversion instruction runs.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from kernel_gen.kernels import ptx
from profiles.gpus import Math

BF16_128 = 0x43004300  # bf16 pair (128, 128): ulp 1, low mantissa bits hold u
BF16_128_BYTES = 0x43434343  # the high byte of each
TOP_BITS = 0x00800080
BF16_ONE = 0x3F803F80
BF16_MINUS_ONE = 0xBF80BF80
BF16_MINUS_128 = 0xC300C300
BF16_MINUS_ZERO = 0x80008000
INT8_HIGH = -0x0F0F0F10  # 0xF0F0F0F0: q in the high nibble is 16 q
E4M3_LOW = 0x07070707
SIGNS = -0x7F7F7F80  # 0x80808080


class Bf16Weights:
    """Weights for BF16 math: num_bits 2, 3, 4, 8 or 16, optional zero points and group scales."""

    def __init__(self, num_bits: int, zero_points: bool, group_scales: bool, unit_bytes: int) -> None:
        self.num_bits, self.zero_points, self.group_scales, self.unit_bytes = (
            num_bits,
            zero_points,
            group_scales,
            unit_bytes,
        )
        self.words = 4 if num_bits == 16 else num_bits  # 16 bits: fetched a k-step at a time

    def constants(self):
        """Registers that every k-tile needs; kept by the mainloop."""
        values = (BF16_128, BF16_ONE, BF16_MINUS_ZERO, BF16_MINUS_ONE, BF16_MINUS_128, TOP_BITS, BF16_128_BYTES)
        return tuple(ptx.pinned(value) for value in values)

    @cute.jit
    def load(self, words, m: cutlass.Constexpr, base, block, lane, ks: cutlass.Constexpr):
        """Words of one m16 block (its number in the tile) from the stage at `base`; ks is used with 16 bits only."""
        unit = base + (block // 4) * self.unit_bytes
        w = block % 4
        if const_expr(self.num_bits == 16):
            got = ptx.lds128(unit + w * 2048 + ks * 512 + lane * 16)
            for j in cutlass.range_constexpr(4):
                words[j, m] = got[j]
        if const_expr(self.num_bits == 8):
            for half in cutlass.range_constexpr(2):
                got = ptx.lds128(unit + w * 1024 + half * 512 + lane * 16)
                for j in cutlass.range_constexpr(4):
                    words[4 * half + j, m] = got[j]
        if const_expr(self.num_bits == 4):
            got = ptx.lds128(unit + w * 512 + lane * 16)
            for j in cutlass.range_constexpr(4):
                words[j, m] = got[j]
        if const_expr(self.num_bits <= 3):
            got = ptx.lds64(unit + w * 256 + lane * 8)
            words[0, m] = got[0]
            words[1, m] = got[1]
        if const_expr(self.num_bits == 3):
            words[2, m] = ptx.lds32(unit + 1024 + w * 128 + lane * 4)

    def bias(self, zero_pair, consts):
        """What is added to codes as they are decoded to leave u - z, for rows g and g + 8, as bf16 pairs: -(128 + z)
        for up to 4 bits, 128 - z for 8.

        zero_pair holds the zero points of the two rows as bf16; None for symmetric schemes, whose zero point is
        2^(b-1).
        """
        if zero_pair is None:
            if self.num_bits == 8:
                return Int32(0), Int32(0)  # nothing is left to add
            bits = {4: 0xC308, 3: 0xC304, 2: 0xC302}[self.num_bits]
            packed = ptx.pinned(bits << 16 | bits)
            return packed, packed
        both = ptx.fma_bf16x2(zero_pair, consts[3], consts[0] if self.num_bits == 8 else consts[4])  # exact
        return ptx.broadcast_low(both), ptx.broadcast_high(both)

    def codes(self, words, m, ks, r, consts):
        """bf16 pair 128 + u for register r of k-step ks (2 to 4 bits)."""
        if self.num_bits == 4:
            return ptx.and_or(_shift(words[ks, m], 4 * r), 0x000F000F, consts[0])
        low = ptx.and_or(_shift(words[ks >> 1, m], 2 * (r + 4 * (ks & 1))), 0x00030003, consts[0])
        if self.num_bits == 2:
            return low
        return ptx.and_or(_shift(words[2, m], r + 4 * ks - 2), 0x00040004, low)

    def signed_bytes(self, words, m, ks, r, consts):
        """bf16 pair u - 128 for register r of k-step ks (8 bits)."""
        pair = ptx.bytes_with(words[2 * ks + (r >> 1), m], r & 1, consts[6])
        low = pair & Int32(-0x00800081)
        return ptx.fma_bf16x2(ptx.and_xor(pair, 0xFF80FF80, consts[5]), consts[3], low)

    def decode(self, words, m, ks, scales, biases, consts):
        """The four A registers of k-step ks. scales, biases: [2, m_blocks] for rows g and g + 8, as pairs; scales of
        schemes with groups only.
        """
        if self.num_bits == 16:
            return [words[r, m] for r in range(4)]
        out = []
        for r in range(4):
            bias = biases[r & 1, m]
            if self.num_bits == 8:
                pair = self.signed_bytes(words, m, ks, r, consts)
                if self.zero_points:
                    pair = ptx.fma_bf16x2(pair, consts[1], bias)
            else:
                pair = ptx.fma_bf16x2(self.codes(words, m, ks, r, consts), consts[1], bias)
            if self.group_scales:
                pair = ptx.fma_bf16x2(pair, scales[r & 1, m], consts[2])
            out.append(pair)
        return out


class Bf16Codes(Bf16Weights):
    """Weights for BF16 math as codes: a fragment's values are above + unit x u, with `above` 128 for up to 4 bits. Of 2
    and 3 bits the codes of rows g + 8 lie two bits higher than those of rows g, which saves shifts: their unit is 4.
    8 bits are u - 128, 16 are weights.
    """

    def __init__(self, num_bits: int, zero_points: bool, unit_bytes: int) -> None:
        super().__init__(num_bits, False, False, unit_bytes)
        self.tile_words = 16 if num_bits == 16 else self.words
        self.has_offsets = num_bits <= 4 or zero_points
        self.units = (1, 4 if num_bits <= 3 else 1)

    @cute.jit
    def load_tile(self, words, m: cutlass.Constexpr, base, block, lane):
        """Words of a whole k-tile of one m16 block."""
        if const_expr(self.num_bits < 16):
            self.load(words, m, base, block, lane, 0)
        else:
            for ks in cutlass.range_constexpr(4):
                got = ptx.lds128(base + (block // 4) * self.unit_bytes + (block % 4) * 2048 + ks * 512 + lane * 16)
                for j in cutlass.range_constexpr(4):
                    words[4 * ks + j, m] = got[j]

    def fragment(self, words, m, ks, consts):
        """The four A registers of k-step ks."""
        if self.num_bits == 16:
            return [words[4 * ks + r, m] for r in range(4)]
        if self.num_bits >= 4:
            whole = self.signed_bytes if self.num_bits == 8 else self.codes
            return [whole(words, m, ks, r, consts) for r in range(4)]
        out = []
        for upper in range(2):
            both = _shift(words[ks >> 1, m], 4 * (upper + 2 * (ks & 1)))
            for half, mask in enumerate((0x00030003, 0x000C000C)):
                pair = ptx.and_or(both, mask, consts[0])
                if self.num_bits == 3:
                    bit = 2 * upper + half + 4 * ks
                    pair = ptx.and_or(_shift(words[2, m], bit - 2 - 2 * half), 0x00040004 << 2 * half, pair)
                out.append(pair)
        return out

    def factors(self, scale, zero, half):
        """(scale, offset), float32 or None, so that (sum - offset x sum of tokens) x scale is what (u - z) x scale
        would have summed to; of rows g (half 0) or g + 8.
        """
        unit = self.units[half]
        if unit != 1:
            scale = Float32(1 / unit) if scale is None else scale * Float32(1 / unit)
        if not self.has_offsets:
            return scale, None
        if zero is None:
            return scale, Float32(128 + unit * 2 ** (self.num_bits - 1))
        return scale, Float32(-128 if self.num_bits == 8 else 128) + zero * Float32(unit)


class NarrowWeights:
    """Weights of INT8, E4M3 and INT4 math. 8-bit ones, and 4-bit ones of INT4 math, are used as they lie; other 4-bit
    ones are widened to bytes: two's complement q to int8 16 q, sign and magnitude q to e4m3 q 2^-9 (its subnormals and
    first binade count evenly). `extra_scale` undoes that.
    """

    def __init__(self, math: Math, num_bits: int, k_steps: int, unit_bytes: int) -> None:
        self.math, self.k_steps, self.unit_bytes = math, k_steps, unit_bytes
        self.widen = num_bits == 4 and math is not Math.INT4
        self.words = 4 * (k_steps // 2 if self.widen else k_steps)
        self.extra_scale = {Math.INT8: 1 / 16, Math.E4M3: 2.0**9}[math] if self.widen else 1.0

    @cute.jit
    def load(self, words, m: cutlass.Constexpr, base, block, lane, ks: cutlass.Constexpr):
        """Words of k-step ks for one m16 block; those that are widened come for two k-steps, on even ks."""
        unit = base + (block // 4) * self.unit_bytes
        w = block % 4
        if const_expr(self.widen):
            if const_expr(ks % 2 == 0):
                got = ptx.lds128(unit + w * 1024 + (ks // 2) * 512 + lane * 16)
                for j in cutlass.range_constexpr(4):
                    words[2 * ks + j, m] = got[j]
        else:
            got = ptx.lds128(unit + w * (512 * self.k_steps) + ks * 512 + lane * 16)
            for j in cutlass.range_constexpr(4):
                words[4 * ks + j, m] = got[j]

    def fragment(self, words, m, ks):
        """The four A registers of k-step ks. A widened word holds two: its low nibbles and its high ones."""
        if not self.widen:
            return [words[4 * ks + r, m] for r in range(4)]
        two = (words[2 * ks, m], words[2 * ks + 1, m])
        return [half(word) for word in two for half in (self.low_nibbles, self.high_nibbles)]

    def low_nibbles(self, word):
        if self.math is Math.INT8:
            return (word << 4) & Int32(INT8_HIGH)
        return (word & Int32(E4M3_LOW)) | ((word << 4) & Int32(SIGNS))

    def high_nibbles(self, word):
        if self.math is Math.INT8:
            return word & Int32(INT8_HIGH)
        return ((word >> 4) & Int32(E4M3_LOW)) | (word & Int32(SIGNS))


def _shift(word, amount):
    """Right by amount, left if it is negative."""
    if amount == 0:
        return word
    return word >> amount if amount > 0 else word << -amount
