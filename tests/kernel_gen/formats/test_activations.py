"""Tokens: errors within half a step, int4 packed as kernels read it, awkward tokens that stay in their own row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gen.formats import dequantize_activations, quantize_activations
from kernel_gen.layouts import ActivationKind, layout_of
from profiles.errors import SpecError
from profiles.schemes import parse

NAMES = {
    ActivationKind.BF16: "w4a16_g128_sym",
    ActivationKind.INT8: "w8a8_g-1_sym",
    ActivationKind.E4M3: "w8a8_g-1_sym_e4m3",
    ActivationKind.INT4: "w4a4_g-1_sym",
    ActivationKind.INT4_GROUP: "w4a4_g128_sym",
}
EACH = pytest.mark.parametrize("kind", NAMES)


def tokens(num_tokens, k, seed, factor=1.0):
    return torch.randn(num_tokens, k, generator=torch.Generator().manual_seed(seed)) * factor


@given(
    kind=st.sampled_from(list(NAMES)),
    num_tokens=st.integers(0, 9),
    k=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    factor=st.sampled_from([1.0, 0.0, 1e-40, 1e37]),
)
@settings(max_examples=150, deadline=None)
def test_error_is_within_half_a_step(kind, num_tokens, k, seed, factor):
    """Integers: scale / 2. e4m3: 2^-4 of the value or 2^-10 of the scale. bf16: 2^-8 of the value. And float32's."""
    x = tokens(num_tokens, k, seed, factor)
    quantized = quantize_activations(x, parse(NAMES[kind]))
    values = dequantize_activations(quantized)
    assert values.shape == x.shape
    error = (x.double() - values.double()).abs()
    size = x.double().abs()
    if kind is ActivationKind.BF16:
        bound = 2**-8 * size + 2**-133
    else:
        step = quantized.scales.double().repeat_interleave(128 if kind is ActivationKind.INT4_GROUP else k, dim=1)[
            :, :k
        ]
        bound = 2**-4 * size + 2**-10 * step if kind is ActivationKind.E4M3 else step / 2
        bound = bound + 2**-22 * size
    assert (error <= bound).all()


@EACH
@pytest.mark.parametrize("k", [1, 8, 127, 128, 300])
def test_rows_are_as_long_as_the_layout_says(kind, k):
    scheme = parse(NAMES[kind])
    quantized = quantize_activations(tokens(5, k, 0), scheme)
    assert quantized.kind is kind
    assert quantized.codes.is_contiguous()
    assert quantized.codes.shape[1] * quantized.codes.element_size() == layout_of(scheme).x_stride_bytes(k)
    if kind is ActivationKind.BF16:
        assert quantized.scales is None
    else:
        assert quantized.scales.shape == (5, layout_of(scheme).num_x_scales(k))
        assert quantized.scales.dtype is torch.float32


@EACH
def test_padding_is_zero(kind):
    quantized = quantize_activations(tokens(3, 130, 1), parse(NAMES[kind]))
    start = 65 if quantized.codes.dtype is torch.uint8 else 130
    assert (quantized.codes[:, start:].float() == 0).all()


@pytest.mark.parametrize("kind", [ActivationKind.INT4, ActivationKind.INT4_GROUP])
def test_int4_nibbles(kind):
    """Even k in the low nibble, two's complement."""
    x = torch.tensor([[-7.0, 7.0, -1.0, 0.0, 3.0]])
    quantized = quantize_activations(x, parse(NAMES[kind]))
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes[0, :4].tolist() == [0x79, 0x0F, 0x03, 0x00]
    assert torch.equal(dequantize_activations(quantized), x)


@EACH
def test_codes_survive_their_own_values(kind):
    """Values that are on the grid come back exactly, whatever the scale."""
    scheme = parse(NAMES[kind])
    once = dequantize_activations(quantize_activations(tokens(6, 256, 2), scheme))
    twice = dequantize_activations(quantize_activations(once, scheme))
    assert torch.allclose(once, twice, rtol=1e-6, atol=0)


@EACH
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_shows_and_stays_alone(kind, value):
    scheme = parse(NAMES[kind])
    x = tokens(3, 200, 3)
    good = dequantize_activations(quantize_activations(x, scheme))
    x[1, 150] = value
    values = dequantize_activations(quantize_activations(x, scheme))
    assert not values[1, 150].isfinite()
    assert torch.equal(values[::2], good[::2])


@EACH
def test_tokens_do_not_depend_on_each_other(kind):
    scheme = parse(NAMES[kind])
    x = tokens(4, 300, 4) * torch.tensor([[1.0], [1e-4], [1e4], [0.0]])
    together = dequantize_activations(quantize_activations(x, scheme))
    apart = torch.cat([dequantize_activations(quantize_activations(x[i : i + 1], scheme)) for i in range(4)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 0), torch.zeros(2, 3, dtype=torch.int8)]
)
def test_what_is_no_token_matrix_is_refused(x):
    with pytest.raises(SpecError, match="activations are floats"):
        quantize_activations(x, parse("w8a8_g-1_sym"))


@pytest.mark.gpu
@EACH
def test_a_gpu_gives_the_same_tokens(kind):
    scheme = parse(NAMES[kind])
    x = tokens(50, 300, 5)
    here, there = quantize_activations(x, scheme), quantize_activations(x.cuda(), scheme)
    assert torch.equal(here.codes.view(torch.uint8), there.codes.cpu().view(torch.uint8))
    assert here.scales is None or torch.equal(here.scales, there.scales.cpu())
    assert torch.equal(dequantize_activations(here), dequantize_activations(there).cpu())
