"""Quantising weights: errors within what the step size gives, for ordinary and for awkward values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_gen.formats import dequantize, format_of, quantize
from profiles.errors import DataError, SpecError
from profiles.schemes import KERNEL_SCHEMES, NumericType, parse

NAMES = [scheme.name for scheme in KERNEL_SCHEMES]
NAMES += [f"w{bits}a16_g64_{symmetry}" for bits in (2, 3, 4, 8) for symmetry in ("sym", "asym")]
NAMES += ["w2a8_g64_sym", "w8a8_g128_sym"]  # no kernel layout, but a format
INT_NAMES = [name for name in NAMES if name != "w16a16" and not (name.startswith("w8") and name.endswith("e4m3"))]

VALUES = {
    "normal": lambda w: w,
    "zeros": lambda w: w * 0,
    "constant": lambda w: torch.full_like(w, 0.3),
    "negative": lambda w: -w.abs() - 0.1,
    "offset": lambda w: w + 100,
    "outlier": lambda w: w + 1e4 * (w == w.max()),
    "zero rows": lambda w: w * (torch.arange(w.shape[1]) % 2).view(1, -1, 1),
    "huge": lambda w: w / w.abs().max() * torch.finfo(torch.float32).max,
    "subnormal": lambda w: w * 1e-40,
    "below any scale": lambda w: w * 1e-45,
}


def weights_of(shape, seed, values):
    return VALUES[values](torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def by_group(values, scheme):
    """[E, N, K] as float64 [E, N, groups, group size], the last group filled up with zeros."""
    size = values.shape[-1] if scheme.group_size == -1 else scheme.group_size
    padded = torch.nn.functional.pad(values.double(), (0, -values.shape[-1] % size))
    return padded.view(*values.shape[:2], -1, size)


stacks = given(
    name=st.sampled_from(INT_NAMES),
    values=st.sampled_from(list(VALUES)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
    seed=st.integers(0, 2**32),
)


@stacks
@settings(max_examples=150, deadline=None)
def test_error_is_within_half_a_step(name, values, shape, seed):
    """|w - w'| <= s/2, and where s was rounded below (max - min) / (2^b - 1), what the 2^b codes then cannot reach.

    Asymmetric codes cover (2^b - 1) s, so that at most (max - min) - (2^b - 1) s is out of reach: 0 for exact s, and up
    to 2^-8 (max - min) for a bf16 s, which is off by 2^-8 of itself at most. Symmetric ones: |w| / s is at most
    127 * 256/255 = 127.498, which rounds to 127: nothing is out of reach. Float32's own rounding: 2^-22 max|w|.
    """
    scheme = parse(name)
    w = weights_of(shape, seed, values)
    quantized = quantize(w, scheme)
    error = (by_group(w, scheme) - by_group(dequantize(quantized), scheme)).abs()
    groups, step = by_group(w, scheme), quantized.scales.double().unsqueeze(-1)
    bound = step / 2 + 2**-22 * groups.abs().amax(-1, keepdim=True)
    if not scheme.weights.symmetric:
        extent = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
        unreached = (extent - (2**scheme.weight_bits - 1) * step).clamp(min=0)
        assert (unreached <= 2**-8 * extent).all()
        bound += unreached
    assert (error <= bound).all()


@stacks
@settings(max_examples=60, deadline=None)
def test_codes_rise_with_the_weights_and_stay_in_range(name, values, shape, seed):
    scheme = parse(name)
    w = weights_of(shape, seed, values)
    quantized = quantize(w, scheme)
    assert int(quantized.codes.max()) < 2**scheme.weight_bits
    size = shape[2] if scheme.group_size == -1 else scheme.group_size
    for group, codes in zip(w.split(size, dim=-1), quantized.codes.split(size, dim=-1), strict=True):
        assert (codes.gather(-1, group.argsort(dim=-1)).int().diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("name", [name for name in INT_NAMES if name.endswith("_asym")])
def test_asymmetric_zero_is_exact(name):
    w = weights_of((1, 4, 256), 3, "offset")
    w[..., ::7] = 0
    assert (dequantize(quantize(w, parse(name)))[..., ::7] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_scales_are_positive(name):
    quantized = quantize(torch.zeros(2, 3, 130), parse(name))
    assert (dequantize(quantized) == 0).all()
    assert quantized.scales is None or (quantized.scales > 0).all()


@given(values=st.sampled_from(list(VALUES)), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_e4m3_error(values, seed):
    """4 significant bits: half a unit is 2^-4 of the value, or of the smallest normal, 2^-6: 2^-10 of the scale."""
    w = weights_of((2, 3, 100), seed, values)
    quantized = quantize(w, parse("w8a8_g-1_sym_e4m3"))
    error = (w.double() - dequantize(quantized).double()).abs()
    assert (error <= 2**-4 * w.double().abs() * (1 + 2**-20) + 2**-10 * quantized.scales.double()).all()


@pytest.mark.parametrize("values", VALUES)
def test_bf16_is_rounded_to_nearest(values):
    w = weights_of((2, 3, 100), 0, values)
    quantized = quantize(w, parse("w16a16"))
    assert quantized.codes.dtype is torch.bfloat16
    assert ((w.double() - dequantize(quantized).double()).abs() <= 2**-8 * w.double().abs() + 2**-133).all()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name):
    scheme = parse(name)
    quantized = format_of(scheme).quantize(torch.randn(5, 200, dtype=torch.float64))
    groups = 1 if scheme.group_size == -1 else -(-200 // scheme.group_size)
    assert quantized.codes.shape == (1, 5, 200)
    if scheme.weights is None:
        assert quantized.scales is None
    else:
        assert quantized.scales.shape == (1, 5, groups)
        assert quantized.scales.dtype is (torch.float32 if scheme.group_size == -1 else torch.bfloat16)
        is_float = scheme.weights.type is NumericType.FLOAT
        assert quantized.codes.dtype is (torch.float8_e4m3fn if is_float else torch.uint8)
    assert (quantized.zeros is None) == scheme.is_symmetric
    if quantized.zeros is not None:
        assert quantized.zeros.shape == (1, 5, groups)


@pytest.mark.parametrize("name", NAMES)
def test_experts_do_not_depend_on_each_other(name):
    w = weights_of((3, 4, 200), 1, "normal") * torch.tensor([1.0, 1e-3, 1e3]).view(3, 1, 1)
    scheme = parse(name)
    together = quantize(w, scheme)
    for expert in range(3):
        assert torch.equal(dequantize(together.expert(expert)), dequantize(quantize(w[expert], scheme)))


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_given_are_not_changed(name):
    w = weights_of((2, 3, 128), 2, "offset")
    before = w.clone()
    dequantize(quantize(w, parse(name)))
    assert torch.equal(w, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e39])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_with_its_place(name, value):
    w = torch.zeros(4, 6, 200, dtype=torch.float64)
    w[2, 5, 199] = value
    with pytest.raises(DataError, match="expert 2 have a NaN or an infinity in row 5"):
        quantize(w, parse(name))


def test_a_stack_too_large_for_one_go_is_quantised_in_several(monkeypatch):
    w = weights_of((5, 3, 200), 4, "normal")
    for name in NAMES:
        whole = quantize(w, parse(name))
        with monkeypatch.context() as patch:
            patch.setattr("kernel_gen.formats.weights.WEIGHTS_AT_ONCE", 1300)  # two experts
            parts = quantize(w, parse(name))
        assert parts.codes.dtype is whole.codes.dtype
        assert torch.equal(dequantize(parts), dequantize(whole))


@pytest.mark.parametrize("weights", [
    torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3), torch.zeros(1, 2, 3, 4),
    torch.zeros(2, 0, 3), torch.zeros(2, 3, 0), torch.zeros(0, 2, 3), torch.zeros(1, 2, 3).to_sparse(),
    torch.zeros(1, 2, 3, dtype=torch.float8_e4m3fn), torch.zeros(1, 2, 3, device="meta"),
], ids=lambda w: f"{w.dtype}{list(w.shape)}")  # fmt: skip
def test_what_is_no_stack_is_refused(weights):
    with pytest.raises(SpecError, match="weights: expected a tensor of floats"):
        quantize(weights, parse("w4a16_g128_sym"))
