import pytest

from kernel_gen.legality import reasons
from kernel_gen.space import Effort, candidates, enumerate_configs, space, summarise
from profiles import kernels, schemes
from profiles.gpus import gpu
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

ON_ADA = [scheme for scheme in KERNEL_SCHEMES if scheme.name != "w4a8_g128_sym_e4m3"]
W4A16 = schemes.parse("w4a16_g128_sym")


@pytest.mark.parametrize("effort", Effort)
def test_space_is_deterministic_and_has_no_duplicates(effort: Effort) -> None:
    names = [config.name for config in space(effort)]
    assert names == [config.name for config in space(effort)]
    assert effort is Effort.QUICK or len(names) == len(set(names))
    enumerated = [config.name for config, _ in enumerate_configs([W4A16], gpu("rtx4090"), effort)]
    assert len(enumerated) == len(set(enumerated))
    assert set(enumerated) <= set(names)


@pytest.mark.parametrize("scheme", ON_ADA, ids=str)
def test_quick_covers_decode_to_prefill(scheme: QuantScheme) -> None:
    legal = candidates([scheme], gpu("rtx4090"), Effort.QUICK)
    assert 6 <= len(legal) <= 10
    widths = {config.tile.n for config in legal}
    assert {8, 16, 32, 64, 128} <= widths
    assert all(reasons(config, [scheme], gpu("rtx4090")) == () for config in legal)


def test_quick_mixed_launch() -> None:
    mix = [schemes.parse(name) for name in ("w4a16_g128_sym", "w8a8_g-1_sym", "w2a16_g128_asym", "w4a4_g128_sym")]
    assert {8, 16, 32, 64} <= {config.tile.n for config in candidates(mix, gpu("rtx4090"), Effort.QUICK)}


def test_full_holds_every_kind_and_only_what_survives() -> None:
    legal = candidates([W4A16], gpu("h200"), Effort.FULL)
    assert {config.tile.m for config in legal} == {64, 128, 256}
    assert {config.tile.n for config in legal} == {8, 16, 32, 64, 128, 256}
    assert {config.raster for config in legal} == set(kernels.Raster)
    assert {config.min_ctas_per_sm for config in legal} == {1, 2, 3, 4}
    assert {2, 8} <= {config.num_stages for config in legal}
    assert len(legal) > len(candidates([W4A16], gpu("h200"), Effort.QUICK))


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
