"""The one legality function: each rule refuses what breaks it, says the numbers, and lets its neighbour through."""

import dataclasses
import itertools

import pytest

from costmodel.facts import BuildFacts
from costmodel.occupancy import smem_per_cta
from kernel_gen import registers, smem, smem_wgmma
from kernel_gen.layouts import UNIT_ROWS, layout_of
from kernel_gen.legality import estimated_facts, reasons, require_legal, smem_bytes
from kernel_gen.space import Effort, candidates
from profiles import kernels, schemes
from profiles.errors import UnsupportedError
from profiles.gpus import Math, gpu
from profiles.kernels import Family, KernelConfig
from profiles.schemes import KERNEL_SCHEMES

W4A16 = schemes.parse("w4a16_g128_sym")
PACKABLE = [scheme for scheme in KERNEL_SCHEMES if scheme.name != "w4a8_g128_sym_e4m3"]
SMALL = kernels.parse("mma_128x16_w8x1x1_s4_k1_at_o1")


def refusals(
    name: str, scheme: str | tuple[str, ...] = "w4a16_g128_sym", on: str = "rtx4090", **options: object
) -> str:
    names = (scheme,) if isinstance(scheme, str) else scheme
    return "; ".join(reasons(kernels.parse(name), [schemes.parse(item) for item in names], gpu(on), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", PACKABLE, ids=str)
def test_one_small_tile_is_legal_for_every_scheme_on_ada(scheme: schemes.QuantScheme) -> None:
    assert reasons(SMALL, [scheme], gpu("rtx4090")) == ()


@pytest.mark.parametrize(
    ("config", "scheme", "on", "says"),
    [
        ("mma_128x128_w8x1x1_s4_k1_at_o1", "w16a16", "rtx4090", "smem 132 KiB > 99 KiB per block on rtx4090"),
        (
            "mma_128x16_w8x1x1_s4_k1_at_o2",
            "w16a16",
            "rtx4090",
            "smem 2 x 77.12 KiB (1 KiB reserved in each) > 100 KiB per SM on rtx4090",
        ),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w4a4_g-1_sym", "h200", "no int4 tensor cores on sm_90 (h200)"),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w4a4_g-1_sym", "rtx5090", "no int4 tensor cores on sm_120 (rtx5090)"),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w8a8_g-1_sym_e4m3", "h200", "no fp8 mma.sync on sm_90 (h200)"),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w8a8_g-1_sym_e4m3", "a100", "fp8 mma needs sm_89, a100 is sm_80"),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", "b200", "b200 is sm_100a"),
        (
            "mma_128x16_w4x1x2_s4_k1_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "slice-K 2: the mma family generates warps.k = 1 only",
        ),
        (
            "mma_128x16_w8x1x1_s4_k2_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "split-K 2: the mma family generates split_k = 1 only",
        ),
        ("mma_128x16_w8x1x1_s1_k1_at_o1", "w4a16_g128_sym", "rtx4090", "1 stages: the pipeline needs at least 2"),
        (
            "mma_96x16_w2x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "tile.m 96 is not a multiple of the packed unit's 64 rows",
        ),
        (
            "mma_64x16_w8x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "tile.m 64 does not split into 16-row blocks over 8 warps",
        ),
        (
            "mma_128x12_w8x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "tile.n 12 does not split into 8-token blocks",
        ),
        ("mma_128x24_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym", "rtx4090", "3 token blocks: ldmatrix takes 1, or pairs"),
        ("mma_64x8_w1x1x1_s4_k1_at_o1", "w4a16_g128_sym", "rtx4090", "32 threads: at least 64"),
        ("mma_512x64_w32x2x1_s2_k1_at_o1", "w2a16_g128_sym", "h200", "2048 threads > 1024 per block"),
        ("mma_64x8_w4x1x1_s2_k1_at_o13", "w2a16_g-1_sym", "h200", "registers: about"),
        ("mma_128x256_w2x2x1_s2_k1_at_o1", "w4a16_g128_sym", "h200", "registers: about"),
        ("mma_128x16_w8x1x1_s4_k1_at_o1", "w4a8_g128_sym_e4m3", "rtx4090", "no 4-bit to e4m3 decoder"),
        (
            "wgmma_128x16_w8x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "rtx4090",
            "the wgmma family is generated for sm_90a, rtx4090 is sm_89",
        ),
        ("wgmma_128x16_w8x1x1_s4_k1_at_o1", "w4a4_g-1_sym", "h200", "wgmma has no int4"),
        ("wgmma_128x16_w8x2x1_s4_k1_at_o1", "w4a16_g128_sym", "h200", "2 warps along tokens"),
        ("wgmma_128x16_w6x1x1_s4_k1_at_o1", "w4a16_g128_sym", "h200", "6 warps along rows"),
        ("wgmma_256x16_w16x1x1_s4_k1_at_o1", "w4a16_g128_sym", "h200", "so 4, 8 or 12 warps"),
        (
            "wgmma_64x16_w8x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "h200",
            "tile.m 64 does not split over 2 warpgroups: multiples of 128 do",
        ),
        (
            "wgmma_128x24_w8x1x1_s4_k1_at_o1",
            "w4a16_g128_sym",
            "h200",
            "tile.n 24: the wgmma family takes 8 or multiples of 16 up to 256",
        ),
        ("wgmma_64x272_w4x1x1_s2_k1_at_o1", "w4a16_g128_sym", "h200", "tile.n 272: the wgmma family"),
        (
            "wgmma_128x16_w4x1x2_s4_k1_at_o1",
            "w4a16_g128_sym",
            "h200",
            "slice-K 2: the wgmma family generates warps.k = 1 only",
        ),
        (
            "wgmma_128x16_w4x1x1_s4_k3_at_o1",
            "w4a16_g128_sym",
            "h200",
            "split-K 3: 1, 2 or 4 CTAs share a tile's reduction",
        ),
        (
            "wgmma_128x64_w8x1x1_s3_k2_at_o1_c2_t16",
            "w4a16_g128_sym",
            "h200",
            "split-K 2 in a cluster of 2: its CTAs share k-tiles or the loads of tokens, not both",
        ),
        (
            "wgmma_256x128_w8x1x1_s2_k4_at_o1",
            "w4a16_g128_sym",
            "h200",
            "smem 454.1 KiB > 227 KiB per block on h200",
        ),
        ("wgmma_128x16_w8x1x1_s1_k1_at_o1", "w4a16_g128_sym", "h200", "1 stages: the pipeline needs at least 2"),
        ("wgmma_128x16_w8x1x1_s2_k1_at_o1_t8", "w4a16_g128_sym", "h200", "2 stages: tiles of 8 tokens hold two"),
        (
            "wgmma_256x128_w8x1x1_s5_k1_at_o1",
            "w16a16",
            "h200",
            "smem 261.1 KiB > 227 KiB per block on h200",
        ),
        ("mma_128x16_w8x1x1_s4_k1_at_o2_c2", "w16a16", "h200", "only the wgmma family has these"),
        ("mma_128x32_w8x1x1_s4_k1_at_o2_t16", "w16a16", "h200", "only the wgmma family has these"),
        ("wgmma_128x128_w8x1x1_s4_k1_at_o1_c4", "w16a16", "h200", "cluster of 4: at most 2 CTAs share loads"),
        (
            "wgmma_128x96_w8x1x1_s4_k1_at_o1_t64",
            "w16a16",
            "h200",
            "tail 64: 8, or a multiple of 16, that is a half, a quarter, ... of tile.n 96",
        ),
        ("wgmma_128x96_w8x1x1_s4_k1_at_o1_t8", "w16a16", "h200", "tail 8: 8, or a multiple of 16, that is a half"),
        ("wgmma_128x96_w8x1x1_s4_k1_at_o1_t96", "w16a16", "h200", "tail 96: 8, or a multiple of 16, that is a half"),
        ("wgmma_128x8_w4x1x1_s4_k1_at_o1_t8", "w16a16", "h200", "tail 8: 8, or a multiple of 16, that is a half"),
        ("wgmma_128x48_w8x1x1_s4_k1_at_o1_t24", "w16a16", "h200", "tail 24: 8, or a multiple of 16, that is a half"),
        ("wgmma_64x64_w4x1x1_s4_k1_at_o1_t8", "w16a16", "h200", "tail 8: 4 widths of a tile of 64, at most 3"),
        ("wgmma_64x256_w4x1x1_s4_k1_at_o1_t16", "w16a16", "h200", "tail 16: 5 widths of a tile of 256, at most 3"),
        (
            "wgmma_128x16_w4x1x1_s4_k1_at_o3",
            "w16a16",
            "h200",
            "smem 3 x 81.38 KiB (1 KiB reserved in each) > 228 KiB per SM on h200",
        ),
        (
            "wgmma_256x128_w8x1x1_s2_k1_at_o1",
            "w4a8_g128_sym_e4m3",
            "h200",
            "registers: about 312 a consumer thread (288 for tiles, 24 margin) > 240 with 1 CTAs of 384 threads",
        ),
        (
            "wgmma_64x80_w4x1x1_s2_k1_at_o4",
            "w16a16",
            "h200",
            "tile.n 80: a wgmma's 40 sums and 32 registers beside them > 64 a thread, which 4 CTAs",
        ),
    ],
)
def test_rule_says_its_numbers(config: str, scheme: str, on: str, says: str) -> None:
    assert says in refusals(config, scheme, on)


