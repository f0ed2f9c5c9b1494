"""What the wgmma family multiplies, sums and deals out for each width of a token tile."""

import pytest

from kernel_gen.layouts import layout_of
from kernel_gen.smem_wgmma import SumOf, multiplies_in_warps, producer_registers, producer_warps, sum_of
from profiles import kernels, schemes
from profiles.gpus import Math
from profiles.schemes import KERNEL_SCHEMES

WIDTHS = (8, 16, 32, 128)


@pytest.mark.parametrize(
    ("name", "sums_groups_at"),
    [
        ("w16a16", ()),
        ("w4a16_g-1_asym", ()),
        ("w8a8_g-1_sym", ()),
        ("w4a16_g128_sym", (8, 16)),
        ("w2a16_g128_asym", (8, 16)),
        ("w8a16_g128_sym", (8,)),
        ("w4a8_g128_sym", WIDTHS),
        ("w4a8_g128_sym_e4m3", WIDTHS),
        ("w4a16_g64_sym", (8,)),
        ("w3a16_g64_asym", (8,)),
        ("w2a16_g64_asym", (8,)),
    ],
)
def test_where_sums_of_groups_are_scaled(name: str, sums_groups_at: tuple[int, ...]) -> None:
    """In wgmma two k-tiles are summed at a time, so that both must have the same scales: groups of 64, one k-tile, are
    scaled as weights there. mma.sync ends a sum where its group ends.
    """
    layout = layout_of(schemes.parse(name))
    assert tuple(tile_n for tile_n in WIDTHS if sum_of(layout, tile_n) is SumOf.GROUPS) == sums_groups_at


@pytest.mark.parametrize("scheme", [scheme for scheme in KERNEL_SCHEMES if scheme.math is not Math.INT4], ids=str)
def test_mma_sync_multiplies_8_tokens_of_bf16_and_nothing_else(scheme: schemes.QuantScheme) -> None:
    found = [tile_n for tile_n in WIDTHS if multiplies_in_warps(layout_of(scheme), tile_n)]
    assert found == ([8] if scheme.math is Math.BF16 else [])


def test_every_producer_warp_has_a_stage_to_fill() -> None:
    configs = [kernels.parse(f"wgmma_128x16_w4x1x1_s{stages}_k1_at_o2") for stages in (2, 3, 4, 8)]
    assert [producer_warps(config) for config in configs] == [2, 2, 4, 4]


def test_consumers_of_the_narrowest_tiles_leave_the_producer_more_registers() -> None:
    narrow, wide = (kernels.parse(f"wgmma_64x{tile_n}_w4x1x1_s4_k1_at_o4") for tile_n in (8, 16))
    assert (producer_registers(narrow), producer_registers(wide)) == (32, 24)
