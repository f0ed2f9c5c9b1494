"""Kernels with options (SwiGLU in the epilogue, overlapping launches) compile, pass the gate and survive a bundle."""

import pytest

pytest.importorskip("cutlass")

from kernel_gen.bundle import load_bundle, write_bundle
from kernel_gen.compiler import compile_kernel
from kernel_gen.gate import rejections
from kernel_gen.kernels import KernelSpec
from profiles import kernels, schemes
from profiles.gpus import gpu

CASES = (
    ("h200", "wgmma_64x16_w4x1x1_s4_k1_at_o4", "w16a16+w4a16_g128_sym", {"swiglu": True, "overlap": True}),
    ("h200", "mma_64x8_w4x1x1_s5_k1_at_o2", "w4a16_g128_sym+w8a8_g-1_sym", {"overlap": True}),
    ("h200", "wgmma_64x8_w4x1x1_s8_k1_at_o4", "w2a16_g128_asym+w4a8_g128_sym", {"overlap": True, "prefetch": True}),
    ("h200", "mma_64x8_w4x1x1_s5_k1_at_o2", "w4a16_g128_sym", {"overlap": True, "prefetch": True}),
    ("rtx4090", "mma_64x8_w4x1x1_s4_k1_at_o2", "w4a16_g128_sym", {"swiglu": True}),
)


@pytest.mark.parametrize(("card", "config", "names", "options"), CASES, ids=lambda value: str(value))
def test_a_kernel_with_options(card, config, names, options, tmp_path) -> None:
    target = gpu(card)
    slots = tuple(schemes.parse(name) for name in names.split("+"))
    spec = KernelSpec(config=kernels.parse(config), schemes=slots, arch=target.arch, **options)
    artifact = compile_kernel(spec, tmp_path)
    assert rejections(artifact.code, spec, target) == ()
    write_bundle(tmp_path / "bundle", target, [artifact], [])
    (found,) = load_bundle(tmp_path / "bundle").kernels
    assert found.spec == spec
    assert found.fingerprint == spec.fingerprint()