@pytest.mark.parametrize("scheme", [scheme for scheme in KERNEL_SCHEMES if scheme.math is not Math.INT4], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        "wgmma_64x16_w4x1x1_s4_k1_at_o4",
        "wgmma_128x16_w4x1x1_s3_k1_at_o3",
        "wgmma_128x32_w8x1x1_s4_k1_af_o2",
        "wgmma_256x64_w8x1x1_s3_k1_af_o1",
        "wgmma_128x128_w8x1x1_s4_k1_at_o1",
        "wgmma_192x64_w12x1x1_s4_k1_at_o1",
        "wgmma_64x16_w4x1x1_s4_k4_at_o3",
        "wgmma_256x16_w8x1x1_s3_k2_at_o1",
        "wgmma_64x8_w4x1x1_s4_k1_at_o4",
        "wgmma_128x8_w4x1x1_s4_k4_at_o2",
        "wgmma_128x16_w4x1x1_s3_k1_at_o3_t8",
        "wgmma_128x32_w8x1x1_s3_k1_at_o2_t8",
    ],
)
def test_wgmma_takes_every_scheme_but_int4_math(config: str, scheme: schemes.QuantScheme) -> None:
    assert reasons(kernels.parse(config), [scheme], gpu("h200")) == ()


def test_a_wgmma_kernel_that_was_measured_is_legal_and_its_neighbour_that_spilled_is_not() -> None:
    for config, scheme in (
        ("wgmma_256x128_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym"),
        ("wgmma_256x160_w8x1x1_s4_k1_at_o1", "w4a16_g128_asym"),
        ("wgmma_128x192_w8x1x1_s4_k1_at_o1", "w4a16_g128_sym"),
        ("wgmma_256x128_w8x1x1_s3_k1_at_o1", "w8a8_g-1_sym_e4m3"),
        ("wgmma_128x192_w8x1x1_s4_k1_at_o1", "w4a8_g128_sym_e4m3"),
    ):
        assert refusals(config, scheme, "h200") == ""
    assert "registers: about" in refusals("wgmma_256x128_w8x1x1_s2_k1_at_o1", "w4a8_g128_sym_e4m3", "h200")
    assert "registers: about" in refusals("wgmma_256x128_w8x1x1_s2_k1_at_o1", "w4a8_g128_sym", "h200")


