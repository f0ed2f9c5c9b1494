"""Real build facts for a sweep: from a bundle, from the compile cache, or by compiling now where the compiler is
installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from costmodel.facts import BuildFacts
from kernel_gen.bundle import Bundle, RefusedKernel, write_bundle
from kernel_gen.compiler import Artifact
from kernel_gen.gate import rejections
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.sweeping.candidates import Measurement, Workload, runs
from profiles.errors import UserError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.records import Status

if TYPE_CHECKING:
    from kernel_gen.pool import Outcome


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


def compiled(
    specs: Sequence[KernelSpec], gpu: GpuSpec, on_done: Callable[[str], None], *, jobs: int | None = None
) -> dict[KernelSpec, Built]:
    """Compile what the cache lacks, in parallel, and judge it by the gate. `on_done` is told of each kernel's label as
    it is ready.

    UserError when a tool of the `compile` extra is missing.
    """
    return {outcome.spec: _judge(outcome, gpu) for outcome in _outcomes(specs, on_done, jobs)}


def _judge(outcome: Outcome, gpu: GpuSpec) -> Built:
    spec = outcome.spec
    if not isinstance(outcome, Artifact):
        return Built(fingerprint=spec.fingerprint(), failure=Measurement.failed(outcome.status, outcome.error))
    reasons = rejections(outcome.code, spec, gpu)
    if reasons:
        return Built(fingerprint=spec.fingerprint(), failure=Measurement.failed(Status.REJECTED, "; ".join(reasons)))
    return Built(fingerprint=spec.fingerprint(), facts=outcome.facts(gpu))


def _outcomes(
    specs: Sequence[KernelSpec], on_done: Callable[[str], None], jobs: int | None = None
) -> Iterator[Outcome]:
    """Cached kernels first, then the others as they are compiled. Imports what only the `compile` extra installs."""
    if not specs:
        return
    from kernel_gen.cache import KernelCache, default_cache_dir
    from kernel_gen.pool import compile_all

    cache = KernelCache(root=default_cache_dir())
    missing: list[KernelSpec] = []
    for spec in specs:
        artifact = cache.get(spec)
        if artifact is None:
            missing.append(spec)
        else:
            on_done(spec.label)
            yield artifact
    yield from compile_all(missing, cache, jobs=jobs, on_outcome=lambda outcome: on_done(outcome.spec.label))


def build_bundle(specs: Sequence[KernelSpec], gpu: GpuSpec, out_dir: Path, on_done: Callable[[str], None]) -> Bundle:
    """Compile what the cache lacks, gate, and link into a bundle in `out_dir`. UserError without a compiler, or when no
    kernel is left.
    """
    if not can_compile():
        raise UserError(
            "no compiler here and no --bundle given: pip install 'bitile[compile]', or build a bundle elsewhere"
        )
    outcomes = {outcome.spec: outcome for outcome in _outcomes(specs, on_done)}
    judged = {spec: _judge(outcome, gpu) for spec, outcome in outcomes.items()}
    kept = [outcome for spec, outcome in outcomes.items() if judged[spec].facts and isinstance(outcome, Artifact)]
    refused = [
        RefusedKernel(spec=spec, status=built.failure.status, reasons=(built.failure.error,))
        for spec, built in judged.items()
        if built.failure
    ]
    return write_bundle(out_dir, gpu, kept, refused)
