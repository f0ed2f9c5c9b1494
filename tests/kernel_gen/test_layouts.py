"""The layouts' facts: sizes, refusals, and that no torch is needed for them."""

import subprocess
import sys

import pytest

from kernel_gen.layouts import ActivationKind, layout_of
from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.schemes import KERNEL_SCHEMES, parse

SCHEMES = pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=str)


@SCHEMES
def test_a_unit_holds_every_code_once(scheme):
    layout = layout_of(scheme)
    sizes = dict((*layout.axes.rows, *layout.axes.ks))
    assert sum(plane.num_bits for plane in layout.planes) == layout.weight_bits
    for plane in layout.planes:
        assert sorted((*plane.order, *plane.fields)) == sorted(sizes)
        assert all(sizes[field] == 2 for field in plane.fields)
        assert plane.num_bits << len(plane.fields) in (8, 16)
    assert sum(plane.words_per_lane(layout.k_tile) for plane in layout.planes) == layout.words_per_lane
    assert layout.unit_bytes == 4 * layout.unit_words == layout.weight_bits * 64 * layout.k_tile // 8


@SCHEMES
@pytest.mark.parametrize(("n", "k"), [(64, 128), (2816, 2048), (2048, 1408)])
def test_packed_bytes_are_bits_per_weight(scheme, n, k):
    bits = 8 * layout_of(scheme).packed_bytes(n, k, 3) / (3 * n * k)
    assert bits == pytest.approx(scheme.bits_per_weight(k), rel=1e-12)


@SCHEMES
def test_padding_rules(scheme):
    layout = layout_of(scheme)
    assert layout.padded_n(1) == layout.padded_n(64) == 64
    assert layout.padded_n(65) == 128
    assert layout.padded_k(2881) == layout.num_k_tiles(2881) * layout.k_tile
    assert layout.num_groups(2880) == (1 if scheme.group_size == -1 else 23)
    assert layout.packed_bytes(65, 1, 1) == layout.packed_bytes(128, layout.k_tile, 1)


@pytest.mark.parametrize(
    ("name", "math", "k_tile", "unit_bytes", "x_row_bytes", "activation"),
    [
        ("w16a16", Math.BF16, 64, 8192, 128, ActivationKind.BF16),
        ("w3a16_g128_asym", Math.BF16, 64, 1536, 128, ActivationKind.BF16),
        ("w4a8_g128_sym", Math.INT8, 128, 4096, 128, ActivationKind.INT8),
        ("w8a8_g-1_sym_e4m3", Math.E4M3, 128, 8192, 128, ActivationKind.E4M3),
        ("w4a4_g-1_sym", Math.INT4, 128, 4096, 64, ActivationKind.INT4),
        ("w4a4_g128_sym", Math.INT4, 128, 4096, 64, ActivationKind.INT4_GROUP),
    ],
)
def test_known_layouts(name, math, k_tile, unit_bytes, x_row_bytes, activation):
    layout = layout_of(parse(name))
    found = (layout.math, layout.k_tile, layout.unit_bytes, layout.x_row_bytes, layout.activation)
    assert found == (math, k_tile, unit_bytes, x_row_bytes, activation)


def test_strips_and_scales_are_there_when_the_scheme_has_them():
    grouped, channel, plain = (layout_of(parse(name)) for name in ("w4a16_g64_asym", "w4a16_g-1_asym", "w16a16"))
    assert (grouped.scale_strip_bytes, grouped.zero_strip_bytes, grouped.has_channel_scales) == (128, 128, False)
    assert (channel.scale_strip_bytes, channel.zero_strip_bytes, channel.has_channel_scales) == (0, 128, True)
    assert (plain.scale_strip_bytes, plain.zero_strip_bytes, plain.has_channel_scales) == (0, 0, False)
    assert (grouped.k_tiles_per_group, channel.k_tiles_per_group) == (1, 0)
    assert layout_of(parse("w4a16_g128_sym")).k_tiles_per_group == 2


@pytest.mark.parametrize(("name", "k", "stride", "scales"), [
    ("w16a16", 13, 32, 0),
    ("w8a8_g-1_sym", 129, 256, 1),
    ("w4a4_g-1_sym", 129, 128, 1),
    ("w4a4_g128_sym", 129, 128, 2),
])  # fmt: skip
def test_activation_rows(name, k, stride, scales):
    layout = layout_of(parse(name))
    assert (layout.x_stride_bytes(k), layout.num_x_scales(k)) == (stride, scales)


def test_a_scheme_without_a_layout_is_refused_with_every_reason():
    with pytest.raises(UnsupportedError, match="w2a8_g64_sym") as refusal:
        layout_of(parse("w2a8_g64_sym"))
    assert refusal.value.reasons == (
        "2-bit weights have no packing for INT8 tensor cores, 4, 8 have",
        "group 64 is not a multiple of the INT8 k-tile, 128",
    )


@pytest.mark.parametrize("name", ["w8a8_g64_sym", "w4a8_g64_sym", "w4a8_g64_sym_e4m3", "w8a4_g-1_sym", "w3a8_g-1_sym"])
def test_no_layout(name):
    with pytest.raises(UnsupportedError):
        layout_of(parse(name))


def test_layouts_need_no_torch():
    code = "import sys, kernel_gen.layouts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
