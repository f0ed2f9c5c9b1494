"""How tiles fall to rounds: narrower last tiles at their own cost, partial rounds, and that the calibrated core never
falls with tokens whatever its factors.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.analytic import launch_latency
from costmodel.calibration import FACTORS, CalibratedCore
from costmodel.features import of_launches
from costmodel.kernel_use import nominal_facts
from costmodel.launches import Launch
from kernel_gen.space import Effort, candidates
from profiles import kernels, schemes
from profiles.gpus import Math, gpu
from profiles.kernels import GemmShape
from profiles.loads import TokenLoad

H200 = gpu("h200")
KERNELS = [
    (schemes.parse(name), config)
    for name in ("w4a16_g128_sym", "w8a8_g-1_sym_e4m3", "w4a8_g128_sym", "w16a16")
    for config in candidates([schemes.parse(name)], H200, Effort.QUICK)
]


def launch(config: str, scheme: str, n: int, tokens: list[int]) -> Launch:
    of = kernels.parse(config)
    load = TokenLoad(tokens_per_expert=tuple(tokens), source="test")
    return Launch(
        shape=GemmShape(m=0, n=n, k=2048),
        load=load,
        schemes=(schemes.parse(scheme),),
        config=of,
        facts=nominal_facts(of),
    )


@pytest.mark.parametrize("scheme", ["w16a16", "w4a8_g128_sym", "w8a8_g-1_sym"])
def test_where_every_tile_is_narrow_they_cost_what_narrow_tiles_cost(scheme: str) -> None:
    tokens = [16] * 20 + [3] * 20
    tailed, narrow = (
        launch(config, scheme, 2816, tokens)
        for config in ("wgmma_128x64_w8x1x1_s4_k1_at_o1_t16", "wgmma_128x16_w8x1x1_s4_k1_at_o1")
    )
    found = of_launches(H200, [tailed, narrow])
    for name in ("latency_us", "tensor_us", "issue_us", "l2_us", "smem_us", "chain_us", "warp_us", "epilogue_us"):
        assert found[name][0] == pytest.approx(found[name][1]), name
    assert of_launches(H200, [launch("wgmma_128x64_w8x1x1_s4_k1_at_o1", scheme, 2816, tokens)])["l2_us"][0] > (
        1.2 * found["l2_us"][0]
    )


@pytest.mark.parametrize("ctas_per_sm", [3, 5])
@pytest.mark.parametrize("config", ["wgmma_128x8_w4x1x1_s8_k1_at_o3", "mma_64x8_w4x1x1_s6_k1_at_o4"])
def test_a_slower_scheme_in_the_last_round_makes_nothing_faster(config: str, ctas_per_sm: int) -> None:
    """What takes longest on a full SM may be faster alone than what shares its round."""
    of, loads = kernels.parse(config), [(0, 8), (1, 8), (8, 8), (64, 8)]
    names = ("w8a8_g-1_sym", "w3a16_g128_asym", "w16a16", "w2a16_g-1_sym", "w4a16_g128_asym")
    launches = [
        Launch(
            shape=GemmShape(m=0, n=4096, k=14336),
            load=TokenLoad(tokens_per_expert=tokens, source="test"),
            schemes=(schemes.parse(first), schemes.parse(second)),
            config=of,
            facts=nominal_facts(of, ctas_per_sm),
        )
        for first, second in itertools.permutations(names, 2)
        for tokens in loads
    ]
    found = of_launches(H200, launches)
    for name in ("latency_us", "makespan_us", *(f"{part}_us" for part in ("tensor", "issue", "smem", "chain", "warp"))):
        grows = np.diff(found[name].to_numpy(dtype=np.float64).reshape(-1, len(loads)), axis=1)
        assert (grows >= -1e-6).all(), name


def test_one_large_expert_keeps_its_wide_tile() -> None:
    tailed = "wgmma_128x256_w8x1x1_s3_k1_at_o1_t64"
    few = launch(tailed, "w16a16", 128, [1])
    large = launch(tailed, "w16a16", 128, [256])
    wide = launch("wgmma_128x256_w8x1x1_s3_k1_at_o1", "w16a16", 128, [256])
    tensor_us = of_launches(H200, [few, large, wide])["tensor_us"]
    assert tensor_us[1] == pytest.approx(tensor_us[2])
    assert tensor_us[0] == pytest.approx(tensor_us[2] / 4)


def test_where_half_of_the_tiles_are_wide_some_cta_has_more_than_its_share() -> None:
    """132 CTAs, 4 rounds of tiles of 128 or of 32 tokens."""
    tailed, whole = "wgmma_128x128_w8x1x1_s4_k1_at_o1_t32", "wgmma_128x128_w8x1x1_s4_k1_at_o1"
    narrow, mixed, wide = (launch(tailed, "w16a16", 1408, tokens) for tokens in ([32] * 48, [128, 32] * 24, [128] * 48))
    found = of_launches(H200, [narrow, mixed, wide, launch(whole, "w16a16", 1408, [128] * 48)])["tensor_us"]
    assert (found[0] + found[2]) / 2 < 0.95 * found[1]
    assert found[1] < found[2] == pytest.approx(found[3])


def test_a_partial_round_costs_more_than_its_share() -> None:
    """1.25 rounds of two CTAs an SM: the last quarter takes more than a quarter of a round, and not more than one."""
    config = "wgmma_256x16_w8x1x1_s5_k1_at_o2"
    one, quarter_more, two = (launch(config, "w4a16_g128_sym", 256 * tiles, [16] * 4) for tiles in (66, 66 + 17, 132))
    found = of_launches(H200, [one, quarter_more, two])
    assert found["full_rounds"].tolist() == [1.0, 1.0, 2.0]
    assert found["stream_rounds"].tolist() == [1.0, 1.0, 2.0]
    assert found["stream_rest_is_last"].tolist() == [1.0, 1.0, 1.0]
    latency = found["latency_us"]
    assert latency[0] + 0.4 * (latency[2] - latency[0]) < latency[1] <= latency[2]


@given(
    tokens=st.lists(st.integers(0, 400), min_size=1, max_size=80),
    at=st.integers(0, 79),
    kernel=st.sampled_from(KERNELS),
    n=st.sampled_from((256, 1408, 2816, 28672)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300)
def test_whatever_the_factors_one_more_token_is_never_faster(
    tokens: list[int], at: int, kernel: tuple[schemes.QuantScheme, kernels.KernelConfig], n: int, seed: int
) -> None:
    scheme, config = kernel
    more = list(tokens)
    more[at % len(tokens)] += 1
    launches = [launch(config.name, scheme.name, n, each) for each in (tokens, more)]
    factors = np.exp(np.random.default_rng(seed).normal(0, 2, (2, len(Math), len(FACTORS))))
    before, after = CalibratedCore(factors=factors).log_us(of_launches(H200, launches).to_numpy(dtype=np.float32))
    assert after >= before - 1e-6


def test_the_core_itself_sums_the_rounds_by_hand() -> None:
    """One scheme, three rounds and a partial one: makespan and latency lie between the full rounds and one more."""
    config = kernels.parse("wgmma_128x128_w8x1x1_s4_k1_at_o1")
    scheme = schemes.parse("w16a16")

    def priced(feature_tiles: int) -> float:
        load = TokenLoad(tokens_per_expert=(128,), source="test")
        shape = GemmShape(m=0, n=128 * feature_tiles, k=2048)
        return launch_latency(H200, shape, load, [scheme], config, nominal_facts(config)).makespan_us

    assert priced(3 * 132) == pytest.approx(3 * priced(132))
    assert priced(3 * 132 + 40) == pytest.approx(3 * priced(132) + priced(132), rel=0.05)
