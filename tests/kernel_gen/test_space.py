import dataclasses

import pytest

from kernel_gen.legality import reasons
from kernel_gen.space import Effort, candidates, enumerate_configs, quick_picks, space, summarise
from profiles import kernels, schemes
from profiles.gpus import Math, gpu
from profiles.kernels import Family
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

ON_ADA = [scheme for scheme in KERNEL_SCHEMES if scheme.name != "w4a8_g128_sym_e4m3"]
W4A16 = schemes.parse("w4a16_g128_sym")


@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("on", ["rtx4090", "h200"])
def test_space_is_deterministic_and_has_no_duplicates(effort: Effort, on: str) -> None:
    names = [config.name for config in space(effort, gpu(on))]
    assert names == [config.name for config in space(effort, gpu(on))]
    assert effort is Effort.QUICK or len(names) == len(set(names))
    enumerated = [config.name for config, _ in enumerate_configs([W4A16], gpu(on), effort)]
    assert len(enumerated) == len(set(enumerated))
    assert set(enumerated) <= set(names)
    assert {config.family for config in space(effort, gpu(on))} == (set(Family) if on == "h200" else {Family.MMA})


@pytest.mark.parametrize("scheme", ON_ADA, ids=str)
def test_quick_covers_decode_to_prefill(scheme: QuantScheme) -> None:
    legal = candidates([scheme], gpu("rtx4090"), Effort.QUICK)
    assert 6 <= len(legal) <= 10
    widths = {config.tile.n for config in legal}
    assert {8, 16, 32, 64, 128} <= widths
    assert all(reasons(config, [scheme], gpu("rtx4090")) == () for config in legal)


@pytest.mark.parametrize("scheme", [scheme for scheme in KERNEL_SCHEMES if scheme.math is not Math.INT4], ids=str)
def test_quick_on_hopper_is_mostly_wgmma_and_covers_decode_to_prefill(scheme: QuantScheme) -> None:
    legal = candidates([scheme], gpu("h200"), Effort.QUICK)
    wgmma = [config for config in legal if config.family is Family.WGMMA]
    assert 16 <= len(legal) <= len(quick_picks(gpu("h200")))
    assert len(wgmma) >= len(legal) - 2
    assert {8, 16, 32, 48, 64, 128} <= {config.tile.n for config in wgmma}
    assert max(config.min_ctas_per_sm for config in wgmma if config.tile.n == 8) == 4
    assert {config.min_ctas_per_sm for config in wgmma if config.tile.n >= 128} == {1}
    assert {config.family for config in legal} == ({Family.WGMMA} if scheme.math is Math.E4M3 else set(Family))


def test_quick_on_hopper_has_the_few_token_kernels_that_measured_fastest() -> None:
    """Tiles of 8 tokens, and of 16 whose last one may have 8."""
    for name in ("w2a16_g128_asym", "w3a16_g-1_sym", "w4a16_g128_sym", "w4a8_g128_sym_e4m3"):
        legal = candidates([schemes.parse(name)], gpu("h200"), Effort.QUICK)
        assert {64, 128, 256} <= {c.tile.m for c in legal if c.tile.n == 8}
        assert {c.tile.m for c in legal if c.tail == 8 and c.tile.n == 16} == {128, 256}


def test_split_k_is_tried_where_few_tiles_have_a_long_reduction() -> None:
    """Tiles of 8 tokens (docs/kernels.md)."""
    quick = candidates([W4A16], gpu("h200"), Effort.QUICK)
    assert {(c.tile.m, c.split_k) for c in quick if c.split_k > 1} == {(128, 4), (256, 2)}
    assert {c.tile.n for c in quick if c.split_k > 1} == {8}
    assert {c.split_k for c in candidates([W4A16], gpu("h200"), Effort.FULL)} == {1, 2, 4}


@pytest.mark.parametrize(
    ("mix", "tiles"),
    [
        ("w4a8_g-1_sym+w8a8_g-1_sym", {(256, 128, 0), (256, 160, 0)}),
        ("w4a8_g128_sym_e4m3+w8a8_g-1_sym_e4m3", {(128, 192, 96), (128, 160, 80), (128, 160, 0)}),
        ("w2a16_g128_sym+w4a8_g128_sym_e4m3+w8a8_g-1_sym_e4m3", {(128, 160, 0), (128, 160, 80)}),
    ],
)
def test_mixes_have_the_wide_tiles_of_prefill(mix: str, tiles: set[tuple[int, int, int]]) -> None:
    """Registers hold the sums of both kinds of scales, of up to 192 tokens."""
    legal = candidates([schemes.parse(name) for name in mix.split("+")], gpu("h200"), Effort.QUICK)
    assert tiles <= {(c.tile.m, c.tile.n, c.tail) for c in legal}


