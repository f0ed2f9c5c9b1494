"""The PTX instructions of the steps. Addresses are global Int64 or shared-memory Int32 bytes; `left` > n guards an
access: what is not there reads as zero and is not written.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from kernel_gen.kernels.ptx import wait_for_kernel_ahead

_ptx = cute.arch.inline_ptx


def begin(overlap):
    """Wait for the results of the kernel before and let the next one be launched, if launches overlap."""
    if overlap:
        wait_for_kernel_ahead()


def ldg32(addr):
    return _ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[addr])


def ldg64(addr):
    return _ptx("ld.global.b64 {$w0}, [{$r0}];", write_only_types=[Int64], read_only_args=[addr])


def ldg_f32(addr):
    return _ptx("ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[addr])


def ldg_bf16_as_f32(addr):
    return _ptx(
        "{.reg .b16 h, z; mov.b16 z, 0; ld.global.b16 h, [{$r0}]; mov.b32 {$w0}, {z, h};}",
        write_only_types=[Float32],
        read_only_args=[addr],
    )


def ldg128_if(addr, left):
    """16 bytes as 4 words."""
    return _ptx(
        "{.reg .pred p; setp.gt.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; "
        "mov.b32 {$w3}, 0; @p ld.global.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];}",
        write_only_types=[Int32] * 4,
        read_only_args=[addr, left],
    )


def ldg16_if(addr, left, index):
    """The 16 bits at addr + 2 * index, if left > index."""
    return _ptx(
        "{.reg .pred p; .reg .b16 h; setp.gt.s32 p, {$r1}, " + str(index) + "; mov.b16 h, 0; "
        "@p ld.global.b16 h, [{$r0}+" + str(2 * index) + "]; cvt.u32.u16 {$w0}, h;}",
        write_only_types=[Int32],
        read_only_args=[addr, left],
    )


def stg32(addr, value):
    _ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[addr, value])


def stg_f32(addr, value):
    _ptx("st.global.f32 [{$r0}], {$r1};", read_only_args=[addr, value])


def stg_words_if(addr, left, words):
    """1, 2 or 4 words."""
    form = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[len(words)]
    names = ",".join("{$r" + str(2 + i) + "}" for i in range(len(words)))
    value = names if len(words) == 1 else "{" + names + "}"
    _ptx(
        "{.reg .pred p; setp.gt.s32 p, {$r1}, 0; @p st.global." + form + " [{$r0}], " + value + ";}",
        read_only_args=[addr, left, *words],
    )


def stg16_if(addr, left, index, value, high):
    """The low or the high 16 bits of value to addr + 2 * index, if left > index."""
    half = "h" if high else "l"
    _ptx(
        "{.reg .pred p; .reg .b16 l, h; setp.gt.s32 p, {$r1}, " + str(index) + "; mov.b32 {l, h}, {$r2}; "
        "@p st.global.b16 [{$r0}+" + str(2 * index) + "], " + half + ";}",
        read_only_args=[addr, left, value],
    )


def lds32(addr):
    return _ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[addr])


def sts32(addr, value):
    _ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[addr, value])


def add_shared(addr, value):
    _ptx("red.shared.add.s32 [{$r0}], {$r1};", read_only_args=[addr, value])


def warp_max(value):
    return _ptx("redux.sync.max.s32 {$w0}, {$r0}, 0xffffffff;", write_only_types=[Int32], read_only_args=[value])


def warp_sum(value):
    return _ptx("redux.sync.add.s32 {$w0}, {$r0}, 0xffffffff;", write_only_types=[Int32], read_only_args=[value])


def shuffle_up(value, delta):
    return _ptx(
        "shfl.sync.up.b32 {$w0}, {$r0}, " + str(delta) + ", 0, 0xffffffff;",
        write_only_types=[Int32],
        read_only_args=[value],
    )


def shuffle_xor(value, mask):
    return _ptx(
        "shfl.sync.bfly.b32 {$w0}, {$r0}, " + str(mask) + ", 0x1f, 0xffffffff;",
        write_only_types=[Int32],
        read_only_args=[value],
    )


def lanes_like(value, lane):
    """(lanes of the warp that hold the same value, how many of them come before this one)."""
    return _ptx(
        "{.reg .b32 m, t; match.any.sync.b32 m, {$r0}, 0xffffffff; bmsk.clamp.b32 t, 0, {$r1}; and.b32 t, t, m; "
        "popc.b32 {$w0}, m; popc.b32 {$w1}, t;}",
        write_only_types=[Int32] * 2,
        read_only_args=[value, lane],
    )


def is_less(a, b):
    """1 or 0."""
    return _ptx(
        "{.reg .pred p; setp.lt.s32 p, {$r0}, {$r1}; selp.s32 {$w0}, 1, 0, p;}",
        write_only_types=[Int32],
        read_only_args=[a, b],
    )


def known_expert_32(value, num_experts):
    """The id, or num_experts if it is none of 0..num_experts-1."""
    return _ptx("min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[value, num_experts])


def known_expert_64(value, num_experts):
    return _ptx(
        "{.reg .b64 n; cvt.u64.u32 n, {$r1}; min.u64 n, {$r0}, n; cvt.u32.u64 {$w0}, n;}",
        write_only_types=[Int32],
        read_only_args=[value, num_experts],
    )


def bits_to_f32(value):
    return _ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def f32_to_bits(value):
    return _ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def pack_bf16(low, high):
    return _ptx("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[high, low])


def divide(a, b):
    """Rounded once, as torch divides tensors."""
    return _ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def multiply(a, b):
    """Never part of a fused multiply-add."""
    return _ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def add(a, b):
    return _ptx("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def silu(x):
    """x / (1 + 2^(-x log2 e)): ex2 and rcp are right to 2^-22, bf16 keeps 2^-9."""
    return _ptx(
        "{.reg .f32 t; mul.f32 t, {$r0}, 0fBFB8AA3B; ex2.approx.f32 t, t; add.f32 t, t, 0f3F800000; "
        "rcp.approx.f32 t, t; mul.f32 {$w0}, {$r0}, t;}",
        write_only_types=[Float32],
        read_only_args=[x],
    )


def round_to_int(value):
    """To the nearest, ties to even; NaN becomes 0."""
    return _ptx("cvt.rni.s32.f32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def pack_s8(a, b, c, d):
    """Four integers, saturated, to the bytes of a word, a lowest."""
    return _ptx(
        "{.reg .b32 t; cvt.pack.sat.s8.s32.b32 t, {$r3}, {$r2}, 0; cvt.pack.sat.s8.s32.b32 {$w0}, {$r1}, {$r0}, t;}",
        write_only_types=[Int32],
        read_only_args=[a, b, c, d],
    )


def pack_e4m3(a, b, c, d):
    """sm_89: four floats, saturated, to the bytes of a word, a lowest."""
    return _ptx(
        "{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, {$r1}, {$r0}; cvt.rn.satfinite.e4m3x2.f32 h, {$r3}, {$r2}; "
        "mov.b32 {$w0}, {l, h};}",
        write_only_types=[Int32],
        read_only_args=[a, b, c, d],
    )
