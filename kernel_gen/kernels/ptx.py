"""The PTX instructions that the kernels use, one function each. Addresses are shared-memory Int32 or global Int64
bytes.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

_ptx = cute.arch.inline_ptx


def wait_for_kernel_ahead():
    """sm_90: what the kernel ahead wrote is there from here on, and the next one may be launched. Whoever reads tokens,
    their scales or writes Y has waited.
    """
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()


def lds32(addr):
    return _ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[addr])


def lds64(addr):
    return _ptx("ld.shared.v2.b32 {{$w0},{$w1}}, [{$r0}];", write_only_types=[Int32] * 2, read_only_args=[addr])


def lds128(addr):
    return _ptx(
        "ld.shared.v4.b32 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];", write_only_types=[Int32] * 4, read_only_args=[addr]
    )


def lds64_f32(addr):
    return _ptx("ld.shared.v2.f32 {{$w0},{$w1}}, [{$r0}];", write_only_types=[Float32] * 2, read_only_args=[addr])


def sts32(addr, value):
    _ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[addr, value])


def sts128(addr, a, b, c, d):
    _ptx("st.shared.v4.b32 [{$r0}], {{$r1},{$r2},{$r3},{$r4}};", read_only_args=[addr, a, b, c, d])


def ldg32(addr):
    return _ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[addr])


def ldg64(addr):
    return _ptx("ld.global.b64 {$w0}, [{$r0}];", write_only_types=[Int64], read_only_args=[addr])


def ldg_f32(addr):
    return _ptx("ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[addr])


def stg32(addr, value):
    _ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[addr, value])


def stg128(addr, a, b, c, d):
    _ptx("st.global.v4.b32 [{$r0}], {{$r1},{$r2},{$r3},{$r4}};", read_only_args=[addr, a, b, c, d])


def sts_f32(addr, value):
    _ptx("st.shared.f32 [{$r0}], {$r1};", read_only_args=[addr, value])


def ldmatrix_x4(addr):
    return _ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0},{$w1},{$w2},{$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[addr],
    )


def ldmatrix_x2(addr):
    return _ptx(
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{$w0},{$w1}}, [{$r0}];",
        write_only_types=[Int32] * 2,
        read_only_args=[addr],
    )


def movmatrix_trans(value):
    """Transpose an 8x8 matrix of 16-bit elements spread over a warp."""
    return _ptx("movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def cp_async_16_if_more(smem, gmem, left, offset):
    """Copy 16 bytes if left > offset, else store 16 zeros: an address past a tensor's end is never used."""
    _ptx(
        "{.reg .pred p; .reg .b32 z; setp.gt.s32 p, {$r2}, " + str(offset) + "; mov.b32 z, 0; "
        "@p cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16; @!p st.shared.v4.b32 [{$r0}], {z, z, z, z};}",
        read_only_args=[smem, gmem, left],
    )


def cp_async_4_if_more(smem, gmem, left, offset):
    """Copy 4 bytes if left > offset, else store zeros."""
    _ptx(
        "{.reg .pred p; .reg .b32 z; setp.gt.s32 p, {$r2}, " + str(offset) + "; mov.b32 z, 0; "
        "@p cp.async.ca.shared.global [{$r0}], [{$r1}], 4; @!p st.shared.b32 [{$r0}], z;}",
        read_only_args=[smem, gmem, left],
    )


PATIENT_NS = 0x989680  # 10 ms


def mbarrier_wait(barrier, parity, patient=False):
    """sm_90: until the phase of this parity has ended; `patient`: asleep, for who waits long, and leaves the scheduler
    to others. Addresses of the CTA's own barriers need no window of a cluster, which the DSL's pointers look up at
    every use.
    """
    limit = f", {PATIENT_NS}" if patient else ""
    _ptx(
        "{.reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [{$r0}], {$r1}"
        + limit
        + "; @!done bra AGAIN;}",
        read_only_args=[barrier, parity],
    )


def mbarrier_arrive(barrier):
    """sm_90: one arrival, after all that this thread read."""
    _ptx("mbarrier.arrive.shared::cta.b64 _, [{$r0}];", read_only_args=[barrier])


def fence_reads():
    """sm_90: what this thread read of shared memory was read before what it lets bulk copies write there."""
    _ptx("fence.proxy.async.shared::cta;", read_only_args=[])


def mbarrier_arrive_at(barrier, rank):
    """sm_90: the same at the barrier of a CTA of this cluster. Nothing was written that the other CTA would read:
    release at the scope of the cluster would be a memory barrier each time.
    """
    _ptx(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; "
        "mbarrier.arrive.shared::cluster.b64 _, [there];}",
        read_only_args=[barrier, rank],
    )


def mbarrier_expect(barrier, num_bytes):
    """sm_90: one arrival, and so many bytes that bulk copies still bring."""
    _ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{$r0}], {$r1};", read_only_args=[barrier, num_bytes])


def bulk_load(smem, gmem, num_bytes, barrier):
    """sm_90: one thread copies num_bytes (a multiple of 16) to shared memory; the mbarrier counts them."""
    _ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[smem, gmem, num_bytes, barrier],
    )


