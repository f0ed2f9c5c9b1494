"""Kernels on a GPU: every scheme of every family, loads of every kind, sizes off the tile, mixed launches, graphs."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import check_output  # noqa: E402
from kernel_gen.legality import reasons  # noqa: E402
from kernel_gen.runtime import prepare_activations  # noqa: E402
from profiles import kernels, schemes  # noqa: E402
from profiles.gpus import Math, gpu  # noqa: E402
from profiles.schemes import KERNEL_SCHEMES, QuantScheme  # noqa: E402
from tests.kernel_gen.gpu_cases import Case, expected_of, kernel_for, offsets_of, poisoned, run  # noqa: E402

pytestmark = pytest.mark.gpu

MMA_CONFIGS = (
    "mma_64x8_w4x1x1_s6_k1_at_o4",
    "mma_128x16_w8x1x1_s4_k1_af_o2",
    "mma_128x64_w4x2x1_s3_k1_at_o1",
    "mma_128x128_w2x4x1_s3_k1_af_o1",
)
WGMMA_CONFIGS = (
    "wgmma_64x16_w4x1x1_s6_k1_at_o2",
    "wgmma_128x32_w8x1x1_s4_k1_af_o2",
    "wgmma_128x128_w8x1x1_s4_k1_at_o1",
    "wgmma_256x64_w8x1x1_s3_k1_af_o1_t32",
    "wgmma_192x64_w12x1x1_s4_k1_at_o1",
    "wgmma_256x16_w8x1x1_s3_k1_at_o1_t8",
    "wgmma_128x8_w4x1x1_s5_k1_at_o2",
    "wgmma_128x64_w8x1x1_s3_k1_at_o1_c2_t16",
    "wgmma_64x8_w4x1x1_s4_k4_at_o2",
    "wgmma_256x16_w8x1x1_s3_k2_at_o1",
)
DECODE, MIDDLE = MMA_CONFIGS[1], MMA_CONFIGS[2]
SPLITS = tuple(config for config in WGMMA_CONFIGS if kernels.parse(config).split_k > 1)
FEW = (DECODE, WGMMA_CONFIGS[1], *SPLITS)
SHORT_GROUPS = [
    (config, name)
    for config in (DECODE, *(config for config in WGMMA_CONFIGS if kernels.parse(config).tile.n <= 16))
    for name in ("w2a16_g64_sym", "w3a16_g64_asym", "w4a16_g64_asym", "w8a16_g64_sym")
]
"""A k-tile of 16-bit math is one group of 64: no pair of k-tiles has the same scales."""


def supported(config: str, scheme: QuantScheme) -> bool:
    """Whether the family runs the scheme: int4 MMAs are the mma family's, int4 weights under e4m3 activations the wgmma
    family's.
    """
    return scheme.math is not Math.INT4 if config.startswith("wgmma") else scheme.name != "w4a8_g128_sym_e4m3"


NAMES = tuple(scheme.name for scheme in KERNEL_SCHEMES)
SINGLE = [
    (config, scheme.name)
    for config in MMA_CONFIGS + WGMMA_CONFIGS
    for scheme in KERNEL_SCHEMES
    if supported(config, scheme)
]
MIXES = (
    ("w4a16_g128_sym", "w8a8_g-1_sym"),
    ("w2a16_g128_asym", "w4a4_g128_sym"),
    ("w16a16", "w8a8_g-1_sym_e4m3", "w3a16_g-1_asym"),
    ("w4a16_g128_asym", "w8a8_g-1_sym", "w2a16_g128_asym", "w4a4_g-1_sym"),
    ("w8a16_g-1_sym", "w4a8_g128_sym", "w4a8_g-1_sym", "w16a16"),
    ("w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3", "w4a16_g128_asym", "w2a16_g-1_sym"),
)
MIXED = [
    (config, names)
    for config in MMA_CONFIGS + WGMMA_CONFIGS
    for names in MIXES
    if all(supported(config, schemes.parse(name)) for name in names)
]
WIDE = [
    (config, names)
    for config in (
        "wgmma_256x160_w8x1x1_s3_k1_at_o1_t80",
        "wgmma_256x128_w8x1x1_s3_k1_at_o1_t64",
        "wgmma_192x128_w12x1x1_s3_k1_at_o1_t32",
        "wgmma_128x160_w8x1x1_s3_k1_at_o1_t80",
        "wgmma_128x192_w8x1x1_s3_k1_at_o1_t96",
        "wgmma_128x256_w8x1x1_s3_k1_at_o1_c2_t64",
    )
    for names in (
        ("w16a16",),
        ("w4a16_g128_asym",),
        ("w8a8_g-1_sym_e4m3",),
        ("w4a8_g128_sym",),
        ("w4a8_g-1_sym", "w8a8_g-1_sym"),
        ("w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"),
        ("w2a16_g128_sym", "w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"),
    )
    if not reasons(kernels.parse(config), [schemes.parse(name) for name in names], gpu("h200"))
]
"""Tiles of prefill whose consumers need nearly all registers there are: the legal ones."""
LOADS = {
    "ragged": (3, 0, 17, 1, 64, 0, 5, 130),
    "empty": (0, 0, 0, 0),
    "one expert gets all": (0, 0, 200, 0, 0),
    "a token each": (1,) * 40,
}


@pytest.mark.parametrize(("config", "name"), SINGLE)
def test_every_scheme(config: str, name: str, record_property) -> None:
    kernel = kernel_for(config, (name,))
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    for load, (n, k) in itertools.product(LOADS.values(), ((256, 512), (200, 328), (72, 1000))):
        problem = run(kernel, Case(n=n, k=k, counts=load, scheme_names=(name,) * len(load)))
        assert problem is None, f"N={n} K={k} tokens {load}: {problem}"


@pytest.mark.parametrize(("config", "name"), SHORT_GROUPS)
def test_groups_of_64(config: str, name: str, record_property) -> None:
    kernel = kernel_for(config, (name,))
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    load = LOADS["ragged"]
    assert run(kernel, Case(n=200, k=456, counts=load, scheme_names=(name,) * len(load))) is None


@pytest.mark.parametrize(("config", "name"), [case for case in SINGLE if case[0] in FEW])
def test_sizes_no_alignment_divides(config: str, name: str) -> None:
    kernel = kernel_for(config, (name,))
    assert run(kernel, Case(n=61, k=101, counts=(7, 0, 20), scheme_names=(name,) * 3)) is None


@pytest.mark.parametrize(("config", "names"), MIXED)
def test_schemes_mixed_in_one_launch(config: str, names: tuple[str, ...], record_property) -> None:
    kernel = kernel_for(config, names)
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    for load in LOADS.values():
        order = [names[i * 7 % len(names)] for i in range(len(load))]
        problem = run(kernel, Case(n=264, k=576, counts=load, scheme_names=tuple(order)))
        assert problem is None, f"tokens {load}: {problem}"


@pytest.mark.parametrize(("config", "names"), WIDE)
def test_wide_tiles(config: str, names: tuple[str, ...], record_property) -> None:
    kernel = kernel_for(config, names)
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    for load in (LOADS["ragged"], (500, 81, 0, 160, 240, 79, 33, 96)):
        order = tuple(names[i % len(names)] for i in range(len(load)))
        problem = run(kernel, Case(n=520, k=712, counts=load, scheme_names=order))
        assert problem is None, f"tokens {load}: {problem}"


@pytest.mark.parametrize("config", [*SPLITS, "wgmma_256x8_w8x1x1_s4_k2_at_o1"])
@pytest.mark.parametrize("name", ["w16a16", "w4a16_g128_asym", "w4a8_g128_sym", "w8a8_g-1_sym"])
def test_a_reduction_of_few_k_tiles_leaves_parts_empty(config: str, name: str) -> None:
    kernel = kernel_for(config, (name,))
    for k in (8, 64, 128, 200, 320, 640):
        problem = run(kernel, Case(n=136, k=k, counts=(2, 0, 20, 1), scheme_names=(name,) * 4))
        assert problem is None, f"K={k}: {problem}"


FULL = [
    (config, name)
    for configs, names in (
        (
            (
                "wgmma_128x8_w4x1x1_s8_k1_at_o3",
                "wgmma_128x8_w4x1x1_s8_k4_at_o3",
                "wgmma_64x8_w4x1x1_s8_k1_at_o4",
                "wgmma_64x8_w4x1x1_s3_k1_at_o4",
                "wgmma_256x8_w8x1x1_s6_k2_at_o2",
                "wgmma_128x16_w4x1x1_s8_k1_at_o3_t8",
                "wgmma_128x16_w4x1x1_s6_k4_at_o3",
                "wgmma_256x16_w8x1x1_s6_k1_at_o2",
                "mma_64x8_w4x1x1_s6_k1_at_o4",
            ),
            ("w4a16_g128_sym", "w4a16_g-1_asym", "w2a16_g128_asym"),
        ),
        (
            ("wgmma_64x8_w4x1x1_s8_k1_at_o2", "wgmma_128x8_w4x1x1_s5_k4_at_o2", "wgmma_128x16_w4x1x1_s5_k1_at_o2_t8"),
            ("w8a16_g128_sym", "w4a8_g128_sym", "w8a8_g-1_sym_e4m3", "w16a16"),
        ),
    )
    for config in configs
    for name in names
]
"""Tiles of few tokens: their stages come and go fastest."""


@pytest.mark.parametrize(("config", "name"), FULL)
def test_a_full_gpu_gives_the_same_bits_every_time(config: str, name: str) -> None:
    """A stage that was written over before it had been read showed once in some hundred launches of many tiles, and
    only where weights came from DRAM.
    """
    counts = tuple((1, 3, 8, 5, 0, 2, 16)[e % 7] for e in range(28))
    problem = run(
        kernel_for(config, (name,)), Case(n=4096, k=3648, counts=counts, scheme_names=(name,) * 28), repeats=60
    )
    assert problem is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name", "k"),
    [
        ("wgmma_256x8_w8x1x1_s5_k2_at_o2", "w8a16_g-1_sym", 1408),
        ("wgmma_256x8_w8x1x1_s5_k1_at_o2", "w8a16_g-1_sym", 1472),
        ("wgmma_128x8_w4x1x1_s8_k4_at_o3", "w4a16_g128_sym", 1408),
        ("wgmma_256x16_w8x1x1_s6_k2_at_o2", "w4a16_g128_sym", 1408),
        ("wgmma_128x128_w8x1x1_s5_k1_at_o1_c2_t32", "w4a16_g128_sym", 1408),
    ],
)
def test_rings_survive_a_hundred_thousand_launches(config: str, name: str, k: int) -> None:
    """Odd numbers of k-tiles, and stages that the producers' number does not divide: once in some hundred thousand
    launches a stage that was released before the one ahead of it was filled twice, and the launch failed.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    weights = torch.randn(64, 2048, k, generator=generator, device="cuda")
    experts = Experts.from_weights(weights, schemes.parse(name))
    counts = (7, 1, 14, 3, 1, 1, 3, 2, 1, 3, 4, 3, 1, 5, 0, 0) + (1, 0, 3, 9, 2, 0, 1, 1) * 6
    x = torch.randn(sum(counts), k, generator=generator, device="cuda").to(torch.bfloat16)
    kernel, offsets = kernel_for(config, (name,)), offsets_of(counts)
    first = kernel(x, experts, offsets).clone()
    y = torch.empty_like(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            kernel(x, experts, offsets, y)
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, first)


