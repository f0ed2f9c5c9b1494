"""The predict backend: the analytic model over build facts, which are real for the kernels that matter most and
estimated for the rest.

Compiling every configuration would take minutes; the model needs real facts only where they decide. So each kernel's
configurations are ranked with estimated facts, the few that serve all the loads best (least regret) are built, and
these are priced again with the compiler's numbers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kernel_gen
from costmodel.analytic import launch_latencies, model_version
from costmodel.facts import BuildFacts
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort
from kernel_gen.sweeping.builds import Built, bundled
from kernel_gen.sweeping.candidates import Candidate, Measurement, Workload
from kernel_gen.sweeping.plan import Cell, SweepRequest
from profiles.kernels import KernelConfig
from profiles.records import ProfileRecord, Source, Status
from profiles.schemes import QuantScheme

BUILDS_PER_KERNEL = {Effort.QUICK: 3, Effort.FULL: 12}
"""Configurations built per combination of schemes; with 23 schemes the quick ones take half a minute on two cores, and
seconds from the cache.
"""
KEPT_PER_CELL = 4
"""Configurations whose prediction is kept for each workload and load, beside those that were built: a prediction can be
made again in microseconds.
"""

Slots = tuple[frozenset[QuantScheme], int]


def by_kernel(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that the same kernels serve, together: the same schemes and expert slots, whatever the model, linear and
    load.
    """
    groups: dict[Slots, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((frozenset(cell.workload.slots), cell.workload.max_experts), []).append(cell)
    return list(groups.values())


def wanted_builds(request: SweepRequest, cells: Sequence[Cell]) -> list[KernelSpec]:
    """The kernels to build before predicting `cells`, most useful first within each combination of schemes; none when
    there is a bundle.
    """
    if request.bundle is not None:
        return []
    return [spec for group in by_kernel(cells) for spec in _group_builds(request, group)]


def _group_builds(request: SweepRequest, group: Sequence[Cell]) -> list[KernelSpec]:
    configs = sorted({config for cell in group for config in cell.configs}, key=lambda config: config.name)
    index = {config: row for row, config in enumerate(configs)}
    latency_us = np.full((len(configs), len(group)), np.inf)
    for column, cell in enumerate(group):
        latency_us[[index[config] for config in cell.configs], column] = cell.prices_us
    return [
        group[0].candidate(configs[row]).spec(request.gpu)
        for row in least_regret(latency_us, BUILDS_PER_KERNEL[request.effort])
    ]


def least_regret(latency_us: npt.NDArray[np.float64], limit: int) -> list[int]:
    """Up to `limit` rows of [configurations, loads] that together lose least: greedily, by the sum over loads of
    log(best chosen / best of all).

    Ends early once nothing is lost. Infinity is a configuration that does not serve a load.
    """
    best = latency_us.min(axis=0)
    loss = np.minimum(np.log(latency_us / best), math.log(1e6))
    chosen: list[int] = []
    current = np.full(latency_us.shape[1], math.log(1e6))
    while len(chosen) < limit and current.sum() > 1e-9:
        totals = np.minimum(loss, current).sum(axis=1)
        chosen.append(int(totals.argmin()))
        current = np.minimum(current, loss[chosen[-1]])
    return chosen


def predict(request: SweepRequest, cells: Sequence[Cell], built: Mapping[KernelSpec, Built]) -> Iterator[ProfileRecord]:
    """Rows for each cell, in the order of `cells`: its best configurations, and all that were built for its schemes.

    Latencies are over the facts in `built` or in the bundle, else over estimates.
    """
    versions = model_versions(with_compiler=bool(built))
    for cell in cells:
        facts = _built_for(request, cell.workload, built)
        candidates = [cell.candidate(config) for config in kept(cell, () if request.bundle else facts)]
        used = [_facts(request, candidate, facts) for candidate in candidates]
        launches = [candidate.launch(of_build) for candidate, of_build in zip(candidates, used, strict=True)]
        prices_us = launch_latencies(request.gpu, launches)["latency_us"].to_numpy()
        for candidate, of_build, price_us in zip(candidates, used, prices_us, strict=True):
            known = facts.get(candidate.config)
            failure = known.failure if known else None
            yield candidate.record(
                gpu=request.gpu.name,
                source=Source.PREDICTED,
                outcome=failure or Measurement(status=Status.OK, latency_us=float(price_us)),
                kernel_fingerprint=known.fingerprint if known else "",
                versions={**versions, "ctas_per_sm": str(of_build.ctas_per_sm)},
            )


def kept(cell: Cell, built: Iterable[KernelConfig]) -> list[KernelConfig]:
    """The configurations of a cell whose predictions become rows: the first few, and those of `built` that run it."""
    also = sorted(set(cell.configs) & set(built), key=lambda config: config.name)
    return list(dict.fromkeys([*cell.configs[:KEPT_PER_CELL], *also]))


def _built_for(
    request: SweepRequest, workload: Workload, built: Mapping[KernelSpec, Built]
) -> Mapping[KernelConfig, Built]:
    if request.bundle is not None:
        return bundled(request.bundle, workload)
    slots = set(workload.slots)
    return {
        spec.config: outcome
        for spec, outcome in built.items()
        if set(spec.schemes) == slots and spec.max_experts == workload.max_experts
    }


def _facts(request: SweepRequest, candidate: Candidate, built: Mapping[KernelConfig, Built]) -> BuildFacts:
    """The build's, or estimates where there is none."""
    known, work = built.get(candidate.config), candidate.workload
    if known is not None and known.facts is not None:
        return known.facts
    return estimated_facts(candidate.config, work.slots, request.gpu, max_experts=work.max_experts)


def model_versions(*, with_compiler: bool) -> dict[str, str]:
    """What a prediction depends on beside its row: this package, the analytic model's sources, the compiler if one was
    used.
    """
    versions = {"bitile": package_version(), "analytic": analytic_digest()}
    if with_compiler:
        from kernel_gen.compiler import dsl_version

        versions["dsl"] = dsl_version()
    return versions


def package_version() -> str:
    """This distribution's version, or "unknown" when it runs from a checkout that is not installed."""
    try:
        return importlib.metadata.version("bitile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def analytic_digest() -> str:
    """Twelve hex digits over the sources that decide a prediction: rows of another digest are of another model."""
    digest = hashlib.sha256(model_version().encode())
    for name in ("legality", "registers", "smem", "smem_wgmma"):
        digest.update(Path(kernel_gen.__path__[0], f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]