def test_quick_takes_the_most_stages_that_fit() -> None:
    for scheme in (W4A16, schemes.parse("w16a16")):
        for config in candidates([scheme], gpu("h200"), Effort.QUICK):
            more = dataclasses.replace(config, num_stages=config.num_stages + 1)
            at_most = next(
                pick.max_stages
                for pick in quick_picks(gpu("h200"))
                if (pick.family, pick.tile_m, pick.tile_n, pick.warps_m, pick.cluster)
                == (config.family, config.tile.m, config.tile.n, config.warps.m, config.cluster)
                and config.tail in pick.tails
            )
            assert config.num_stages == at_most or any("smem" in why for why in reasons(more, [scheme], gpu("h200")))


def test_mixed_launches_on_hopper() -> None:
    """fp8 needs wgmma, so a mix with it has no mma kernel; four kinds of math and scales in one launch still cover
    decode to prefill.
    """
    names = ("w4a16_g128_asym", "w8a8_g-1_sym", "w8a8_g-1_sym_e4m3", "w4a8_g128_sym_e4m3")
    legal = candidates([schemes.parse(name) for name in names], gpu("h200"), Effort.QUICK)
    assert {config.family for config in legal} == {Family.WGMMA}
    assert {8, 16, 32, 48, 64, 128} <= {config.tile.n for config in legal}
    both = candidates([schemes.parse(name) for name in names[:2]], gpu("h200"), Effort.QUICK)
    assert {config.family for config in both} == set(Family)
    assert candidates([schemes.parse("w4a4_g-1_sym"), W4A16], gpu("h200"), Effort.QUICK) == ()


def test_quick_mixed_launch() -> None:
    mix = [schemes.parse(name) for name in ("w4a16_g128_sym", "w8a8_g-1_sym", "w2a16_g128_asym", "w4a4_g128_sym")]
    assert {8, 16, 32, 64} <= {config.tile.n for config in candidates(mix, gpu("rtx4090"), Effort.QUICK)}


def test_full_holds_every_kind_and_only_what_survives() -> None:
    everything = candidates([W4A16], gpu("h200"), Effort.FULL)
    legal = [config for config in everything if config.family is Family.MMA]
    assert {config.tile.m for config in legal} == {64, 128, 256}
    assert {config.tile.n for config in legal} == {8, 16, 32, 64, 128, 256}
    assert {config.raster for config in legal} == set(kernels.Raster)
    assert {config.min_ctas_per_sm for config in legal} == {1, 2, 3, 4}
    assert {2, 8} <= {config.num_stages for config in legal}
    wgmma = [config for config in everything if config.family is Family.WGMMA]
    assert {config.tile.m for config in wgmma} == {64, 128, 192, 256, 384}
    assert {config.tile.n for config in wgmma} == {8, 16, 32, 48, 64, 96, 128, 160, 192, 256}
    assert {config.warps.m for config in wgmma} == {4, 8, 12}
    assert {config.min_ctas_per_sm for config in wgmma} == {1, 2, 3, 4}
    assert {(config.tile.n, config.split_k) for config in wgmma if config.tile.n <= 16} == {
        (tile_n, split_k) for tile_n in (8, 16) for split_k in (1, 2, 4)
    }
    assert {config.tail for config in wgmma if config.tile.n <= 16} == {0, 8}
    assert {config.split_k for config in wgmma if config.tile.n > 16} == {1}
    assert set(candidates([W4A16], gpu("h200"), Effort.QUICK)).isdisjoint(
        config for config, found in enumerate_configs([W4A16], gpu("h200"), Effort.FULL) if found
    )


def test_nothing_is_legal_where_the_math_is_missing() -> None:
    scheme = schemes.parse("w4a4_g-1_sym")
    assert candidates([scheme], gpu("h200"), Effort.QUICK) == ()
    assert candidates([scheme], gpu("h200"), Effort.QUICK, allow_emulated=True)
    summary = summarise(enumerate_configs([scheme], gpu("h200"), Effort.QUICK))
    assert summary.num_legal == 0
    assert "no int4 tensor cores on sm_90 (h200)" in str(summary)


def test_summary_counts_reasons_that_differ_in_numbers_only_as_one() -> None:
    enumerated = list(enumerate_configs([schemes.parse("w16a16")], gpu("rtx4090"), Effort.FULL))
    summary = summarise(enumerated)
    assert summary.num_legal + summary.num_rejected == len(enumerated)
    kinds = [kind for kind, _, _ in summary.by_kind]
    assert "smem N KiB > N KiB per block on rtx4090" in kinds
    assert len(kinds) <= 6
    counts = [count for _, count, _ in summary.by_kind]
    assert counts == sorted(counts, reverse=True)
