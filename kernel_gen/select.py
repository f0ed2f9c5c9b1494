"""Which configuration to launch: the fastest by the latency model for so many rows, before anything is measured.

Torch-free.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from costmodel.analytic import launch_latencies
from costmodel.launches import Launch
from kernel_gen.legality import estimated_facts
from kernel_gen.space import Effort, candidates, enumerate_configs, summarise
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

MAX_EXPERTS = 1024
"""Of `KernelSpec.max_experts`."""


def choose(
    schemes: Sequence[QuantScheme],
    n: int,
    k: int,
    num_rows: int,
    gpu: GpuSpec,
    *,
    among: tuple[KernelConfig, ...] | None = None,
) -> KernelConfig:
    """The configuration for a launch of `num_rows` rows spread evenly over experts with these schemes, one each; one of
    `among`, which were built for them, by default of all that are legal.

    The host does not know the real load (that would wait for the GPU), so rows are rounded up to a power of two: a
    handful of kernels serve every batch size. UnsupportedError where no configuration runs these schemes together.
    """
    return _choose(tuple(schemes), n, k, rounded_rows(num_rows), gpu, among)


def rounded_rows(num_rows: int) -> int:
    """The next power of two: batch sizes that share it share a choice."""
    return max(1, 1 << (num_rows - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def _choose(
    schemes: tuple[QuantScheme, ...], n: int, k: int, rows: int, gpu: GpuSpec, among: tuple[KernelConfig, ...] | None
) -> KernelConfig:
    slots = tuple(dict.fromkeys(schemes))
    max_experts = table_size(len(schemes))
    configs = candidates(slots, gpu, Effort.QUICK, max_experts=max_experts) if among is None else among
    if not configs:
        why = summarise(enumerate_configs(slots, gpu, Effort.QUICK, max_experts=max_experts)).by_kind
        raise UnsupportedError(
            f"one launch of {', '.join(slot.name for slot in slots)} on {gpu.name}", [example for _, _, example in why]
        )
    each, more = divmod(rows, len(schemes))
    load = TokenLoad(tokens_per_expert=tuple(each + (e < more) for e in range(len(schemes))), source="even")
    launches = [
        Launch(
            shape=GemmShape(m=rows, n=n, k=k),
            load=load,
            schemes=schemes,
            config=config,
            facts=estimated_facts(config, slots, gpu, max_experts=max_experts),
        )
        for config in configs
    ]
    return configs[int(launch_latencies(gpu, launches)["latency_us"].to_numpy().argmin())]


def table_size(num_experts: int) -> int:
    """Experts that a kernel for so many is built with, its scheduler's table: a power of two, at least 256, so that one
    build serves most models. SpecError where no table holds them.
    """
    if num_experts > MAX_EXPERTS:
        raise SpecError(f"experts: expected at most {MAX_EXPERTS}, which a kernel's table holds, got {num_experts}")
    return max(256, 1 << (num_experts - 1).bit_length())
