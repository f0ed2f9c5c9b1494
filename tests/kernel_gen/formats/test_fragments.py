"""The packed words against the PTX ISA: an MMA's A fragment is gathered lane by lane, register by register.

Plain loops, and nothing of kernel_gen.layouts: the tables below are written from the PTX ISA's figures of the A
fragments of mma.m16n8k16 (bf16), .m16n8k32 (8 bits) and .m16n8k64 (4 bits), places in words from ARCHITECTURE.md.
"""

import numpy as np
import pytest
import torch

from kernel_gen.formats import QuantizedWeights, pack
from profiles.schemes import parse
from tests.kernel_gen.formats.test_packing import random_codes

LANES, BLOCKS = 32, 4


def ptx_element(mma_k, lane, i):
    """(row, k) in the 16 x mma_k A operand of element a_i of a lane."""
    group_id, thread_in_group = lane >> 2, lane % 4
    if mma_k == 16:
        row = group_id if i < 2 or 4 <= i < 6 else group_id + 8
        return row, thread_in_group * 2 + (i & 1) + (0 if i < 4 else 8)
    if mma_k == 32:
        row = group_id if i < 4 or 8 <= i < 12 else group_id + 8
        return row, thread_in_group * 4 + (i & 3) + (0 if i < 8 else 16)
    row = group_id if i < 8 or 16 <= i < 24 else group_id + 8
    return row, thread_in_group * 8 + (i & 7) + (0 if i < 16 else 32)


def bits(word, low, count):
    return (int(word) >> low) & ((1 << count) - 1)


# Each reads element i of the fragment of MMA step `step`, m16 block w, from a unit's words. r: register, p: place in it


def bf16_16(words, w, step, lane, i):
    r, p = divmod(i, 2)
    return bits(words[((w * 4 + step) * LANES + lane) * 4 + r], 16 * p, 16)


def bf16_8(words, w, step, lane, i):
    r, p = divmod(i, 2)
    j = 2 * step + (r >> 1)
    return bits(words[((w * 2 + j // 4) * LANES + lane) * 4 + j % 4], 8 * (2 * (r & 1) + p), 8)


def bf16_4(words, w, step, lane, i):
    r, p = divmod(i, 2)
    return bits(words[(w * LANES + lane) * 4 + step], 4 * r + 16 * p, 4)


def bf16_2(words, w, step, lane, i):
    r, p = divmod(i, 2)
    return bits(words[(w * LANES + lane) * 2 + (step >> 1)], 2 * (r + 4 * (step & 1)) + 16 * p, 2)


def bf16_3(words, w, step, lane, i):
    r, p = divmod(i, 2)
    high = bits(words[BLOCKS * LANES * 2 + w * LANES + lane], r + 4 * step + 16 * p, 1)
    return bf16_2(words, w, step, lane, i) | high << 2


def bytes_8(words, w, step, lane, i):
    r, p = divmod(i, 4)
    return bits(words[((w * 4 + step) * LANES + lane) * 4 + r], 8 * p, 8)


def bytes_4(words, w, step, lane, i):
    r, p = divmod(i, 4)
    j = 2 * step + (r >> 1)
    return bits(words[((w * 2 + j // 4) * LANES + lane) * 4 + j % 4], 8 * p + 4 * (r & 1), 4)


def signed_4(words, w, step, lane, i):
    """Sign and magnitude, as two's complement."""
    code = bytes_4(words, w, step, lane, i)
    return -(code & 7) if code & 8 else code


def nibbles_4(words, w, step, lane, i):
    r, p = divmod(i, 8)
    return bits(words[((w * 2 + step) * LANES + lane) * 4 + r], 4 * p, 4)


CASES = {  # scheme: (the MMA's k, k-tile, reader, what is added to a two's-complement code to get u)
    "w16a16": (16, 64, bf16_16, 0),
    "w8a16_g128_asym": (16, 64, bf16_8, 0),
    "w4a16_g64_asym": (16, 64, bf16_4, 0),
    "w3a16_g-1_sym": (16, 64, bf16_3, 0),
    "w2a16_g128_sym": (16, 64, bf16_2, 0),
    "w8a8_g-1_sym": (32, 128, bytes_8, 128),
    "w8a8_g-1_sym_e4m3": (32, 128, bytes_8, 0),
    "w4a8_g128_sym": (32, 128, bytes_4, 8),
    "w4a8_g128_sym_e4m3": (32, 128, signed_4, 8),
    "w4a4_g-1_sym": (64, 128, nibbles_4, 8),
    "w4a4_g128_sym": (64, 128, nibbles_4, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_fragments_hold_the_codes_the_mma_expects(name):
    mma_k, k_tile, read, offset = CASES[name]
    scheme = parse(name)
    n, k = 128, 2 * k_tile
    weights = random_codes(scheme, (2, n, k), 5)
    blob = pack(weights).blob.numpy().view(np.uint32)
    assert blob.shape[:3] == (2, k // k_tile, n // 64)
    expert, tile, unit = 1, 1, 1
    found = np.full((64, k_tile), -1)
    words = blob[expert, tile, unit]
    for w in range(BLOCKS):
        for step in range(k_tile // mma_k):
            for lane in range(LANES):
                for i in range(16 * mma_k // LANES):
                    row, column = ptx_element(mma_k, lane, i)
                    found[16 * w + row, step * mma_k + column] = read(words, w, step, lane, i)
    found = (found + offset) % (1 << scheme.weight_bits)
    codes = weights.codes.view(torch.int16 if scheme.weight_bits == 16 else torch.uint8).numpy()
    expected = codes[expert, 64:128, k_tile:].astype(np.int64) & ((1 << scheme.weight_bits) - 1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["w4a16_g64_asym", "w8a16_g128_asym", "w4a8_g128_sym", "w4a16_g-1_asym"])
def test_strips_hold_rows_g_and_g_plus_8(name):
    scheme = parse(name)
    weights = random_codes(scheme, (2, 130, 300), 6)
    packed = pack(weights)
    strips = [(packed.zero_strip, weights.zeros)] if weights.zeros is not None else []
    strips += [(packed.scale_strip, weights.scales)] if scheme.group_size != -1 else []
    for strip, values in strips:
        values = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        words = strip.numpy().view(np.uint32)
        assert words.shape == (2, values.shape[2], 3, 4, 8)
        for group in range(values.shape[2]):
            for row in range(192):
                block, in_block = divmod(row, 16)
                word = words[1, group, block // 4, block % 4, in_block % 8]
                assert bits(word, 16 * (in_block // 8), 16) == (values[1, row, group] if row < 130 else 0)


def test_channel_scales_lie_in_row_order():
    weights = random_codes(parse("w8a8_g-1_sym"), (2, 70, 128), 7)
    scales = pack(weights).channel_scales
    assert scales.shape == (2, 128)
    assert torch.equal(scales[:, :70], weights.scales[..., 0])
    assert (scales[:, 70:] == 0).all()


def test_a_changed_code_changes_the_blob():
    weights = random_codes(parse("w3a16_g-1_sym"), (1, 64, 64), 8)
    codes = weights.codes.clone()
    codes[0, 13, 37] ^= 4
    changed = QuantizedWeights(scheme=weights.scheme, codes=codes, scales=weights.scales, zeros=None)
    difference = pack(changed).blob ^ pack(weights).blob
    assert int((difference != 0).sum()) == 1
