"""Real build facts for a sweep: from a bundle, from the compile cache, or by compiling now where the compiler is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from costmodel.facts import BuildFacts
from kernel_gen.bundle import Bundle
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.sweeping.candidates import Measurement, Workload
from kernel_gen.sweeping.plan import runs
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.records import Status


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
            failure = Measurement.failed(kernel.status, "; ".join(kernel.reasons))
            found.setdefault(kernel.spec.config, Built(fingerprint=kernel.spec.fingerprint(), failure=failure))
    return found


def compiled(specs: Sequence[KernelSpec], gpu: GpuSpec, on_done: Callable[[str], None]) -> dict[KernelSpec, Built]:
    """Compile what the cache lacks, in parallel, and judge it by the gate. `on_done` is told of each kernel's label as it is ready.

    UserError when a tool of the `compile` extra is missing.
    """
    if not specs:
        return {}
    from kernel_gen.cache import KernelCache, default_cache_dir
    from kernel_gen.compiler import Artifact
    from kernel_gen.gate import rejections
    from kernel_gen.pool import Outcome, compile_all

    def judge(outcome: Outcome) -> Built:
        spec = outcome.spec
        if not isinstance(outcome, Artifact):
            return Built(fingerprint=spec.fingerprint(), failure=Measurement.failed(outcome.status, outcome.error))
        reasons = rejections(outcome.code, spec, gpu)
        if reasons:
            return Built(fingerprint=spec.fingerprint(), failure=Measurement.failed(Status.REJECTED, "; ".join(reasons)))
        return Built(fingerprint=spec.fingerprint(), facts=outcome.facts(gpu))

    cache = KernelCache(root=default_cache_dir())
    built: dict[KernelSpec, Built] = {}
    missing: list[KernelSpec] = []
    for spec in specs:
        artifact = cache.get(spec)
        if artifact is None:
            missing.append(spec)
        else:
            built[spec] = judge(artifact)
            on_done(spec.label)
    for outcome in compile_all(missing, cache, on_outcome=lambda outcome: on_done(outcome.spec.label)):
        built[outcome.spec] = judge(outcome)
    return built
