"""Real build facts for a sweep: from a bundle, from the compile cache, or by compiling now where the compiler is
installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from costmodel.facts import BuildFacts
from kernel_gen.bundle import Bundle, RefusedKernel
from kernel_gen.compiler import Artifact
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.sweeping.candidates import Measurement, Workload, runs
from profiles.errors import UserError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig

if TYPE_CHECKING:
    from kernel_gen.build import GatedKernels, Track


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What became of one kernel: its facts, or why it must not run. `fingerprint` is its own either way."""

    fingerprint: str
    facts: BuildFacts | None = None
    failure: Measurement | None = None


def can_compile() -> bool:
    """Whether the `compile` extra is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("cutlass", "psutil", "pebble"))


def bundled(bundle: Bundle, workload: Workload) -> Mapping[KernelConfig, Built]:
    """The bundle's kernels for one workload, those that its build refused among them."""
    found = {
        kernel.spec.config: Built(fingerprint=kernel.fingerprint, facts=kernel.facts)
        for kernel in bundle.kernels
        if runs(kernel.spec.schemes, kernel.spec.max_experts, workload)
    }
    for kernel in bundle.refused:
        if runs(kernel.spec.schemes, kernel.spec.max_experts, workload):
            found.setdefault(kernel.spec.config, refused(kernel))
    return found


def compiled(
    specs: Sequence[KernelSpec], gpu: GpuSpec, track: Track, *, jobs: int | None = None
) -> dict[KernelSpec, Built]:
    """Compile what the cache lacks, in parallel, and judge it by the gate; `track` shows progress (`kernel_gen.build`).

    UserError when a tool of the `compile` extra is missing.
    """
    if not specs:
        return {}
    gated = compiled_and_gated(specs, gpu, track, jobs=jobs)
    return {artifact.spec: built(artifact, gpu) for artifact in gated.kept} | {
        kernel.spec: refused(kernel) for kernel in gated.refused
    }


def built(artifact: Artifact, gpu: GpuSpec) -> Built:
    """A kernel that passed the gate."""
    return Built(fingerprint=artifact.spec.fingerprint(), facts=artifact.facts(gpu))


def refused(kernel: RefusedKernel) -> Built:
    """A kernel that did not, or could not be compiled."""
    failure = Measurement.failed(kernel.status, "; ".join(kernel.reasons))
    return Built(fingerprint=kernel.spec.fingerprint(), failure=failure)


def compiled_and_gated(
    specs: Sequence[KernelSpec], gpu: GpuSpec, track: Track, *, jobs: int | None = None
) -> GatedKernels:
    """`kernel_gen.build.compile_and_gate` on this user's cache. UserError without a compiler."""
    if not can_compile():
        raise UserError(
            "no compiler here and no --bundle given: pip install 'bitile[compile]', or build a bundle elsewhere"
        )
    from kernel_gen.build import compile_and_gate  # it imports what only the `compile` extra installs
    from kernel_gen.cache import KernelCache, default_cache_dir

    return compile_and_gate(specs, gpu, KernelCache(root=default_cache_dir()), jobs=jobs, track=track)
