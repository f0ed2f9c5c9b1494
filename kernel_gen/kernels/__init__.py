"""Device kernels. `spec` says what a kernel is and needs nothing; the rest imports CUTLASS, so `entry` does so only when called.

Units: scheduler (which tile next), loads (global to shared memory), dequant (packed words to MMA registers), mainloop (the k loop of one kind of
math), epilogue (accumulators to Y). `mma` wires them into the mma.sync family.
"""

from typing import Any

from kernel_gen.kernels.spec import KERNEL_ABI, MAX_SLOTS, KernelSpec, source_digest
from profiles.errors import UnsupportedError
from profiles.kernels import Family

__all__ = ["KERNEL_ABI", "MAX_SLOTS", "KernelSpec", "entry", "source_digest"]


def entry(spec: KernelSpec) -> tuple[Any, tuple[Any, ...]]:
    """(callable, fake arguments) for `cute.compile`. UnsupportedError for a family without kernels."""
    if spec.config.family is not Family.MMA:
        raise UnsupportedError(f"no kernels are generated for family {spec.config.family.value} yet")
    from kernel_gen.kernels import mma

    return mma.entry(spec)
