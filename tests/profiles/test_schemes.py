import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.errors import SpecError
from profiles.gpus import Math
from profiles.schemes import KERNEL_SCHEMES, NumericType, QuantScheme, QuantSpec, Strategy, parse

WEIGHT_ONLY = [f"w{b}a16_g{g}_{z}" for b, g, z in itertools.product((2, 3, 4, 8), (-1, 64, 128), ("sym", "asym"))]
INT8 = [f"w{b}a8_g{g}_sym" for b, g in itertools.product((2, 3, 4, 8), (-1, 64, 128))]
E4M3 = ["w8a8_g-1_sym_e4m3"] + [f"w{b}a8_g{g}_sym_e4m3" for b, g in itertools.product((2, 3, 4), (-1, 64, 128))]
INT4 = [f"w{b}a4_g{g}_sym" for b, g in itertools.product((2, 3, 4, 8), (-1, 128))]
NAMES = ["w16a16", *WEIGHT_ONLY, *INT8, *E4M3, *INT4]

quant_specs = st.builds(
    QuantSpec,
    num_bits=st.sampled_from([2, 3, 4, 8]),
    type=st.just(NumericType.INT),
    symmetric=st.booleans(),
    strategy=st.just(Strategy.CHANNEL),
    group_size=st.none(),
    dynamic=st.booleans(),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back(name: str) -> None:
    assert parse(name).name == str(parse(name)) == name


@given(st.from_regex(r"w\d{1,2}a\d{1,2}_g(-1|\d{1,3})_a?sym(_e4m3)?", fullmatch=True))
def test_a_name_is_known_or_refused_in_a_sentence(name: str) -> None:
    if name in NAMES:
        assert parse(name).name == name
    else:
        with pytest.raises(SpecError, match="scheme"):
            parse(name)


@given(st.text())
def test_any_text_is_known_or_refused(text: str) -> None:
    try:
        name = parse(text).name
    except SpecError:
        return
    assert name == text


@given(st.none() | quant_specs, st.none() | quant_specs)
def test_what_can_be_constructed_has_a_name(weights: QuantSpec | None, activations: QuantSpec | None) -> None:
    try:
        scheme = QuantScheme(weights=weights, input_activations=activations)
    except SpecError:
        return
    assert parse(scheme.name) == scheme


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w5a16_g128_sym", "weights of 5 bits are not known, 2, 3, 4, 8 are"),
        ("w16a8_g-1_sym", "weights of 16 bits"),
        ("w4a5_g-1_sym", "activations of 5 bits are not known, 4, 8, 16 are"),
        ("w4a16_g32_sym", "group size 32 is not one of -1 .*, 64, 128"),
        ("w4a8_g128_asym", "need symmetric"),
        ("w8a8_g128_sym_e4m3", "one scale per channel"),
        ("w4a16_g128_sym_e4m3", "_e4m3 needs 8-bit activations"),
        ("w4a4_g64_sym", "g-1 or g128"),
        ("w04a16_g128_sym", "spelled 'w4a16_g128_sym'"),
        ("w4a16", "unknown scheme 'w4a16'"),
        ("W4A16_g128_sym", "unknown scheme"),
        ("w4a16_g128_sym\n", "unknown scheme"),
    ],
)
def test_a_refusal_says_which_rule(name: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse(name)


@given(st.sampled_from(NAMES), st.integers(1, 20_000))
def test_bits_per_weight_counts_codes_scales_and_zero_points(name: str, in_features: int) -> None:
    scheme = parse(name)
    if name == "w16a16":
        assert scheme.bits_per_weight(in_features) == 16
        return
    per_scale = (32 if scheme.group_size == -1 else 16) + (16 if "_asym" in name else 0)
    num_groups = 1 if scheme.group_size == -1 else math.ceil(in_features / scheme.group_size)
    stored = scheme.weight_bits * in_features + per_scale * num_groups
    assert scheme.bits_per_weight(in_features) * in_features == pytest.approx(stored)


def test_bits_per_weight_of_known_schemes() -> None:
    assert parse("w4a16_g128_asym").bits_per_weight(4096) == 4.25
    assert parse("w2a16_g64_sym").bits_per_weight(64) == 2.25
    assert parse("w8a8_g-1_sym_e4m3").bits_per_weight(2048) == 8 + 32 / 2048
    with pytest.raises(SpecError, match="in_features is 0"):
        parse("w4a16_g128_asym").bits_per_weight(0)


def test_the_activations_decide_the_math() -> None:
    expected = {"w16a16": Math.BF16, "w2a16_g64_asym": Math.BF16, "w4a8_g128_sym": Math.INT8, "w4a4_g-1_sym": Math.INT4}
    expected |= {"w8a8_g-1_sym_e4m3": Math.E4M3, "w4a8_g128_sym_e4m3": Math.E4M3}
    assert {name: parse(name).math for name in expected} == expected


def test_float8_activations_widen_integer_weights() -> None:
    scheme = parse("w4a8_g128_sym_e4m3")
    assert scheme.weights is not None
    assert scheme.input_activations is not None
    assert (scheme.weights.type, scheme.input_activations.type) == (NumericType.INT, NumericType.FLOAT)


def test_activations_of_4_bits_are_grouped_as_the_weights_are() -> None:
    grouped, per_token = parse("w4a4_g128_sym").input_activations, parse("w4a4_g-1_sym").input_activations
    assert grouped is not None
    assert per_token is not None
    assert (grouped.strategy, grouped.group_size) == (Strategy.GROUP, 128)
    assert (per_token.strategy, per_token.group_size) == (Strategy.TOKEN, None)


def test_the_kernels_schemes_are_those_of_the_design() -> None:
    names = {scheme.name for scheme in KERNEL_SCHEMES}
    assert len(names) == len(KERNEL_SCHEMES) == 24
    assert names > {"w16a16", "w3a16_g128_asym", "w2a16_g-1_sym", "w8a8_g-1_sym", "w4a8_g-1_sym", "w4a4_g128_sym"}
    assert all(
        scheme.is_weight_only == scheme.name.endswith(("6_g128_sym", "6_g-1_sym", "asym")) for scheme in KERNEL_SCHEMES
    )