def test_more_experts_than_the_default_table() -> None:
    name = "w4a16_g128_sym"
    counts = tuple(i * 5 % 7 for i in range(600))
    kernel = kernel_for(DECODE, (name,), max_experts=1024)
    assert run(kernel, Case(n=128, k=128, counts=counts, scheme_names=(name,) * 600)) is None


def test_a_real_layers_shape() -> None:
    name = "w4a16_g128_asym"
    counts = tuple(int(c) for c in torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(1)))
    kernel = kernel_for(MIDDLE, (name,))
    assert run(kernel, Case(n=2816, k=2048, counts=counts, scheme_names=(name,) * 60)) is None


@pytest.mark.parametrize("config", FEW)
def test_a_captured_graph_follows_the_offsets(config: str) -> None:
    """The tile list is made on the GPU: replaying with other offsets, no host in between, gives the other answer."""
    names = ("w4a16_g128_sym", "w8a8_g-1_sym")
    kernel = kernel_for(config, names)
    weights = torch.randn(4, 128, 256, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    experts = Experts.from_weights(weights, [schemes.parse(names[e % 2]) for e in range(4)])
    offsets = offsets_of((16, 16, 16, 16))
    activations = prepare_activations(x, experts.schemes)
    _, out = poisoned(64, 128)
    kernel(activations, experts, offsets, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(activations, experts, offsets, out)
    for counts in ((16, 16, 16, 16), (0, 64, 0, 0), (1, 2, 3, 58), (30, 0, 34, 0)):
        offsets.copy_(offsets_of(counts))
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert check_output(out, expected_of(x, weights, experts, offsets)) is None


@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize(
    "bad", [(0, -5, 1000, 7, 64), (10, 5, 0, -3, 2), (0, 2**31 - 1, 0, 64, 64), (-9, -8, -7, -6, -5)]
)
def test_offsets_out_of_range_stay_inside_the_tensors(bad: tuple[int, ...], config: str) -> None:
    kernel = kernel_for(config, ("w4a16_g128_sym",))
    experts = Experts.from_weights(torch.randn(4, 128, 256, device="cuda"), schemes.parse("w4a16_g128_sym"))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    whole, out = poisoned(64, 128)
    kernel(x, experts, torch.tensor(bad, dtype=torch.int32, device="cuda"), out)
    torch.cuda.synchronize()
    assert whole[:8].isnan().all()
    assert whole[-8:].isnan().all()
