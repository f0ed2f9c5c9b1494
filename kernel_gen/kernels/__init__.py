"""Device kernels. `spec` says what a kernel is and needs nothing; the rest imports CUTLASS, so `entry` does so only
when called.

Units: scheduler (which tile next), loads (global to shared memory), dequant (packed words to MMA registers), mainloop
(the k loop of one kind of math), epilogue (accumulators to Y). `mma` wires them into the mma.sync family, `wgmma` its
own into sm_90a's. `steps` are a layer's kernels around the GEMMs.
"""

import importlib
from typing import Any

from kernel_gen.kernels.spec import ENTRY_MODULE, KERNEL_ABI, MAX_SLOTS, KernelSpec, source_digest
from kernel_gen.kernels.steps.spec import StepSpec
from profiles.errors import UnsupportedError

__all__ = ["ENTRY_MODULE", "KERNEL_ABI", "MAX_SLOTS", "KernelSpec", "StepSpec", "entry", "source_digest"]


def entry(spec: KernelSpec | StepSpec) -> tuple[Any, tuple[Any, ...]]:
    """(callable, fake arguments) for `cute.compile`. UnsupportedError for a family without kernels."""
    if isinstance(spec, StepSpec):
        return spec.entry()
    family = spec.config.family
    if family not in ENTRY_MODULE:
        raise UnsupportedError(f"{spec.config.name}", [f"the {family.value} family is not generated yet"])
    made: tuple[Any, tuple[Any, ...]] = importlib.import_module(ENTRY_MODULE[family]).entry(spec)
    return made
