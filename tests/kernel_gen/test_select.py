"""Choosing a configuration without measuring."""

import numpy as np
import pytest

from costmodel.features import Kernels
from costmodel.shipped import fitted
from kernel_gen.legality import reasons
from kernel_gen.select import Ranking, choose, kernel_uses, ranking, table_size
from profiles import gpus, schemes
from profiles.errors import DataError, SpecError, UnsupportedError
from profiles.loads import TokenLoad

W4 = schemes.parse("w4a16_g128_sym")
W8 = schemes.parse("w8a8_g-1_sym")


@pytest.mark.parametrize("gpu", [gpus.gpu("rtx4090"), gpus.gpu("h200")], ids=str)
@pytest.mark.parametrize("per_expert", [[W4] * 60, [W4, W8] * 30], ids=["one scheme", "mixed"])
def test_the_choice_is_legal_and_tiles_grow_with_the_load(gpu, per_expert) -> None:
    chosen = [choose(per_expert, 2816, 2048, rows, gpu) for rows in (1, 64, 2048, 32768)]
    assert all(not reasons(config, tuple(dict.fromkeys(per_expert)), gpu) for config in chosen)
    assert chosen[0].tile.n < chosen[-1].tile.n


def test_close_batch_sizes_share_a_kernel() -> None:
    gpu = gpus.gpu("rtx4090")
    assert len({choose([W4] * 8, 1024, 512, rows, gpu) for rows in range(129, 257)}) == 1


def test_schemes_that_cannot_share_a_launch_are_refused() -> None:
    both = [schemes.parse("w4a4_g-1_sym"), schemes.parse("w4a4_g128_sym")]
    with pytest.raises(UnsupportedError, match=r"one launch of w4a4_g-1_sym, w4a4_g128_sym on rtx4090 .* mma_.*: "):
        choose(both, 1024, 512, 64, gpus.gpu("rtx4090"))


def test_five_schemes_are_refused_with_the_number() -> None:
    names = ("w16a16", "w8a16_g128_sym", "w4a16_g128_sym", "w3a16_g128_sym", "w2a16_g128_sym")
    with pytest.raises(UnsupportedError, match="5 schemes: a kernel holds 1 to 4"):
        choose([schemes.parse(name) for name in names], 1024, 512, 64, gpus.gpu("h200"))


def test_more_experts_than_a_table_holds_are_refused() -> None:
    with pytest.raises(SpecError, match="experts: expected at most 1024, which a kernel's table holds, got 1025"):
        choose([W4] * 1025, 1024, 512, 64, gpus.gpu("h200"))


def test_the_fitted_model_chooses_where_launches_were_recorded_and_the_core_elsewhere() -> None:
    h200, rtx4090 = gpus.gpu("h200"), gpus.gpu("rtx4090")
    assert (ranking(h200), ranking(rtx4090)) == (Ranking.FITTED, Ranking.CORE)
    sizes = (1, 16, 64, 256, 1024, 4096, 32768)
    by_model, by_core = (
        [choose([W4] * 60, 2816, 2048, rows, h200, by=by) for rows in sizes] for by in (Ranking.FITTED, Ranking.CORE)
    )
    assert by_model == [choose([W4] * 60, 2816, 2048, rows, h200) for rows in sizes]
    assert by_model != by_core
    uses = kernel_uses((W4,) * 60, 2816, 2048, h200, None)
    load = TokenLoad(tokens_per_expert=(18,) * 4 + (17,) * 56, source="even")
    X = Kernels(h200, uses).matrix([load], np.arange(len(uses)), np.zeros(len(uses), dtype=np.intp))
    assert uses[int(fitted(h200).model.latencies_us(X).argmin())].config == by_model[4]
    with pytest.raises(DataError, match="no launches of rtx4090"):
        choose([W4] * 60, 2816, 2048, 64, rtx4090, by=Ranking.FITTED)


@pytest.mark.parametrize(("experts", "size"), [(8, 256), (256, 256), (257, 512), (1024, 1024)])
def test_table_size(experts: int, size: int) -> None:
    assert table_size(experts) == size
