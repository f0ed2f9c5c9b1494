"""What a sweep runs, one by one (Workload, Candidate), and how each went (Measurement)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from costmodel.facts import BuildFacts
from costmodel.launches import Launch
from kernel_gen.kernels.spec import KernelSpec
from kernel_gen.select import table_size
from profiles.gpus import GpuSpec
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.records import ProfileRecord, Source, Status, candidate_key
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One linear of a model with its experts' schemes: everything whose preparation candidates share.

    `schemes` is one scheme for all experts, or one per expert; `label` is what reports call it.
    """

    model: str
    linear: str
    num_experts: int
    n: int
    k: int
    schemes: tuple[QuantScheme, ...]
    label: str

    @property
    def slots(self) -> tuple[QuantScheme, ...]:
        """The distinct schemes, in order of first appearance: the kernel's slots."""
        return tuple(dict.fromkeys(self.schemes))

    @property
    def max_experts(self) -> int:
        """The expert slots that the kernel is built with."""
        return table_size(self.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration on one workload under one load."""

    workload: Workload
    load: TokenLoad
    config: KernelConfig

    def spec(self, gpu: GpuSpec) -> KernelSpec:
        """The kernel that it runs: one for a set of schemes, in whatever order experts have them."""
        work = self.workload
        slots = tuple(sorted(work.slots, key=lambda scheme: scheme.name))
        return KernelSpec(config=self.config, schemes=slots, arch=gpu.arch, max_experts=work.max_experts)

    def launch(self, facts: BuildFacts) -> Launch:
        """The launch as the analytic model takes it."""
        work = self.workload
        return Launch(
            shape=GemmShape(m=self.load.total, n=work.n, k=work.k),
            load=self.load,
            schemes=work.schemes,
            config=self.config,
            facts=facts,
        )

    def key(self, *, gpu: str, source: Source, kernel_fingerprint: str) -> str:
        """What its row is found by; see `profiles.records.candidate_key`."""
        work = self.workload
        names = tuple(scheme.name for scheme in work.schemes)
        return candidate_key(
            gpu=gpu,
            model=work.model,
            linear=work.linear,
            n=work.n,
            k=work.k,
            tokens_per_expert=self.load.tokens_per_expert,
            schemes=names[:1] if len(set(names)) == 1 else names,
            config=self.config.name,
            source=source.value,
            kernel_fingerprint=kernel_fingerprint,
        )

    def record(
        self, *, gpu: str, source: Source, outcome: Measurement, kernel_fingerprint: str, versions: Mapping[str, str]
    ) -> ProfileRecord:
        """The row of this candidate; `kernel_fingerprint` is empty when nothing was built."""
        work = self.workload
        return ProfileRecord(
            gpu=gpu,
            model=work.model,
            linear=work.linear,
            n=work.n,
            k=work.k,
            load=self.load,
            schemes=work.schemes,
            config=self.config,
            status=outcome.status,
            source=source,
            error=outcome.error,
            latency_us=outcome.latency_us,
            p20_us=outcome.p20_us,
            p80_us=outcome.p80_us,
            num_samples=outcome.num_samples,
            sm_clock_mhz=outcome.sm_clock_mhz,
            kernel_fingerprint=kernel_fingerprint,
            versions={**versions, **outcome.versions},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How one candidate went. Latencies are microseconds, present when `status` is OK.

    `context_lost`: the process that measured it can measure nothing more. `versions` is provenance to keep with the
    row: libraries, and the reference kernel's slowdown while this was timed.
    """

    status: Status
    error: str = ""
    latency_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    num_samples: int = 0
    sm_clock_mhz: float | None = None
    context_lost: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def failed(
        cls, status: Status, error: str, *, context_lost: bool = False, versions: Mapping[str, str] | None = None
    ) -> Measurement:
        """A candidate without a latency, and in which words."""
        return cls(status=status, error=error, context_lost=context_lost, versions=versions or {})


def runs(schemes: Sequence[QuantScheme], max_experts: int, workload: Workload) -> bool:
    """Whether a kernel with these slots is built for the workload: the same schemes, whatever their order, and room for
    its experts.
    """
    return set(schemes) == set(workload.slots) and max_experts >= workload.num_experts
