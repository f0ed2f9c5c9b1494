"""The mma family on a GPU: every scheme, loads of every kind, sizes off the tile, mixed launches, graphs."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import check_output  # noqa: E402
from kernel_gen.runtime import prepare_activations  # noqa: E402
from profiles import schemes  # noqa: E402
from profiles.schemes import KERNEL_SCHEMES  # noqa: E402
from tests.kernel_gen.gpu_cases import Case, expected_of, kernel_for, offsets_of, poisoned, run  # noqa: E402

pytestmark = pytest.mark.gpu

CONFIGS = (
    "mma_64x8_w4x1x1_s6_k1_at_o4",
    "mma_128x16_w8x1x1_s4_k1_af_o2",
    "mma_128x64_w4x2x1_s3_k1_at_o1",
    "mma_128x128_w2x4x1_s3_k1_af_o1",
)
# w4a8 with e4m3 activations is the wgmma family's.
NAMES = tuple(s.name for s in KERNEL_SCHEMES if s.name != "w4a8_g128_sym_e4m3")
LOADS = {
    "ragged": (3, 0, 17, 1, 64, 0, 5, 130),
    "empty": (0, 0, 0, 0),
    "one expert gets all": (0, 0, 200, 0, 0),
    "a token each": (1,) * 40,
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_scheme(name: str, config: str, record_property) -> None:
    kernel = kernel_for(config, (name,))
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    for load, (n, k) in itertools.product(LOADS.values(), ((256, 512), (200, 328), (72, 1000))):
        problem = run(kernel, Case(n=n, k=k, counts=load, scheme_names=(name,) * len(load)))
        assert problem is None, f"N={n} K={k} tokens {load}: {problem}"


@pytest.mark.parametrize("name", NAMES)
def test_sizes_no_alignment_divides(name: str) -> None:
    kernel = kernel_for(CONFIGS[1], (name,))
    assert run(kernel, Case(n=61, k=101, counts=(7, 0, 20), scheme_names=(name,) * 3)) is None


@pytest.mark.parametrize(
    "names",
    [
        ("w4a16_g128_sym", "w8a8_g-1_sym"),
        ("w2a16_g128_asym", "w4a4_g128_sym"),
        ("w16a16", "w8a8_g-1_sym_e4m3", "w3a16_g-1_asym"),
        ("w4a16_g128_asym", "w8a8_g-1_sym", "w2a16_g128_asym", "w4a4_g-1_sym"),
        ("w8a16_g-1_sym", "w4a8_g128_sym", "w4a8_g-1_sym", "w16a16"),
    ],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_schemes_mixed_in_one_launch(names: tuple[str, ...], config: str, record_property) -> None:
    kernel = kernel_for(config, names)
    record_property("kernel", f"{kernel.spec.label} {kernel.spec.fingerprint()}")
    for load in LOADS.values():
        order = [names[i * 7 % len(names)] for i in range(len(load))]
        problem = run(kernel, Case(n=264, k=576, counts=load, scheme_names=tuple(order)))
        assert problem is None, f"tokens {load}: {problem}"


def test_more_experts_than_the_default_table() -> None:
    name = "w4a16_g128_sym"
    counts = tuple(i * 5 % 7 for i in range(600))
    kernel = kernel_for(CONFIGS[1], (name,), max_experts=1024)
    assert run(kernel, Case(n=128, k=128, counts=counts, scheme_names=(name,) * 600)) is None


def test_a_real_layers_shape() -> None:
    name = "w4a16_g128_asym"
    counts = tuple(int(c) for c in torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(1)))
    kernel = kernel_for(CONFIGS[2], (name,))
    assert run(kernel, Case(n=2816, k=2048, counts=counts, scheme_names=(name,) * 60)) is None


def test_a_captured_graph_follows_the_offsets() -> None:
    """The tile list is made on the GPU: replaying with other offsets, no host in between, gives the other answer."""
    names = ("w4a16_g128_sym", "w8a8_g-1_sym")
    kernel = kernel_for(CONFIGS[1], names)
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


@pytest.mark.parametrize("bad", [(0, -5, 1000, 7, 64), (10, 5, 0, -3, 2), (0, 2**31 - 1, 0, 64, 64), (-9, -8, -7, -6, -5)])
def test_offsets_out_of_range_stay_inside_the_tensors(bad: tuple[int, ...]) -> None:
    kernel = kernel_for(CONFIGS[1], ("w4a16_g128_sym",))
    experts = Experts.from_weights(torch.randn(4, 128, 256, device="cuda"), schemes.parse("w4a16_g128_sym"))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    whole, out = poisoned(64, 128)
    kernel(x, experts, torch.tensor(bad, dtype=torch.int32, device="cuda"), out)
    torch.cuda.synchronize()
    assert whole[:8].isnan().all()
    assert whole[-8:].isnan().all()
