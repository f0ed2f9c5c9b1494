"""Which GEMM kernels a measured run tries, and making them before it, in parallel, on any machine, into the cache."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum

from costmodel.analytic import launch_latencies
from costmodel.pricing import KernelChooser
from costmodel.shipped import fitted
from kernel_gen.build import compile_and_gate
from kernel_gen.cache import KernelCache, default_cache_dir
from kernel_gen.gate import rejections
from kernel_gen.kernels import KernelSpec
from kernel_gen.select import Ranking, kernel_uses, ranking
from kernel_gen.sweeping.progress import Phase, phase
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.loads import TokenLoad
from profiles.records import Status
from profiles.schemes import QuantScheme

TRIES = 7
"""Samples of each candidate, launched alone with L2 flushed: all hold the same cost of a replay."""


@functools.cache
def ranked(
    per_expert: tuple[QuantScheme, ...], n: int, k: int, counts: tuple[int, ...], gpu: GpuSpec
) -> tuple[KernelConfig, ...]:
    """Configurations for these experts and their tokens, best first: in turn what the fitted latency model, which knows
    recorded kernels, and the analytic one, which knows new ones as well, put first.
    """
    load = TokenLoad(tokens_per_expert=counts, source="drawn")
    try:
        uses = kernel_uses(per_expert, n, k, gpu)
    except UnsupportedError:
        return ()
    by_core = launch_latencies(gpu, [use.launch(load) for use in uses])["latency_us"].to_numpy()
    orders = [by_core.argsort(kind="stable")]
    if ranking(gpu) is Ranking.FITTED:
        orders.insert(0, KernelChooser(fitted(gpu).model, gpu, uses).latencies_us(load).argsort(kind="stable"))
    in_turn = dict.fromkeys(index for pair in zip(*orders, strict=True) for index in pair)
    return tuple(uses[index].config for index in in_turn)


ALWAYS_TRIED = 2
"""The first of both latency models."""


def shared(rankings: Sequence[Sequence[KernelConfig]], number: int) -> list[KernelConfig]:
    """A few configurations of which every ranking has its first two and, of its first 2 * `number`, as many as
    `number`: kernels that many launches can try. Greedy: always the one that most rankings still lack.
    """
    tops = [ranking[: 2 * number] for ranking in rankings]
    found = list(dict.fromkeys(config for top in tops for config in top[: min(number, ALWAYS_TRIED)]))
    while True:
        lacking = [top for top in tops if sum(config in found for config in top) < min(number, len(top))]
        if not lacking:
            return found
        wanted = Counter(config for top in lacking for config in top if config not in found)
        found.append(wanted.most_common(1)[0][0])


class Standing(Enum):
    """What the cache knows of a kernel."""

    UNKNOWN = "not compiled yet"
    MAY_RUN = "passed the gate"
    REFUSED = "refused by the gate"


def standing(spec: KernelSpec, gpu: GpuSpec) -> Standing:
    """Of one kernel."""
    artifact = KernelCache(root=default_cache_dir()).get(spec)
    if artifact is None:
        return Standing.UNKNOWN
    return Standing.REFUSED if rejections(artifact.code, spec, gpu) else Standing.MAY_RUN


def progress(num_kernels: int) -> AbstractContextManager[Phase]:
    """Of compiling, on stderr."""
    return phase("compiling", num_kernels, live=True)


def compile_all(specs: Sequence[KernelSpec], gpu: GpuSpec) -> int:
    """Compiles what the cache lacks, with progress; how many could not be compiled."""
    gated = compile_and_gate(specs, gpu, KernelCache(root=default_cache_dir()), track=progress)
    return sum(kernel.status is not Status.REJECTED for kernel in gated.refused)


def build_until_known(wanted: Callable[[], list[KernelSpec]], gpu: GpuSpec) -> tuple[list[KernelSpec], bool]:
    """Compiles what is wanted until the cache knows all of it: what the gate refuses changes what is wanted next. What
    that is in the end, and whether all of it could be compiled.
    """
    while True:
        specs = wanted()
        if all(standing(spec, gpu) is not Standing.UNKNOWN for spec in specs):
            return specs, True
        if compile_all(specs, gpu):
            return specs, False
