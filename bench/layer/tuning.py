"""Which configuration each launch of a cell runs: the latency model ranks, the few best are timed on the spot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from costmodel.analytic import launch_latencies
from costmodel.launches import Launch
from kernel_gen.bundle import Bundle
from kernel_gen.experts import Experts
from kernel_gen.kernels import StepSpec
from kernel_gen.legality import estimated_facts
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Activations, Kernel
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

TRIES = 7
"""Samples of each candidate, launched alone with L2 flushed: all hold the same cost of a replay."""
TimeSingle = Callable[[Callable[[], None], int], float]
"""kernel_gen.timing.GpuClock.time_single."""


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


class TunedLibrary(KernelLibrary):
    """GEMMs from a bundle, of which `tune` chose one for each linear and number of rows; steps that were built before.

    Args:
        gpu: what torch's device is.
        bundle: GEMM kernels.
        steps: a layer's other kernels.
    """

    def __init__(self, gpu: GpuSpec, bundle: Bundle, steps: Mapping[StepSpec, Callable[..., None]]) -> None:
        super().__init__(gpu, bundle)
        self._steps.update(steps)
        self._chosen: dict[tuple[tuple[QuantScheme, ...], int, int, int], Kernel] = {}

    def best(self, experts: Experts, num_rows: int, *, swiglu: bool = False, overlap: bool = False) -> Kernel:
        """What `tune` chose, with these options. SpecError where it did not choose."""
        try:
            chosen = self._chosen[_key(experts, num_rows)].spec
        except KeyError:
            raise SpecError(f"no kernel was chosen for {experts.schemes} and {num_rows} rows") from None
        return self.kernel(chosen.config, chosen.schemes, chosen.max_experts, swiglu=swiglu, overlap=overlap)

    def tune(
        self,
        experts: Experts,
        num_rows: int,
        configs: Sequence[KernelConfig],
        x: Activations,
        offsets: Tensor,
        out: Tensor,
        time_single: TimeSingle,
        *,
        overlap: bool,
    ) -> str:
        """Choose among these by time; the name of the fastest. UnsupportedError when the bundle has none of them."""
        if (key := _key(experts, num_rows)) in self._chosen:
            return self._chosen[key].spec.config.name
        found: list[tuple[float, Kernel]] = []
        refused: list[str] = []
        for config in configs:
            try:
                size = table_size(experts.num_experts)
                kernel = self.kernel(config, experts.schemes, size, swiglu=experts.is_interleaved, overlap=overlap)
            except UnsupportedError as error:
                refused.append(str(error))
                continue
            launch = _launch(kernel, x, experts, offsets, out)
            launch()  # loads the kernel and copies the experts' tables, which a capture cannot
            found.append((time_single(launch, TRIES), kernel))
        if not found:
            raise UnsupportedError(f"{experts.schemes}", refused or ["no configuration is legal"])
        self._chosen[key] = min(found, key=lambda pair: pair[0])[1]
        return self._chosen[key].spec.config.name


def _launch(kernel: Kernel, x: Activations, experts: Experts, offsets: Tensor, out: Tensor) -> Callable[[], None]:
    def run() -> None:
        kernel(x, experts, offsets, out=out)

    return run


def _key(experts: Experts, num_rows: int) -> tuple[tuple[QuantScheme, ...], int, int, int]:
    return experts.scheme_of_expert, experts.n, experts.k, num_rows
