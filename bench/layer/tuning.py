"""Which configuration each launch of a cell runs: the latency model ranks, the few best are timed on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bench.kernel_sets import TRIES
from kernel_gen.bundle import Bundle
from kernel_gen.experts import Experts
from kernel_gen.kernels import StepSpec
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Activations, Kernel
from kernel_gen.select import table_size
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

TimeSingle = Callable[[Callable[[], None], int], float]
"""kernel_gen.timing.GpuClock.time_single."""


class TunedLibrary(KernelLibrary):
    """GEMMs from a bundle, of which `tune` chose one for each linear and number of rows, and steps from `add_steps`."""

    def __init__(self, gpu: GpuSpec, bundle: Bundle | None = None) -> None:
        super().__init__(gpu, bundle)
        self._chosen: dict[tuple[tuple[QuantScheme, ...], int, int, int], Kernel] = {}

    def add_steps(self, steps: Mapping[StepSpec, Callable[..., None]]) -> None:
        """A layer's other kernels, made before."""
        self._steps.update(steps)

    def best(
        self,
        experts: Experts,
        num_rows: int,
        *,
        swiglu: bool = False,
        overlap: bool = False,
        prefetch: bool = False,
    ) -> Kernel:
        """What `tune` chose, with these options. SpecError where it did not choose."""
        try:
            chosen = self._chosen[_key(experts, num_rows)].spec
        except KeyError:
            raise SpecError(f"no kernel was chosen for {experts.schemes} and {num_rows} rows") from None
        return self.kernel(
            chosen.config, chosen.schemes, chosen.max_experts, swiglu=swiglu, overlap=overlap, prefetch=prefetch
        )

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
        prefetch: bool,
    ) -> str:
        """Choose among these by time; the name of the fastest. UnsupportedError when the bundle has none of them."""
        if (key := _key(experts, num_rows)) in self._chosen:
            return self._chosen[key].spec.config.name
        found: list[tuple[float, Kernel]] = []
        refused: list[str] = []
        for config in configs:
            try:
                kernel = self.kernel(
                    config,
                    experts.schemes,
                    table_size(experts.num_experts),
                    swiglu=experts.is_interleaved,
                    overlap=overlap,
                    prefetch=prefetch,
                )
            except UnsupportedError as error:
                refused.append(str(error))
                continue
            launch = _launch(kernel, x, experts, offsets, out)
            launch()  # loads the kernel and copies the experts' tables, which a capture cannot
            found.append((time_single(launch, TRIES), kernel))
        if not found:
            names = "+".join(scheme.name for scheme in experts.schemes)
            raise UnsupportedError(f"one launch of {names}", refused or ["no configuration is legal"])
        self._chosen[key] = min(found, key=lambda pair: pair[0])[1]
        return self._chosen[key].spec.config.name


def _launch(kernel: Kernel, x: Activations, experts: Experts, offsets: Tensor, out: Tensor) -> Callable[[], None]:
    def run() -> None:
        kernel(x, experts, offsets, out=out)

    return run


def _key(experts: Experts, num_rows: int) -> tuple[tuple[QuantScheme, ...], int, int, int]:
    return experts.scheme_of_expert, experts.n, experts.k, num_rows
