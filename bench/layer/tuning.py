"""Which configuration each launch of a cell runs: the latency model ranks, the few best are timed on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from costmodel.analytic import launch_latencies
from costmodel.launches import Launch
from kernel_gen.bundle import Bundle
from kernel_gen.experts import Experts
from kernel_gen.kernels import KernelSpec, StepSpec
from kernel_gen.legality import estimated_facts
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Activations, Kernel
from kernel_gen.select import table_size
from kernel_gen.space import Effort, candidates
from kernel_gen.timing import SampleRule, Timing
from profiles.errors import SpecError, UnsupportedError
from profiles.gpus import GpuSpec
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.models import Linear
from profiles.schemes import QuantScheme

QUICK_RULE = SampleRule(min_samples=5, max_samples=5, batch=5)
TimeLaunches = Callable[[Sequence[Callable[[], None]], SampleRule], Timing]


def ranked(
    per_expert: Sequence[QuantScheme], n: int, k: int, counts: Sequence[int], gpu: GpuSpec, num_configs: int
) -> list[KernelConfig]:
    """The configurations that the latency model puts first for these experts and their tokens, best first."""
    slots = tuple(dict.fromkeys(per_expert))
    max_experts = table_size(len(per_expert))
    configs = candidates(slots, gpu, Effort.QUICK, max_experts=max_experts)
    load = TokenLoad(tokens_per_expert=tuple(counts), source="drawn")
    launches = [
        Launch(
            shape=GemmShape(m=load.total, n=n, k=k),
            load=load,
            schemes=tuple(per_expert),
            config=config,
            facts=estimated_facts(config, slots, gpu, max_experts=max_experts),
        )
        for config in configs
    ]
    if not launches:
        return []
    order = launch_latencies(gpu, launches)["latency_us"].to_numpy().argsort(kind="stable")
    return [configs[index] for index in order[:num_configs]]


def spec_of(
    config: KernelConfig, schemes: Iterable[QuantScheme], gpu: GpuSpec, num_experts: int, linear: Linear
) -> KernelSpec:
    """What `TunedLibrary` asks its bundle for: the kernel that layers launch."""
    return KernelSpec(
        config=config,
        schemes=tuple(sorted(set(schemes), key=lambda scheme: scheme.name)),
        arch=gpu.arch,
        max_experts=table_size(num_experts),
        swiglu=linear is Linear.GATE_UP,
        overlap=True,
    )


class TunedLibrary(KernelLibrary):
    """GEMMs from a bundle, of which `tune` chose one for each linear and number of rows. Steps, and other variants of
    what was chosen, are compiled in process.
    """

    def __init__(self, gpu: GpuSpec, bundle: Bundle) -> None:
        super().__init__(gpu, bundle)
        self._compiling = KernelLibrary(gpu)
        self._chosen: dict[tuple[tuple[QuantScheme, ...], int, int, int], Kernel] = {}

    def step(self, spec: StepSpec) -> Callable[..., None]:
        """Compiled in process."""
        return self._compiling.step(spec)

    def best(self, experts: Experts, num_rows: int, *, swiglu: bool = False, overlap: bool = False) -> Kernel:
        """What `tune` chose. SpecError where it did not."""
        try:
            chosen = self._chosen[_key(experts, num_rows)]
        except KeyError:
            raise SpecError(f"no kernel was chosen for {experts.schemes} and {num_rows} rows") from None
        if (chosen.spec.swiglu, chosen.spec.overlap) == (swiglu, overlap):
            return chosen
        found = self._compiling.kernel(
            chosen.spec.config, chosen.spec.schemes, chosen.spec.max_experts, swiglu=swiglu, overlap=overlap
        )
        return Kernel(found.spec, found.function, chosen.ctas_per_sm)

    def tune(
        self,
        sets: Sequence[Experts],
        num_rows: int,
        configs: Sequence[KernelConfig],
        x: Activations,
        offsets: Tensor,
        out: Tensor,
        time_launches: TimeLaunches,
    ) -> str:
        """Choose among these by time; the name of the fastest. UnsupportedError when the bundle has none of them."""
        first, swiglu = sets[0], sets[0].is_interleaved
        if (key := _key(first, num_rows)) in self._chosen:
            return self._chosen[key].spec.config.name
        found: list[tuple[float, Kernel]] = []
        refused: list[str] = []
        for config in configs:
            try:
                size = table_size(first.num_experts)
                kernel = self.kernel(config, first.schemes, size, swiglu=swiglu, overlap=True)
            except UnsupportedError as error:
                refused.append(str(error))
                continue
            for experts in sets:
                experts.bind(kernel.spec.schemes)
            launches = [_launch(kernel, x, experts, offsets, out) for experts in sets]
            launches[0]()
            found.append((time_launches(launches, QUICK_RULE).median_us, kernel))
        if not found:
            raise UnsupportedError(f"{first.schemes}", refused or ["no configuration is legal"])
        self._chosen[key] = min(found, key=lambda pair: pair[0])[1]
        return self._chosen[key].spec.config.name


def _launch(kernel: Kernel, x: Activations, experts: Experts, offsets: Tensor, out: Tensor) -> Callable[[], None]:
    def run() -> None:
        kernel(x, experts, offsets, out=out)

    return run


def _key(experts: Experts, num_rows: int) -> tuple[tuple[QuantScheme, ...], int, int, int]:
    return experts.scheme_of_expert, experts.n, experts.k, num_rows
