"""Packing: an exact round trip for every size, and the bytes that bits_per_weight promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gen.formats import QuantizedWeights, dequantize, format_of, pack, quantize, unpack
from kernel_gen.layouts import layout_of
from profiles.errors import DataError, UnsupportedError
from profiles.schemes import KERNEL_SCHEMES, NumericType, parse

SCHEMES = (*KERNEL_SCHEMES, parse("w4a16_g64_asym"), parse("w3a16_g64_sym"), parse("w8a8_g128_sym"))
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def random_codes(scheme, shape, seed):
    """Every code, scale and zero point a format can hold, not only those that quantising normal weights gives."""
    generator = torch.Generator().manual_seed(seed)
    num_experts, n, k = shape
    groups = 1 if scheme.group_size == -1 else -(-k // scheme.group_size)
    if scheme.weights is None:
        codes = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return QuantizedWeights(scheme=scheme, codes=codes, scales=None, zeros=None)
    codes = torch.randint(0, 1 << scheme.weight_bits, shape, generator=generator, dtype=torch.uint8)
    if scheme.weights.type is NumericType.FLOAT:
        codes = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)  # no NaN
    elif scheme.name.endswith("_e4m3"):
        codes.clamp_(min=1)  # 4-bit weights of e4m3 math are sign and magnitude: -8 has no code
    scales = torch.rand(num_experts, n, groups, generator=generator) + 0.1
    zeros = torch.randint(0, 1 << scheme.weight_bits, scales.shape, generator=generator, dtype=torch.uint8)
    scales = scales if scheme.group_size == -1 else scales.to(torch.bfloat16)
    return QuantizedWeights(scheme=scheme, codes=codes, scales=scales, zeros=None if scheme.is_symmetric else zeros)


def assert_same(found, expected):
    for name in ("codes", "scales", "zeros"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype is b.dtype
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@given(
    scheme=st.sampled_from(SCHEMES),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 300)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_unpack_undoes_pack(scheme, shape, seed):
    quantized = random_codes(scheme, shape, seed)
    packed = pack(quantized)
    assert_same(unpack(packed), quantized)
    assert packed.num_bytes == layout_of(scheme).packed_bytes(shape[1], shape[2], shape[0])
    assert (packed.num_experts, packed.n, packed.k) == shape


@EACH
def test_aligned_sizes_take_bits_per_weight(scheme):
    packed = pack(random_codes(scheme, (2, 128, 256), 0))
    assert packed.num_bytes * 8 / (2 * 128 * 256) == pytest.approx(scheme.bits_per_weight(256), rel=1e-12)


@EACH
def test_padding_is_worth_zero(scheme):
    """The kernel multiplies padded weights too: seen as a larger layer, they are 0 next to the same values."""
    quantized = random_codes(scheme, (2, 70, 200), 1)
    packed, layout = pack(quantized), layout_of(scheme)
    whole = {"n": layout.padded_n(70), "k": layout.padded_k(200)}
    parts = ("blob", "scale_strip", "zero_strip", "channel_scales")
    larger = type(packed)(scheme=scheme, num_experts=2, **whole, **{part: getattr(packed, part) for part in parts})
    values = dequantize(unpack(larger))
    assert torch.equal(values[:, :70, :200], dequantize(quantized))
    assert (values[:, 70:] == 0).all()
    assert (values[:, :, 200:] == 0).all()


@EACH
def test_codes_that_are_a_view_of_others(scheme):
    quantized = random_codes(scheme, (2, 64, 256), 2)
    view = QuantizedWeights(
        scheme=scheme,
        codes=quantized.codes.transpose(1, 2).contiguous().transpose(1, 2),
        scales=quantized.scales,
        zeros=quantized.zeros,
    )
    assert torch.equal(pack(view).blob, pack(quantized).blob)
    assert torch.equal(pack(quantized.expert(1)).blob, pack(quantized).blob[1:])


@EACH
def test_parts_are_contiguous_and_aligned(scheme):
    packed = pack(random_codes(scheme, (1, 65, 130), 3))
    for part in (packed.blob, packed.scale_strip, packed.zero_strip, packed.channel_scales):
        if part is not None:
            assert part.is_contiguous()
            assert part.data_ptr() % 16 == 0


def test_a_format_without_a_layout_is_refused_on_packing_only():
    form = format_of(parse("w2a8_g64_sym"))
    quantized = form.quantize(torch.randn(2, 64, 128))
    assert form.dequantize(quantized).isfinite().all()
    with pytest.raises(UnsupportedError, match="w2a8_g64_sym"):
        form.pack(quantized)


@pytest.mark.gpu
@EACH
def test_a_gpu_gives_the_same_bytes(scheme):
    w = torch.randn(2, 130, 330)
    here, there = quantize(w, scheme), quantize(w.cuda(), scheme)
    assert torch.equal(pack(here).blob, pack(there).blob.cpu())
    assert_same(unpack(pack(there).to("cpu")), here)


def test_codes_without_a_packed_form_are_refused():
    weights = random_codes(parse("w4a8_g128_sym_e4m3"), (1, 8, 128), 3)
    weights.codes[0, 4, 5] = 0
    with pytest.raises(DataError, match="codes of -8 cannot be packed"):
        pack(weights)
