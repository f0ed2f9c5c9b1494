"""Laws of the analytic model, and checks against published and measured figures (which it was not fitted to)."""

import dataclasses
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import analytic
from costmodel.analytic import (
    BREAKDOWN_COLUMNS,
    LatencyBreakdown,
    launch_latencies,
    launch_latency,
    marginal_expert_cost,
)
from costmodel.constants import DEFAULT_CONSTANTS, FEW_STAGES, MMA_K, PRODUCER_WARPS
from costmodel.facts import BuildFacts
from costmodel.launches import Launch
from costmodel.splits import split_load
from costmodel.work import K_TILE, expert_weight_bytes, tile_work, token_bytes
from costmodel.work import multiplies_in_warps as counted_in_warps
from kernel_gen.layouts import layout_of
from kernel_gen.legality import estimated_facts
from kernel_gen.smem import stage_layout
from kernel_gen.smem_wgmma import SumOf, multiplies_in_warps, producer_warps, sum_of, wgmma_arrays
from kernel_gen.space import Effort, candidates
from profiles import kernels, loads, schemes
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec, Math, gpu
from profiles.kernels import Family, GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import KERNEL_SCHEMES, QuantScheme

ADA, HOPPER = gpu("rtx4090"), gpu("h200")
ON_ADA = tuple(scheme for scheme in KERNEL_SCHEMES if scheme.name != "w4a8_g128_sym_e4m3")
QUICK = {scheme: candidates([scheme], ADA, Effort.QUICK) for scheme in ON_ADA}
W4A16, W8A8, W16A16 = (schemes.parse(name) for name in ("w4a16_g128_sym", "w8a8_g-1_sym", "w16a16"))


class Kernel(NamedTuple):
    on: GpuSpec
    scheme: QuantScheme
    config: KernelConfig


KERNELS = [
    Kernel(on, scheme, config)
    for on in (ADA, HOPPER)
    for scheme in KERNEL_SCHEMES
    for config in candidates([scheme], on, Effort.QUICK)
]
"""Both families: on the H200 most are wgmma."""
any_kernel = st.sampled_from(KERNELS)
any_shape = st.builds(
    GemmShape,
    m=st.just(0),
    n=st.sampled_from((64, 704, 1408, 2048, 2816, 28672)),
    k=st.sampled_from((64, 1408, 2048, 2880, 4096, 14336)),
)
any_tokens = st.lists(st.integers(0, 2000), min_size=1, max_size=64)


def facts_of(config: KernelConfig, *of: QuantScheme, on: GpuSpec = ADA) -> BuildFacts:
    return estimated_facts(config, of, on)


def load_of(tokens: list[int]) -> TokenLoad:
    return TokenLoad(tokens_per_expert=tuple(tokens), source="test")


def latency(shape: GemmShape, tokens: list[int], kernel: Kernel) -> LatencyBreakdown:
    facts = facts_of(kernel.config, kernel.scheme, on=kernel.on)
    return launch_latency(kernel.on, shape, load_of(tokens), [kernel.scheme], kernel.config, facts)


@given(shape=any_shape, tokens=any_tokens, kernel=any_kernel)
def test_never_below_the_roofline(shape: GemmShape, tokens: list[int], kernel: Kernel) -> None:
    found = latency(shape, tokens, kernel)
    on, scheme, _ = kernel
    active = sum(count > 0 for count in tokens)
    bytes_once = active * shape.n * shape.k * scheme.weight_bits / 8 + sum(tokens) * (
        shape.k * scheme.activation_bits / 8 + shape.n * 2
    )
    assert found.roofline_us >= bytes_once / (on.dram_gbps * 1e3) * (1 - 1e-9)
    assert found.roofline_us >= found.flops / (on.tensor_tops[scheme.math] * 1e6) * (1 - 1e-9)
    assert found.latency_us >= found.roofline_us + found.launch_us
    assert found.padding >= 1 - 1e-9


