"""The cuda backend: a row for each candidate by running it, on a bench of GPUs that tests replace by their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from kernel_gen.bundle import Bundle, write_bundle
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.space import Effort
from kernel_gen.sweeping import progress
from kernel_gen.sweeping.builds import Built, built, bundled, compiled_and_gated, refused
from kernel_gen.sweeping.candidates import Candidate, Measurement, Workload
from kernel_gen.sweeping.detect import InstalledGpu
from kernel_gen.sweeping.isolation import Device, WorkerPool
from kernel_gen.sweeping.plan import Cell, SweepRequest
from kernel_gen.sweeping.predict import package_version
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.records import ProfileRecord, Source

TRIES_PER_CELL = {Effort.QUICK: 4, Effort.FULL: 16}
"""Configurations measured per workload and load, the best by the analytic model. Others report that 8 to 16 such
candidates hold 96 to 99 % of what an exhaustive search finds (nvMatmulHeuristics).
"""


class Pool(Protocol):
    """Runs candidates; `WorkerPool` on this machine, `cluster.ClusterPool` on several."""

    def run(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        """Each candidate with how it went, as they finish."""


class Bench(Protocol):
    """Where candidates are measured, and with which kernels."""

    def build(self, candidates: Sequence[Candidate], *, live: bool) -> None:
        """Make the kernels of all candidates, beside those that were made before."""

    def find(self, candidate: Candidate) -> Built | None:
        """What became of a candidate's kernel; None if it was never built."""

    def pool(self) -> AbstractContextManager[Pool]:
        """The workers, for as long as the context lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFactory:
    """Opens one GPU in a worker process: the process sees no other. Its kernels: `shelf.Shelf(bundles)`."""

    uuid: str
    driver: str
    bundles: Path

    def __call__(self) -> Device:
        """The device. Must be the first use of CUDA in the process."""
        os.environ["CUDA_VISIBLE_DEVICES"] = self.uuid
        from kernel_gen.measure import CudaDevice

        return CudaDevice(self.bundles, self.driver)


class GpuBench:
    """This machine's GPUs of one kind, with a bundle given or bundles built for the sweep, one a call of `build`. A
    context manager: built bundles last as long.
    """

    def __init__(self, gpu: GpuSpec, installed: Sequence[InstalledGpu], bundle: Bundle | None, limit_s: float) -> None:
        self._gpu, self._installed, self._limit_s = gpu, installed, limit_s
        self._given, self._own = bundle, bundle
        self._folder = tempfile.TemporaryDirectory(prefix="bitile-sweep-")
        self._root = Path(self._folder.name)
        self._by_workload: dict[Workload, Mapping[KernelConfig, Built]] = {}
        self._built: dict[KernelSpec, Built] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def build(self, candidates: Sequence[Candidate], *, live: bool) -> None:
        """Compile and link those of the candidates' kernels that are new, unless a bundle was given.

        UserError without a compiler, or when none of the first kernels passes the gate.
        """
        if self._given is not None:
            return
        specs = [spec for spec in dict.fromkeys(each.spec(self._gpu) for each in candidates) if spec not in self._built]
        if not specs:
            return
        gated = compiled_and_gated(specs, self._gpu, lambda number: progress.phase("built", number, live=live))
        if gated.kept or not self._built:
            number = len(list(self._root.iterdir()))
            self._own = write_bundle(self._root / f"{number:04}", self._gpu, gated.kept, gated.refused)
        self._built |= {artifact.spec: built(artifact, self._gpu) for artifact in gated.kept}
        self._built |= {kernel.spec: refused(kernel) for kernel in gated.refused}

    def find(self, candidate: Candidate) -> Built | None:
        """From the bundle given, or what was built."""
        if self._given is None:
            return self._built.get(candidate.spec(self._gpu))
        work = candidate.workload
        if work not in self._by_workload:
            self._by_workload[work] = bundled(self._given, work)
        return self._by_workload[work].get(candidate.config)

    @property
    def bundle(self) -> Bundle:
        """The one given, else the one built last."""
        bundle = self._given or self._own
        assert bundle is not None  # build comes first
        return bundle

    def pool(self) -> WorkerPool:
        """One worker per GPU. It runs kernels that are built after it was made, too."""
        bundles = self._root if self._given is None else self._given.path
        factories = [CudaFactory(uuid=gpu.uuid, driver=gpu.driver, bundles=bundles) for gpu in self._installed]
        return WorkerPool(factories, limit_s=self._limit_s)


def wanted(request: SweepRequest, cells: Sequence[Cell]) -> list[Candidate]:
    """What a sweep measures: each cell's most promising configurations."""
    tries = request.tries or TRIES_PER_CELL[request.effort]
    return [cell.candidate(config) for cell in cells for config in cell.configs[:tries]]


def measure(
    request: SweepRequest, cells: Sequence[Cell], bench: Bench, had: Mapping[str, ProfileRecord], *, live: bool
) -> Iterator[ProfileRecord]:
    """A row for each candidate that is `wanted`: those that the profile has as they are, the others measured now."""
    candidates = wanted(request, cells)
    bench.build(candidates, live=live)
    remaining: list[Candidate] = []
    found_of: dict[Candidate, Built] = {}

    def row(candidate: Candidate, outcome: Measurement) -> ProfileRecord:
        return candidate.record(
            gpu=request.gpu.name,
            source=Source.MEASURED,
            outcome=outcome,
            kernel_fingerprint=found_of[candidate].fingerprint,
            versions={"bitile": package_version()},
        )

    for candidate in candidates:
        found = bench.find(candidate)
        if found is None:
            continue
        found_of[candidate] = found
        stored = had.get(
            candidate.key(gpu=request.gpu.name, source=Source.MEASURED, kernel_fingerprint=found.fingerprint)
        )
        if stored is not None:
            yield stored
        elif found.failure is not None:
            yield row(candidate, found.failure)
        else:
            remaining.append(candidate)
    if not remaining:
        return
    with progress.phase("measured", len(remaining), live=live) as bar, bench.pool() as pool:
        for candidate, outcome in pool.run(remaining):
            yield row(candidate, outcome)
            work = candidate.workload
            bar.step(f"{work.linear} {work.label} {candidate.config.name}: {outcome.status.value}")
