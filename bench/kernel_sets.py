"""Which GEMM kernels a measured run tries, and making them before it, in parallel, on any machine, into the cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

from costmodel.analytic import launch_latencies
from costmodel.launches import Launch
from kernel_gen.build import compile_and_gate
from kernel_gen.cache import KernelCache, default_cache_dir
from kernel_gen.kernels import KernelSpec
from kernel_gen.legality import estimated_facts
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from kernel_gen.sweeping.progress import Phase, phase
from profiles.gpus import GpuSpec
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

TRIES = 7
"""Samples of each candidate, launched alone with L2 flushed: all hold the same cost of a replay."""


@functools.cache
def ranked(
    per_expert: tuple[QuantScheme, ...], n: int, k: int, counts: tuple[int, ...], gpu: GpuSpec, num_configs: int
) -> tuple[KernelConfig, ...]:
    """The configurations that the latency model puts first for these experts and their tokens, best first."""
    slots = tuple(dict.fromkeys(per_expert))
    max_experts = table_size(len(per_expert))
    configs = candidates(slots, gpu, Effort.QUICK, max_experts=max_experts)
    load = TokenLoad(tokens_per_expert=counts, source="drawn")
    launches = [
        Launch(
            shape=GemmShape(m=load.total, n=n, k=k),
            load=load,
            schemes=per_expert,
            config=config,
            facts=estimated_facts(config, slots, gpu, max_experts=max_experts),
        )
        for config in configs
    ]
    if not launches:
        return ()
    order = launch_latencies(gpu, launches)["latency_us"].to_numpy().argsort(kind="stable")
    return tuple(configs[index] for index in order[:num_configs])


def progress(num_kernels: int) -> AbstractContextManager[Phase]:
    """Of compiling, on stderr."""
    return phase("compiling", num_kernels, live=True)


def compile_all(specs: Sequence[KernelSpec], gpu: GpuSpec) -> None:
    """Compiles what the cache lacks, with progress."""
    compile_and_gate(specs, gpu, KernelCache(root=default_cache_dir()), track=progress)
