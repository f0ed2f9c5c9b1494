"""Formats, device kernels and everything around them: what can be built, compile, gate, bundle, launch, time, sweep.

Importing this package needs neither torch nor CUTLASS nor a GPU; the modules that do are imported where they are used
(ARCHITECTURE.md lists them).

layouts     how weights, scales and activations lie in memory; formats: quantise, pack, check. kernels: the device code
space       the configurations worth considering; legality: why one cannot be, from smem, smem_wgmma and registers
build       `python -m kernel_gen.build`: compiler, pool and cache make objects, gate judges their machine code, linker
            and bundle keep them; build_report
experts     a linear's weights on a GPU; runtime: one launch, every argument checked; library: loaded kernels, of which
            select takes one
moe         grouped_gemm and MoELayer, whose other steps are in layer
sweep       `python -m kernel_gen.sweep`, of sweeping's parts; measure: one candidate, timing: the clocks
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from profiles.interrupt import end_at_once

if TYPE_CHECKING:
    from kernel_gen.bundle import load_bundle
    from kernel_gen.experts import Experts
    from kernel_gen.library import KernelLibrary
    from kernel_gen.moe import Fusion, MoELayer, grouped_gemm
    from kernel_gen.runtime import prepare_activations

end_at_once("kernel_gen")

_HOMES = {
    "Experts": "kernel_gen.experts",
    "Fusion": "kernel_gen.moe",
    "KernelLibrary": "kernel_gen.library",
    "MoELayer": "kernel_gen.moe",
    "grouped_gemm": "kernel_gen.moe",
    "load_bundle": "kernel_gen.bundle",
    "prepare_activations": "kernel_gen.runtime",
}
__all__ = [
    "Experts",
    "Fusion",
    "KernelLibrary",
    "MoELayer",
    "grouped_gemm",
    "load_bundle",
    "prepare_activations",
]


def __getattr__(name: str) -> object:
    """The package's public names, loaded when asked for: most of them need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
