"""Kernels that the tests of the build compile."""

from kernel_gen.kernels import KernelSpec
from profiles import kernels, schemes
from profiles.gpus import gpu

RTX4090 = gpu("rtx4090")


def kernel_spec(*names: str, config: str = "mma_64x8_w4x1x1_s3_k1_at_o1", arch: str = "sm_89") -> KernelSpec:
    """A kernel of these schemes, small unless told otherwise."""
    return KernelSpec(config=kernels.parse(config), schemes=tuple(schemes.parse(name) for name in names), arch=arch)


SMALL = kernel_spec("w4a16_g128_sym")
OTHER = kernel_spec("w8a8_g-1_sym")
SPILLING = kernel_spec("w4a16_g128_asym", config="mma_128x256_w2x2x1_s2_k1_at_o1")
"""256 accumulators a thread cannot fit 255 registers."""
SERIALISED = kernel_spec("w4a16_g128_asym", config="wgmma_128x256_w4x1x1_s2_k1_at_o1", arch="sm_90a")
"""One warpgroup with 256 accumulators a thread leaves the wgmma pipeline no registers."""
EMULATED = kernel_spec("w4a4_g-1_sym", arch="sm_90a")
"""Hopper has no int4 tensor cores."""
REFUSED = kernel_spec("w8a8_g-1_sym_e4m3", arch="sm_80")
"""PTX has no fp8 MMA before sm_89, so that the compiler refuses it."""