def remote(smem, rank):
    """sm_90: this shared-memory address in another CTA of the cluster."""
    return _ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[smem, Int32(rank)]
    )


def st_async_128(address, values, barrier):
    """sm_90: four 32-bit values to another CTA's shared memory; the mbarrier there counts 16 bytes as they come."""
    _ptx(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [{$r0}], {{$r1},{$r2},{$r3},{$r4}}, [{$r5}];",
        read_only_args=[address, *values, barrier],
    )


def stmatrix_trans(smem, matrices):
    """sm_90: one, two or four 8x8 matrices of 16-bit elements, transposed, to the 16-byte rows that the first 8, 16 or
    32 lanes address.
    """
    values = ",".join(f"{{$r{i + 1}}}" for i in range(len(matrices)))
    _ptx(
        f"stmatrix.sync.aligned.m8n8.x{len(matrices)}.trans.shared.b16 [{{$r0}}], {{{values}}};",
        read_only_args=[smem, *matrices],
    )


def pack_bf16(low, high):
    return _ptx("cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[high, low])


def bits_to_f32(value):
    return _ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def int_to_f32(value):
    return _ptx("cvt.rn.f32.s32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def bf16_low_to_f32(pair):
    return bits_to_f32(pair << 16)


def bf16_high_to_f32(pair):
    return bits_to_f32(pair & Int32(-65536))


def and_or(value, mask, bits):
    """(value & mask) | bits in one lop3."""
    return _ptx(
        "lop3.b32 {$w0}, {$r0}, " + hex(mask) + ", {$r1}, 0xEA;", write_only_types=[Int32], read_only_args=[value, bits]
    )


def and_xor(value, mask, bits):
    """(value & mask) ^ bits in one lop3."""
    return _ptx(
        "lop3.b32 {$w0}, {$r0}, " + hex(mask) + ", {$r1}, 0x6A;", write_only_types=[Int32], read_only_args=[value, bits]
    )


def bytes_with(word, half, high):
    """Bytes 2 half and 2 half + 1 of word, each the low byte of a 16-bit element under a byte of `high`."""
    selector = hex(0x4040 | (2 * half + 1) << 8 | 2 * half)
    return _ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, " + selector + ";", write_only_types=[Int32], read_only_args=[word, high]
    )


def fma_bf16x2(a, b, c):
    """add and mul.bf16x2 need sm_90; fma is there from sm_80 on, and as fast."""
    return _ptx("fma.rn.bf16x2 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Int32], read_only_args=[a, b, c])


def broadcast_low(pair):
    return _ptx("prmt.b32 {$w0}, {$r0}, {$r0}, 0x1010;", write_only_types=[Int32], read_only_args=[pair])


def broadcast_high(pair):
    return _ptx("prmt.b32 {$w0}, {$r0}, {$r0}, 0x3232;", write_only_types=[Int32], read_only_args=[pair])


def pinned(value):
    """A constant the compiler cannot see through: it stays in a register instead of a fresh move at each use."""
    tid, _, _ = cute.arch.thread_idx()
    return _ptx(
        "lop3.b32 {$w0}, {$r0}, 0x80000000, " + hex(value & 0xFFFFFFFF) + ", 0xEA;",
        write_only_types=[Int32],
        read_only_args=[tid],
    )


def count_le(value, bound):
    """How many lanes of the warp hold value <= bound."""
    return _ptx(
        "{.reg .pred p; .reg .b32 m; setp.le.s32 p, {$r0}, {$r1}; "
        "vote.sync.ballot.b32 m, p, 0xffffffff; popc.b32 {$w0}, m;}",
        write_only_types=[Int32],
        read_only_args=[value, bound],
    )


def shuffle_up(value, delta):
    return _ptx(
        "shfl.sync.up.b32 {$w0}, {$r0}, " + str(delta) + ", 0, 0xffffffff;",
        write_only_types=[Int32],
        read_only_args=[value],
    )


_MMA = {
    "bf16": ("m16n8k16", "f32.bf16.bf16.f32", Float32),
    "int8": ("m16n8k32", "s32.s8.s8.s32", Int32),
    "e4m3": ("m16n8k32", "f32.e4m3.e4m3.f32", Float32),
    "int4": ("m16n8k64", "s32.s4.s4.s32", Int32),
}


def mma_sync(math, a, b, c):
    """One warp's m16n8 product: a 4 registers, b 2, c 4; returns the 4 of the sum. `math`: profiles.gpus.Math.value."""
    shape, types, acc_type = _MMA[math]
    return _ptx(
        f"mma.sync.aligned.{shape}.row.col.{types} "
        "{{$w0},{$w1},{$w2},{$w3}}, {{$r0},{$r1},{$r2},{$r3}}, {{$r4},{$r5}}, {{$r6},{$r7},{$r8},{$r9}};",
        write_only_types=[acc_type] * 4,
        read_only_args=[*a, *b, *c],
    )