def test_a_mix_needs_a_few_registers_more_than_its_hungriest_scheme() -> None:
    """Measured: alone this one does not spill, with three others it spills."""
    config = "wgmma_128x192_w8x1x1_s4_k1_at_o1"
    mix = ("w4a8_g128_sym_e4m3", "w4a16_g128_sym", "w8a8_g-1_sym_e4m3", "w8a8_g-1_sym")
    assert all(refusals(config, name, "h200") == "" for name in mix)
    assert "registers: about 259 a consumer thread" in refusals(config, mix, "h200")


def test_setmaxnreg_must_find_what_it_deals_out() -> None:
    """A launch with fewer registers than producer and consumers are promised would wait for ever."""
    config = kernels.parse("wgmma_256x128_w8x1x1_s4_k1_at_o1")
    facts = estimated_facts(config, [W4A16], gpu("h200"))
    assert (facts.registers_per_thread, facts.num_threads, facts.ctas_per_sm) == (168, 384, 1)
    assert reasons(config, [W4A16], gpu("h200"), facts=facts) == ()
    fewer = dataclasses.replace(facts, registers_per_thread=160)
    (found,) = reasons(config, [W4A16], gpu("h200"), facts=fewer)
    assert "setmaxnreg deals out 64512 registers a CTA (240 a consumer thread, 24 a producer thread)" in found
    assert "the launch takes 61440 (160 a thread)" in found