@given(shape=any_shape, tokens=any_tokens, kernel=any_kernel, data=st.data())
def test_one_more_token_is_never_cheaper(
    shape: GemmShape, tokens: list[int], kernel: Kernel, data: st.DataObject
) -> None:
    """Holds for a token of a busy expert and for one that activates an idle expert."""
    expert = data.draw(st.integers(0, len(tokens) - 1))
    more = list(tokens)
    more[expert] += data.draw(st.integers(1, 300))
    assert latency(shape, more, kernel).latency_us >= latency(shape, tokens, kernel).latency_us * (1 - 1e-12)


@given(shape=any_shape, count=st.integers(1, 500), kernel=any_kernel, experts=st.integers(1, 63))
def test_more_active_experts_are_never_cheaper(shape: GemmShape, count: int, kernel: Kernel, experts: int) -> None:
    fewer = latency(shape, [count] * experts + [0] * (64 - experts), kernel)
    more = latency(shape, [count] * (experts + 1) + [0] * (63 - experts), kernel)
    assert more.latency_us >= fewer.latency_us


@given(shape=any_shape, kernel=any_kernel, tokens=st.lists(st.integers(0, 4000), min_size=2, max_size=30))
def test_marginal_cost_rises_with_tokens(shape: GemmShape, kernel: Kernel, tokens: list[int]) -> None:
    on, scheme, config = kernel
    costs = marginal_expert_cost(on, shape, scheme, config, facts_of(config, scheme, on=on), [0, *sorted(tokens)])
    assert costs[0] == 0
    assert np.all(np.diff(costs) >= -1e-9 * costs[1:])
    assert np.all(costs[1:][np.sort(tokens) > 0] > 0)


@given(shape=any_shape, tokens=any_tokens, kernel=any_kernel)
def test_experts_in_another_order_cost_the_same(shape: GemmShape, tokens: list[int], kernel: Kernel) -> None:
    assert latency(shape, tokens[::-1], kernel).latency_us == pytest.approx(latency(shape, tokens, kernel).latency_us)


@settings(max_examples=50)
@given(
    shape=any_shape,
    tokens=st.lists(st.integers(0, 500), min_size=2, max_size=32),
    split=st.integers(1, 31),
    kernel=st.sampled_from(((ADA, "mma_128x32_w8x1x1_s3_k1_at_o1"), (HOPPER, "wgmma_128x32_w8x1x1_s4_k1_at_o2"))),
)
def test_a_mix_lies_above_its_parts_and_repeats_the_uniform_launch(
    shape: GemmShape, tokens: list[int], split: int, kernel: tuple[GpuSpec, str]
) -> None:
    on, config = kernel[0], kernels.parse(kernel[1])
    facts = facts_of(config, W4A16, W8A8, W16A16, on=on)
    split = min(split, len(tokens) - 1)

    def priced(counts: list[int], of: list[QuantScheme]) -> float:
        return launch_latency(on, shape, load_of(counts), of, config, facts).latency_us

    mixed = priced(tokens, [W4A16] * split + [W8A8] * (len(tokens) - split))
    assert mixed >= priced(tokens[:split] + [0] * (len(tokens) - split), [W4A16]) * (1 - 1e-9)
    assert mixed >= priced([0] * split + tokens[split:], [W8A8]) * (1 - 1e-9)
    assert priced(tokens, [W4A16] * len(tokens)) == pytest.approx(priced(tokens, [W4A16]))


def test_no_tokens_cost_the_launch_alone() -> None:
    found = latency(GemmShape(m=0, n=2816, k=2048), [0] * 60, Kernel(ADA, W4A16, QUICK[W4A16][0]))
    assert found.latency_us == DEFAULT_CONSTANTS.launch_floor_us
    assert found.num_tiles == found.dram_bytes == found.flops == 0


