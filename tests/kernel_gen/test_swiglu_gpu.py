"""GEMMs with SwiGLU in their epilogue, and launches that overlap, of both families."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cutlass")

from kernel_gen.compiler import load_in_process  # noqa: E402
from kernel_gen.experts import Experts  # noqa: E402
from kernel_gen.formats import dequantize, dequantize_activations, quantize, quantize_activations  # noqa: E402
from kernel_gen.kernels import KernelSpec  # noqa: E402
from kernel_gen.runtime import Kernel, prepare_activations  # noqa: E402
from profiles import kernels, schemes  # noqa: E402
from profiles.errors import SpecError  # noqa: E402
from tests.kernel_gen.gpu_cases import offsets_of, poisoned  # noqa: E402

pytestmark = pytest.mark.gpu

WGMMA = (
    "wgmma_64x8_w4x1x1_s4_k1_at_o4",
    "wgmma_64x16_w4x1x1_s4_k1_at_o4",
    "wgmma_128x64_w8x1x1_s4_k1_at_o2",
    "wgmma_256x128_w8x1x1_s3_k1_at_o1",
)
MMA = ("mma_64x8_w4x1x1_s5_k1_at_o2", "mma_128x64_w4x2x1_s3_k1_at_o1")
MIXES = (
    ("w16a16",),
    ("w4a16_g128_asym", "w8a16_g-1_sym"),
    ("w4a8_g128_sym", "w8a8_g-1_sym"),
    ("w2a16_g128_sym", "w4a16_g-1_asym", "w8a8_g-1_sym"),
)
FP8 = (("w8a8_g-1_sym_e4m3",), ("w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"), ("w8a8_g-1_sym_e4m3", "w4a16_g128_sym"))
COUNTS = ((1, 0, 3, 0, 17, 129), (0, 0, 200, 0, 0, 0), (5, 5, 5, 5, 5, 5))


def kernel_of(config, names, **options) -> Kernel:
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        pytest.skip("these configurations are for sm_90a")
    spec = KernelSpec(
        config=kernels.parse(config), schemes=tuple(schemes.parse(name) for name in names), arch="sm_90a", **options
    )
    return Kernel(spec, load_in_process(spec), ctas_per_sm=spec.config.min_ctas_per_sm)


def weights_of(names, intermediate, k):
    """(interleaved experts, each expert's scheme, its real weights)."""
    generator = torch.Generator("cuda").manual_seed(intermediate)
    per_expert = [schemes.parse(names[e % len(names)]) for e in range(6)]
    weights = torch.randn(6, 2 * intermediate, k, generator=generator, device="cuda") / k**0.5
    real = [dequantize(quantize(weights[e : e + 1], scheme))[0] for e, scheme in enumerate(per_expert)]
    return Experts.from_weights(weights, per_expert).interleaved(), per_expert, real


def expected_product(x, counts, per_expert, real):
    parts = []
    for rows, scheme, weights in zip(x.split(list(counts)), per_expert, real, strict=True):
        values = dequantize_activations(quantize_activations(rows, scheme))
        gate, up = (values @ weights.T).chunk(2, dim=1)
        parts.append(torch.nn.functional.silu(gate) * up)
    return torch.cat(parts)


CASES = [*((config, names) for config in WGMMA for names in MIXES[:3] + FP8), *((c, n) for c in MMA for n in MIXES)]


@pytest.mark.parametrize(
    ("config", "names"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_the_epilogue_multiplies_silu_of_gate_by_up(config, names) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    kernel = kernel_of(config, names, swiglu=True)
    for intermediate, k in ((192, 256), (72, 250), (264, 128)):
        experts, per_expert, real = weights_of(names, intermediate, k)
        for counts in COUNTS:
            total = sum(counts)
            generator = torch.Generator("cuda").manual_seed(total)
            x = torch.randn(total, k, generator=generator, device="cuda").to(torch.bfloat16)
            whole, y = poisoned(total, intermediate)
            kernel(prepare_activations(x, experts.schemes), experts, offsets_of(counts), out=y)
            expected = expected_product(x, counts, per_expert, real)
            error = (y.float() - expected).norm() / expected.norm()
            assert error < 0.004, (intermediate, k, counts)
            assert whole[:8].isnan().all()
            assert whole[-8:].isnan().all()
            first = y.clone()
            kernel(prepare_activations(x, experts.schemes), experts, offsets_of(counts), out=y)
            assert torch.equal(first.view(torch.int16), y.view(torch.int16))


CHAINED = (
    *((config, ("w16a16",)) for config in (WGMMA[0], WGMMA[2], MMA[0])),
    ("wgmma_64x8_w4x1x1_s8_k1_at_o4", ("w4a16_g128_asym", "w2a16_g128_sym")),
    ("wgmma_128x16_w4x1x1_s8_k1_at_o3_t8", ("w4a16_g128_sym", "w2a16_g128_sym")),
    ("wgmma_128x16_w4x1x1_s8_k4_at_o3", ("w4a16_g128_sym",)),
    ("wgmma_128x64_w8x1x1_s3_k1_at_o2_t16", ("w8a16_g128_asym",)),
    ("wgmma_128x64_w8x1x1_s4_k1_at_o1_c2", ("w3a16_g128_sym", "w16a16")),
)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("config", "names"), CHAINED)
def test_overlapping_gemms_wait_for_each_other(config, names, prefetch) -> None:
    """A chain of products, each of which reads what the one before wrote: any that did not wait would show."""
    overlapping = kernel_of(config, names, overlap=True, prefetch=prefetch)
    plain = kernel_of(config, names)
    for size, counts in ((256, (250, 350)), (1152, (0, 3, 1, 20)), (1152, (700, 1))):  # 256: fewer k-tiles than stages
        per_expert = [schemes.parse(names[e % len(names)]) for e in range(len(counts))]
        weights = torch.randn(len(counts), size, size, device="cuda") / size**0.5
        experts = Experts.from_weights(weights, per_expert)
        x = torch.randn(sum(counts), size, device="cuda").to(torch.bfloat16)
        offsets = offsets_of(counts)
        expected = chain(plain, x, experts, offsets)
        assert expected.isfinite().all()
        assert all(torch.equal(chain(overlapping, x, experts, offsets), expected) for _ in range(20))


def chain(kernel: Kernel, x, experts: Experts, offsets):
    for _ in range(6):
        x = kernel(x, experts, offsets)
    return x


def test_plain_weights_are_refused_by_the_epilogue() -> None:
    kernel = kernel_of(WGMMA[0], ("w16a16",), swiglu=True)
    experts = Experts.from_weights(torch.zeros(1, 64, 64, device="cuda"), schemes.parse("w16a16"))
    x = torch.zeros(3, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(SpecError, match="experts: expected gate and up interleaved"):
        kernel(x, experts, offsets_of((3,)))
    with pytest.raises(SpecError, match="experts: expected rows in their order"):
        kernel_of(WGMMA[0], ("w16a16",))(x, experts.interleaved(), offsets_of((3,)))