def test_a_wgmma_launch_takes_no_more_registers_than_an_sm_has() -> None:
    legal = [config for config in candidates([W4A16], gpu("h200"), Effort.FULL) if config.family is Family.WGMMA]
    assert len(legal) > 100
    for config in legal:
        assert 24 <= smem_wgmma.producer_registers(config) <= smem_wgmma.launch_registers(config)
        assert smem_wgmma.consumer_registers(config) <= 240
        assert registers.setmaxnreg_registers(config) * config.min_ctas_per_sm <= gpu("h200").regs_per_sm
        assert estimated_facts(config, [W4A16], gpu("h200")).ctas_per_sm >= config.min_ctas_per_sm


def test_split_k_needs_room_for_the_other_parts_sums_and_two_barriers() -> None:
    one, two, four = (
        smem_wgmma.wgmma_arrays(kernels.parse(f"wgmma_128x16_w4x1x1_s4_k{parts}_at_o1"), [W4A16], 256)
        for parts in (1, 2, 4)
    )
    assert one.table == one.partial_sums == two.partial_sums == four.partial_sums
    assert two.table - two.partial_sums == 128 * 16 * 4
    assert four.table - four.partial_sums == 3 * 128 * 16 * 4
    assert two.partial_sums % 16 == 0
    assert two.total - two.barriers == one.total - one.barriers + 16 == 16 * 4 + 16


def test_group_64_with_int8_math_names_the_k_tile() -> None:
    text = refusals("mma_128x16_w8x1x1_s4_k1_at_o1", "w4a8_g64_sym")
    assert "group 64" in text
    assert "128" in text


def test_all_reasons_are_listed() -> None:
    text = refusals("mma_64x24_w8x1x2_s1_k2_at_o1", ("w4a4_g-1_sym", "w8a8_g-1_sym_e4m3"), "a100")
    for part in ("slice-K", "split-K", "1 stages", "tile.m 64", "tile.n 24", "fp8 mma needs sm_89"):
        assert part in text


def test_slots() -> None:
    config = "mma_128x16_w8x1x1_s3_k1_at_o1"
    assert refusals(config, ("w4a16_g128_sym", "w8a8_g-1_sym", "w4a4_g-1_sym", "w2a16_g128_sym")) == ""
    assert "0 schemes: a kernel holds 1 to 4" in refusals(config, ())
    five = ("w16a16", "w8a16_g128_sym", "w4a16_g128_sym", "w3a16_g128_sym", "w2a16_g128_sym")
    assert "5 schemes: a kernel holds 1 to 4" in refusals(config, five)
    assert "w16a16 twice" in refusals(config, ("w16a16", "w16a16"))
    assert "one int4 activation tensor" in refusals(config, ("w4a4_g-1_sym", "w4a4_g128_sym"))


def test_emulated_math_passes_only_when_asked() -> None:
    for scheme in ("w4a4_g128_sym", "w8a8_g-1_sym_e4m3"):
        assert refusals(SMALL.name, scheme, "h200")
        assert refusals(SMALL.name, scheme, "h200", allow_emulated=True) == ""
    assert "fp8 mma needs sm_89" in refusals(SMALL.name, "w8a8_g-1_sym_e4m3", "a100", allow_emulated=True)