def test_counts_by_hand() -> None:
    """Three experts of 2816 x 2048, tile 128 x 16: 22 blocks of features; 1, 2 and 0 blocks of tokens."""
    config = kernels.parse("mma_128x16_w8x1x1_s4_k1_at_o1")
    found = latency(GemmShape(m=0, n=2816, k=2048), [5, 17, 0], Kernel(ADA, W4A16, config))
    assert found.num_tiles == 22 * 3
    assert found.flops == 2 * 22 * 2816 * 2048
    assert found.padding == pytest.approx(48 / 22)
    weights = 2 * (2816 * 2048 // 2 + 2816 * 16 * 2)
    assert found.dram_bytes == weights + 22 * 2048 * 2 + 22 * 2816 * 2
    assert found.waves == pytest.approx(66 / (128 * facts_of(config, W4A16).ctas_per_sm))


def test_makespan_is_that_of_the_round_robin_list() -> None:
    """CTA 0's tiles, counted one by one over a list sorted by tile time, are the model's makespan of a mixed launch."""
    config = kernels.parse("mma_128x64_w4x2x1_s2_k1_at_o1")
    facts = dataclasses.replace(facts_of(config, W16A16, W8A8), ctas_per_sm=1)
    shape = GemmShape(m=0, n=2048, k=2048)
    tokens, of = [640, 130, 7, 0, 900], [W16A16, W8A8, W8A8, W16A16, W8A8]

    def one_tile(scheme: QuantScheme) -> float:
        """All SMs busy with one tile each."""
        return launch_latency(ADA, shape, load_of([64 * 8]), [scheme], config, facts).makespan_us

    tiles = sorted(
        (one_tile(scheme) for count, scheme in zip(tokens, of, strict=True) for _ in range(-(-count // 64) * 16)),
        reverse=True,
    )
    assert launch_latency(ADA, shape, load_of(tokens), of, config, facts).makespan_us == pytest.approx(
        sum(tiles[:: ADA.num_sms])
    )


def test_columns_equal_the_scalar_call() -> None:
    launches = []
    for scheme in ON_ADA:
        for config in QUICK[scheme][:3]:
            load = loads.uniform(60, 64, 4, 0)
            launches.append(
                Launch(
                    shape=GemmShape(m=0, n=1408, k=2048),
                    load=load,
                    schemes=(scheme,),
                    config=config,
                    facts=facts_of(config, scheme),
                )
            )
    frame = launch_latencies(ADA, launches)
    assert tuple(frame.columns) == BREAKDOWN_COLUMNS
    for launch, row in zip(launches, frame.itertuples(index=False), strict=True):
        alone = launch_latency(ADA, launch.shape, launch.load, launch.schemes, launch.config, launch.facts)
        assert dataclasses.astuple(alone) == pytest.approx(tuple(row))
        assert alone.bound in ("dram", "tensor", "issue", "smem", "l2", "chain", "fetch")


def test_many_rows_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = QUICK[W4A16][2]
    facts = facts_of(config, W4A16)
    shape = GemmShape(m=0, n=1408, k=2048)
    launches = [
        Launch(shape=shape, load=load_of([count]), schemes=(W4A16,), config=config, facts=facts) for count in range(25)
    ]
    whole = launch_latencies(ADA, launches)
    monkeypatch.setattr(analytic, "ROWS_AT_ONCE", 7)
    pd.testing.assert_frame_equal(launch_latencies(ADA, launches), whole)
    assert launch_latencies(ADA, []).empty
    assert tuple(launch_latencies(ADA, []).columns) == BREAKDOWN_COLUMNS


def test_a_sweep_is_priced_quickly() -> None:
    """3000 launches in under 2 s."""
    shape = GemmShape(m=0, n=2816, k=2048)
    config = QUICK[W4A16][2]
    facts = facts_of(config, W4A16)
    launches = [
        Launch(shape=shape, load=loads.zipf(60, tokens, 4, seed), schemes=(W4A16,), config=config, facts=facts)
        for tokens in (16, 64, 512)
        for seed in range(10)
    ] * 100
    start = time.perf_counter()
    assert len(launch_latencies(ADA, launches)) == 3000
    assert time.perf_counter() - start < 2


def test_bad_launches_are_refused() -> None:
    config = QUICK[W4A16][0]
    facts = facts_of(config, W4A16)
    shape, load = GemmShape(m=0, n=64, k=64), load_of([1, 2, 3])
    with pytest.raises(SpecError, match="2 schemes for 3 experts"):
        launch_latency(ADA, shape, load, [W4A16, W8A8], config, facts)
    with pytest.raises(SpecError, match="no CTA fits"):
        launch_latency(ADA, shape, load, [W4A16], config, dataclasses.replace(facts, ctas_per_sm=0))
    with pytest.raises(UnsupportedError, match="no int4 tensor cores on sm_90"):
        launch_latency(gpu("h200"), shape, load, [schemes.parse("w4a4_g-1_sym")], config, facts)
    with pytest.raises(UnsupportedError, match="2-bit weights have no packing for INT8"):
        launch_latency(ADA, shape, load, [schemes.parse("w2a8_g-1_sym")], config, facts)
    many = load_of([1] * 5)
    five = [W4A16, W8A8, W16A16, schemes.parse("w2a16_g128_sym"), schemes.parse("w3a16_g128_sym")]
    with pytest.raises(SpecError, match="at most 4"):
        launch_latency(ADA, shape, many, five, config, facts)


@pytest.mark.parametrize("scheme", ON_ADA, ids=str)
def test_counts_agree_with_what_the_kernels_read(scheme: QuantScheme) -> None:
    """The latency model may not import the layouts, so its own counts are held to them here."""
    layout = layout_of(scheme)
    assert K_TILE[scheme.math] == layout.k_tile
    config = QUICK[scheme][1]
    work, stage = tile_work(config, scheme), stage_layout(config, scheme)
    assert work.k_tile_bytes == stage.w_bytes + stage.x_bytes + stage.scale_bytes + stage.zero_bytes + stage.sx_bytes
    for n, k in ((2816, 2048), (100, 2880), (64, 64)):
        stored = layout.packed_bytes(n, k, 1)
        channel_zeros = layout.padded_n(n) * 2 if layout.has_zero_points and not layout.has_group_scales else 0
        assert expert_weight_bytes(scheme, n, k) in (stored, stored + channel_zeros)
        assert token_bytes(scheme, k) <= layout.x_stride_bytes(k) + 4 * layout.num_x_scales(k)
    assert work.k_tile_mmas * MMA_K[scheme.math] * 16 * 8 == config.tile.m * config.tile.n * work.k_tile


@pytest.mark.parametrize("scheme", [scheme for scheme in KERNEL_SCHEMES if scheme.math is not Math.INT4], ids=str)
def test_counts_agree_with_what_the_wgmma_producer_copies(scheme: QuantScheme) -> None:
    config = kernels.parse("wgmma_128x48_w8x1x1_s2_k1_at_o1")
    work, arrays = tile_work(config, scheme), wgmma_arrays(config, [scheme], 256)
    assert work.k_tile_bytes == arrays.tokens_stage + arrays.weights_stage + arrays.strips_stage
    assert work.k_tile_mmas * MMA_K[scheme.math] * 16 * 8 == config.tile.m * config.tile.n * work.k_tile
    assert work.k_tile_tensor_mmas == work.k_tile_mmas
    narrow = tile_work(kernels.parse("wgmma_128x16_w8x1x1_s2_k1_at_o1"), scheme)
    assert narrow.k_tile_tensor_mmas == 2 * narrow.k_tile_mmas == work.k_tile_mmas * 2 / 3


def test_wgmma_decodes_and_multiplies_in_turn_where_groups_are_summed() -> None:
    """With group scales and 8-bit math, a warp scales every k-tile's sums before it goes on."""
    config = kernels.parse("wgmma_128x128_w8x1x1_s3_k1_at_o1")
    channel, grouped = (tile_work(config, schemes.parse(name)) for name in ("w4a8_g-1_sym", "w4a8_g128_sym"))
    assert channel.serial_instructions_of_a_warp == channel.exposed_k_steps == 0
    assert grouped.exposed_k_steps == 1
    assert grouped.serial_instructions_of_a_warp >= 2 * 128 * 128 / 32 / 8
    assert grouped.k_tile_instructions > channel.k_tile_instructions


def test_a_warps_own_instructions_do_not_depend_on_how_many_ctas_share_the_sm() -> None:
    """Measured (H200, 2026-11-24): narrow tiles of many rows take rounds times a tile, however full the SM is."""
    config = kernels.parse("wgmma_256x16_w4x1x1_s4_k1_at_o2")
    work = tile_work(config, W4A16)
    assert work.instructions_of_a_warp * 4 == work.k_tile_instructions
    shape, load = GemmShape(m=0, n=256 * 132, k=2048), loads.uniform(1, 16, 1, 0)
    facts = facts_of(config, W4A16, on=HOPPER)
    one, two = (
        launch_latency(HOPPER, GemmShape(m=0, n=n, k=2048), load, [W4A16], config, facts)
        for n in (shape.n, 2 * shape.n)
    )
    assert two.waves == 2 * one.waves == 1.0
    assert two.warp_us == one.warp_us
    assert two.issue_us == pytest.approx(2 * one.issue_us)


def test_wgmma_stores_a_row_at_a_time() -> None:
    """Each of a tile's token rows is one bulk store; the lanes of a warp take turns."""
    for config, in_turn in (
        ("wgmma_128x16_w4x1x1_s2_k1_at_o1", 16),
        ("wgmma_128x128_w8x1x1_s2_k1_at_o1", 32),
        ("wgmma_64x192_w4x1x1_s2_k1_at_o1", 64),
        ("mma_128x128_w4x2x1_s2_k1_at_o1", 0),
    ):
        assert tile_work(kernels.parse(config), W4A16).stores_in_turn == in_turn


def test_split_load() -> None:
    split = split_load((0, 1, 16, 17), (16,))
    assert split.full_token_tiles == split.num_token_tiles
    assert (split.num_tokens, split.num_active_experts, split.num_token_tiles, split.max_tokens) == (34, 3, 4, 17)
    tails = split_load((0, 1, 16, 17), (4, 8, 16))
    assert tails.num_token_tiles == 4
    assert tails.full_token_tiles == (4 + 16 + 16 + 4) / 16
    widths = [split_load((tokens,), (4, 8, 16)).full_token_tiles for tokens in range(80)]
    assert widths == sorted(widths)


def test_a_cluster_copies_its_tokens_once() -> None:
    one, two = (tile_work(kernels.parse(f"wgmma_128x64_w8x1x1_s3_k1_at_o1{end}"), W4A16) for end in ("", "_c2"))
    assert two.k_tile_bytes == one.k_tile_bytes - one.k_tile_token_bytes / 2
    assert two.k_tile_smem_bytes == one.k_tile_smem_bytes


def test_split_k_shortens_the_chain_and_adds_a_sum() -> None:
    shape, load = GemmShape(m=0, n=2048, k=1408), load_of([1, 1])  # 11 groups of scales, 22 k-tiles
    one, two, four = (
        launch_latency(HOPPER, shape, load, [W4A16], config, facts_of(config, W4A16, on=HOPPER))
        for config in (kernels.parse(f"wgmma_128x16_w4x1x1_s4_k{parts}_at_o2") for parts in (1, 2, 4))
    )
    assert (one.num_tiles, two.num_tiles, four.num_tiles) == (32, 64, 128)
    assert (two.chain_us / one.chain_us, four.chain_us / one.chain_us) == pytest.approx((12 / 22, 6 / 22))
    assert one.epilogue_us < two.epilogue_us < four.epilogue_us
    assert one.flops == four.flops
    assert one.padding == pytest.approx(four.padding)
    assert one.dram_bytes == four.dram_bytes
    assert four.latency_us < two.latency_us < one.latency_us


def test_split_k_does_not_pay_where_tiles_fill_the_gpu() -> None:
    shape, load = GemmShape(m=0, n=2816, k=2048), load_of([16] * 60)
    one, four = (
        launch_latency(HOPPER, shape, load, [W4A16], config, facts_of(config, W4A16, on=HOPPER))
        for config in (kernels.parse(f"wgmma_128x16_w4x1x1_s4_k{parts}_at_o2") for parts in (1, 4))
    )
    assert one.makespan_us < four.makespan_us


def best(on: GpuSpec, scheme: QuantScheme, load: TokenLoad, shape: GemmShape) -> float:
    launches = [
        Launch(shape=shape, load=load, schemes=(scheme,), config=config, facts=facts_of(config, scheme, on=on))
        for config in candidates([scheme], on, Effort.QUICK)
    ]
    return float(launch_latencies(on, launches)["latency_us"].min())


def first_where_second_wins(few: str, many: str) -> int:
    """Smallest tokens an expert at which `many` is faster on the RTX 4090: 60 experts of [2816, 2048], the paper's
    example.
    """
    shape = GemmShape(m=0, n=2816, k=2048)
    for tokens in range(2, 400, 2):
        load = load_of([tokens] * 60)
        if best(ADA, schemes.parse(many), load, shape) < best(ADA, schemes.parse(few), load, shape):
            return tokens
    return 400


def test_published_crossovers_on_ada() -> None:
    """MxMoE (arXiv 2505.05799): W4A16 beats W8A8 below 83 tokens an expert, W2A16 beats W4A4 below 42. Nothing is
    fitted: within a factor of 2.5.
    """
    assert 83 / 1.5 <= first_where_second_wins("w4a16_g128_sym", "w8a8_g-1_sym") <= 83 * 1.5
    assert 42 / 1.5 <= first_where_second_wins("w2a16_g128_sym", "w4a4_g-1_sym") <= 42 * 1.5


PROBE_TILES = (
    "mma_128x8_w8x1x1_s8_k1_at_o3",
    "mma_128x32_w8x1x1_s5_k1_at_o2",
    "mma_128x64_w4x2x1_s4_k1_at_o2",
    "mma_128x128_w4x2x1_s4_k1_at_o1",
)


@pytest.mark.parametrize(("tokens", "measured_us"), [(64, 62.5), (512, 155.0), (2048, 421.0), (8192, 1145.0)])
def test_a_probe_kernel_measured_on_an_h200(tokens: int, measured_us: float) -> None:
    """An earlier w4a16 g128 mma.sync kernel, qwen1.5-moe gate_up, uniform routing, best of a few tiles, one H200,
    2026-11-23. Within 20%.
    """
    shape, load = GemmShape(m=0, n=2816, k=2048), loads.uniform(60, tokens, 4, 0)
    launches = [
        Launch(shape=shape, load=load, schemes=(W4A16,), config=config, facts=facts_of(config, W4A16, on=HOPPER))
        for config in map(kernels.parse, PROBE_TILES)
    ]
    assert float(launch_latencies(HOPPER, launches)["latency_us"].min()) == pytest.approx(measured_us, rel=0.2)


@pytest.mark.parametrize(
    ("config", "scheme", "tokens", "measured_us", "within"),
    [
        ("wgmma_256x128_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", 8192, 559, 0.15),
        ("wgmma_128x128_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", 8192, 618, 0.15),
        ("wgmma_128x192_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", 8192, 597, 0.15),
        ("wgmma_256x128_w8x1x1_s3_k1_at_o1", "w16a16", 8192, 611, 0.15),
        ("wgmma_256x128_w8x1x1_s3_k1_at_o1", "w8a8_g-1_sym_e4m3", 8192, 355, 0.15),
        ("wgmma_128x128_w8x1x1_s4_k1_at_o1", "w4a8_g128_sym_e4m3", 8192, 449, 0.15),
        ("wgmma_128x16_w4x1x1_s8_k1_at_o3", "w4a16_g128_sym", 16, 48, 0.4),
        ("wgmma_64x16_w4x1x1_s8_k1_at_o4", "w4a16_g128_sym", 16, 53, 0.4),
        ("wgmma_128x48_w8x1x1_s6_k1_at_o2", "w4a16_g128_sym", 512, 112, 0.4),
        ("wgmma_256x64_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", 512, 116, 0.4),
    ],
)
def test_wgmma_kernels_measured_on_an_h200(
    config: str, scheme: str, tokens: int, measured_us: float, within: float
) -> None:
    """qwen1.5-moe gate_up, one H200, 2026-11-24. Nothing is fitted to these; the model is least right where neither
    memory nor the tensor cores are the limit.
    """
    of, parsed = schemes.parse(scheme), kernels.parse(config)
    load, shape = loads.uniform(60, tokens, 4, 0), GemmShape(m=0, n=2816, k=2048)
    found = launch_latency(HOPPER, shape, load, [of], parsed, facts_of(parsed, of, on=HOPPER))
    assert found.latency_us == pytest.approx(measured_us, rel=within)


def test_wgmma_is_predicted_to_beat_mma_sync_where_it_matters() -> None:
    shape = GemmShape(m=0, n=2816, k=2048)
    for tokens in (512, 8192):
        launches = [
            Launch(shape=shape, load=loads.uniform(60, tokens, 4, 0), schemes=(W4A16,), config=config, facts=facts)
            for config in candidates([W4A16], HOPPER, Effort.QUICK)
            for facts in [facts_of(config, W4A16, on=HOPPER)]
        ]
        fastest = int(launch_latencies(HOPPER, launches)["latency_us"].to_numpy().argmin())
        assert launches[fastest].config.family is Family.WGMMA


def test_every_math_has_a_k() -> None:
    assert set(MMA_K) == set(K_TILE) == set(Math)


def test_few_tokens_in_bf16_take_what_they_multiply_of_the_wgmma_family_too() -> None:
    decode = kernels.parse("wgmma_128x8_w4x1x1_s8_k1_at_o3")
    coded = tile_work(decode, schemes.parse("w4a16_g-1_sym"))
    # 8 row blocks and 4 k-steps, and a row of ones for each warp; a wgmma's time is that of 32 tokens.
    assert coded.k_tile_mmas == 32
    assert coded.k_tile_tensor_mmas == pytest.approx((32 + 16) * 0.80 / 0.62)
    assert tile_work(decode, W16A16).k_tile_tensor_mmas == pytest.approx(32 * 0.80 / 0.62)
    assert tile_work(decode, W8A8).k_tile_tensor_mmas == 4 * 32


@pytest.mark.parametrize("scheme", [scheme for scheme in KERNEL_SCHEMES if scheme.math is not Math.INT4], ids=str)
def test_how_the_wgmma_family_multiplies_is_counted_as_its_kernels_do_it(scheme: QuantScheme) -> None:
    layout = layout_of(scheme)
    for tokens in (8, 16, 32):
        config = kernels.parse(f"wgmma_128x{tokens}_w4x1x1_s8_k1_at_o3")
        assert counted_in_warps(config, scheme) == multiplies_in_warps(layout, tokens)
        if not multiplies_in_warps(layout, tokens):
            waits = tile_work(config, scheme).exposed_k_steps > 0
            assert waits == (sum_of(layout, tokens) is SumOf.GROUPS)
    for stages in (2, 3, 4, 6):
        config = kernels.parse(f"wgmma_128x32_w4x1x1_s{stages}_k1_at_o1")
        assert PRODUCER_WARPS[stages < FEW_STAGES] == producer_warps(config)