def test_facts_replace_the_estimate() -> None:
    facts = estimated_facts(SMALL, [W4A16], gpu("rtx4090"))
    assert facts.is_estimated
    assert reasons(SMALL, [W4A16], gpu("rtx4090"), facts=facts) == ()

    def with_facts(config: KernelConfig = SMALL, **changes: int) -> str:
        changed: BuildFacts = dataclasses.replace(facts, **changes)
        return "; ".join(reasons(config, [W4A16], gpu("rtx4090"), facts=changed))

    assert "spills 8 bytes" in with_facts(spill_bytes=8)
    assert "stack of 16 bytes" in with_facts(stack_bytes=16)
    assert "smem 100 KiB > 99 KiB" in with_facts(smem_bytes=100 * 1024)
    two = dataclasses.replace(SMALL, min_ctas_per_sm=2)
    assert "registers 2 x 40960 (160 a thread) > 65536 per SM" in with_facts(two, registers_per_thread=160)
    big = kernels.parse("mma_128x256_w2x2x1_s2_k1_at_o1")
    assert refusals(big.name, on="h200")
    measured = dataclasses.replace(facts, registers_per_thread=250, num_threads=big.num_threads)
    assert reasons(big, [W4A16], gpu("h200"), facts=measured) == ()


def test_require_legal_carries_the_reasons() -> None:
    with pytest.raises(UnsupportedError, match="slice-K 2") as caught:
        require_legal(kernels.parse("mma_128x16_w4x1x2_s4_k1_at_o1"), [W4A16], gpu("rtx4090"))
    assert len(caught.value.reasons) == 1
    require_legal(SMALL, [W4A16], gpu("rtx4090"))


@pytest.mark.parametrize("scheme", PACKABLE, ids=str)
@pytest.mark.parametrize(
    "config", ["mma_64x8_w4x1x1_s2_k1_at_o1", "mma_128x16_w8x1x1_s4_k1_at_o1", "mma_256x128_w4x2x1_s3_k1_af_o1"]
)
def test_stage_parts_neither_overlap_nor_leave_the_stage(config: str, scheme: schemes.QuantScheme) -> None:
    parsed = kernels.parse(config)
    stage = smem.stage_layout(parsed, scheme)
    parts = [(0, stage.w_bytes), (stage.x_offset, stage.x_bytes), (stage.scale_offset, stage.scale_bytes)]
    parts += [(stage.zero_offset, stage.zero_bytes), (stage.sx_offset, stage.sx_bytes), (stage.stage_bytes, 0)]
    for (offset, size), (following, _) in itertools.pairwise(parts):
        assert offset % 16 == 0
        assert offset + size <= following
    assert stage.x_offset % 128 == 0
    assert stage.stage_bytes % 128 == 0
    assert stage.w_bytes == layout_of(scheme).unit_bytes * parsed.tile.m // UNIT_ROWS
    assert smem_bytes(parsed, [scheme], 64) == parsed.num_stages * stage.stage_bytes + 16 * 64 + 16


def test_stage_by_hand() -> None:
    """128 x 16, int4 weights and groups of 128, with zero points: 4096 packed, 16 rows of 128, two strips of 256."""
    stage = smem.stage_layout(SMALL, schemes.parse("w4a16_g128_asym"))
    assert (stage.w_bytes, stage.x_offset, stage.scale_offset, stage.zero_offset, stage.stage_bytes) == (
        4096,
        4096,
        6144,
        6400,
        6656,
    )
    stage = smem.stage_layout(
        SMALL, schemes.parse("w4a4_g128_sym")
    )  # 8192, 16 rows of 64, one strip of 256, 16 token scales
    assert (stage.w_bytes, stage.scale_offset, stage.sx_offset, stage.stage_bytes) == (8192, 9216, 9472, 9600)
    channel = smem.stage_layout(SMALL, schemes.parse("w4a16_g-1_asym"))
    assert channel.scale_bytes == channel.zero_bytes == 0
    assert smem.stage_bytes(SMALL, [schemes.parse("w4a16_g128_asym"), schemes.parse("w16a16")]) == 16384 + 2048


def test_estimate_respects_the_occupancy_target() -> None:
    config = dataclasses.replace(SMALL, min_ctas_per_sm=2)
    facts = estimated_facts(config, [W4A16], gpu("rtx4090"))
    assert facts.ctas_per_sm >= 2
    assert 2 * smem_per_cta(facts.smem_bytes) <= gpu("rtx4090").smem_per_sm_bytes
