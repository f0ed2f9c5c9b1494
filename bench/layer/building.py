"""What a run's kernels are, and making them before it: in parallel, on any machine, into the cache."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernel_sets import Standing, build_until_known, ranked, shared, standing
from bench.layer.allocations import BF16, Allocation, Group
from bench.layer.cells import Cell
from kernel_gen.cache import default_cache_dir
from kernel_gen.compiler import dsl_version, export_step
from kernel_gen.kernels import KernelSpec, StepSpec
from kernel_gen.layer.fused import MAX_RANKED_IDS
from kernel_gen.layer.step_specs import StepSpecs
from kernel_gen.linker import link
from kernel_gen.moe import Fusion
from kernel_gen.pool import num_workers
from kernel_gen.select import table_size
from kernel_gen.sweeping.progress import phase
from profiles.gpus import GpuSpec
from profiles.kernels import KernelConfig
from profiles.models import Linear
from profiles.schemes import QuantScheme

ID_BITS, ROUTER_WEIGHT_BITS = 64, 32
"""What torch.topk and softmax give."""
FEW_STEPS = 40
"""So many are compiled in this process: workers take longer to start, ten seconds where we measured."""
STEPS = Fusion.ROUTE | Fusion.GATHER | Fusion.SWIGLU | Fusion.COMBINE
"""Everything around the GEMMs, and the GEMMs as they are."""

NEEDED_BY = {Fusion.SWIGLU: Fusion.EPILOGUE, Fusion.OVERLAP: Fusion.PREFETCH}
"""A fusion, and the one that cannot be without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, which decides the kernels. num_configs: every launch tries at least so many. fusions: which
    steps are ours, in as many ways as are compared; the first is what tuning and the launches a scheme use. built_only:
    choose among the kernels that the cache has and the gate passes.
    """

    cells: tuple[Cell, ...]
    allocations: tuple[Allocation, ...]
    gpu: GpuSpec
    num_configs: int
    fusions: tuple[Fusion, ...]
    with_parts: bool = False
    built_only: bool = False

    def of(self, cell: Cell) -> tuple[Allocation, ...]:
        """The cell's allocations: bf16, and those worth timing there of which more is left than one scheme a mix."""
        wanted = [each for each in dict.fromkeys((BF16, *self.allocations)) if each.serves(cell.tokens)]
        return tuple(each for each in wanted if each.group is not Group.MIXED or is_mix(each, cell))

    @property
    def every_fusion(self) -> tuple[Fusion, ...]:
        """Those compared, and the first without each of its steps, where parts are timed."""
        return (*self.fusions, *(left_out(self.fusions[0]) if self.with_parts else ()))


def is_mix(allocation: Allocation, cell: Cell) -> bool:
    """Whether a linear has two schemes: of few experts perhaps not one can have more bits."""
    return any(len(set(each)) > 1 for each in cell.schemes(allocation).values())


def left_out(fusions: Fusion) -> tuple[Fusion, ...]:
    """These fusions without each of them and what needs it."""
    return tuple(fusions & ~(one | NEEDED_BY.get(one, Fusion.NONE)) for one in Fusion if one in fusions)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmId:
    """A GEMM launch of a plan. share: only the experts of this scheme."""

    cell: Cell
    allocation: str
    linear: Linear
    share: QuantScheme | None = None


def configs_of(plan: Plan, gemm: GemmId) -> tuple[KernelConfig, ...]:
    """The configurations that a launch of the plan tries, best first by the latency model."""
    return _choices(plan)[gemm]


@functools.cache
def _choices(plan: Plan) -> dict[GemmId, tuple[KernelConfig, ...]]:
    """Launches that may share kernels, those of the same schemes and options, choose together, among those that the
    gate is not known to refuse.
    """
    groups: dict[tuple[frozenset[QuantScheme], bool], dict[GemmId, tuple[KernelConfig, ...]]] = {}
    for cell in plan.cells:
        for allocation in plan.of(cell):
            for gemm, schemes, counts in launches_of(allocation, cell):
                fused = Fusion.EPILOGUE in plan.fusions[0] and gemm.linear is Linear.GATE_UP
                ranking = ranked(schemes, *cell.shape.gemm(gemm.linear), counts, plan.gpu)
                first = itertools.islice(
                    (each for each in ranking if _may_run(plan, gemm, schemes, each)), 2 * plan.num_configs
                )
                groups.setdefault((frozenset(schemes), fused), {})[gemm] = tuple(first)
    found: dict[GemmId, tuple[KernelConfig, ...]] = {}
    for rankings in groups.values():
        if plan.built_only:
            found |= rankings
            continue
        chosen = set(shared(list(rankings.values()), plan.num_configs))
        found |= {gemm: tuple(each for each in ranking if each in chosen) for gemm, ranking in rankings.items()}
    return found


def launches_of(
    allocation: Allocation, cell: Cell
) -> Iterator[tuple[GemmId, tuple[QuantScheme, ...], tuple[int, ...]]]:
    """Every GEMM launch of an allocation's contenders, with its experts' schemes and tokens."""
    counts = cell.counts()
    for linear, schemes in cell.schemes(allocation).items():
        yield GemmId(cell=cell, allocation=allocation.name, linear=linear), schemes, counts
        if allocation.group is Group.MIXED:
            for slot in dict.fromkeys(schemes):
                mine = tuple(count for scheme, count in zip(schemes, counts, strict=True) if scheme == slot)
                share = GemmId(cell=cell, allocation=allocation.name, linear=linear, share=slot)
                yield share, (slot,) * len(mine), mine


def specs_needed(plan: Plan) -> list[KernelSpec]:
    """Every GEMM kernel that the plan may run."""
    found: dict[KernelSpec, None] = {}
    for cell in plan.cells:
        for allocation in plan.of(cell):
            for gemm, schemes, _ in launches_of(allocation, cell):
                for config in configs_of(plan, gemm):
                    found |= dict.fromkeys(_specs(plan, gemm, schemes, config))
    return list(found)


def _specs(plan: Plan, gemm: GemmId, schemes: Sequence[QuantScheme], config: KernelConfig) -> Iterator[KernelSpec]:
    """A launch's kernels in one configuration."""
    slots = tuple(sorted(set(schemes), key=lambda scheme: scheme.name))
    size = table_size(gemm.cell.shape.num_experts)
    for swiglu, overlap, prefetch in _options(plan, gemm):
        yield KernelSpec(
            config=config,
            schemes=slots,
            arch=plan.gpu.arch,
            max_experts=size,
            swiglu=swiglu,
            overlap=overlap,
            prefetch=prefetch,
        )


def _may_run(plan: Plan, gemm: GemmId, schemes: Sequence[QuantScheme], config: KernelConfig) -> bool:
    known = {standing(spec, plan.gpu) for spec in _specs(plan, gemm, schemes, config)}
    return known == {Standing.MAY_RUN} if plan.built_only else Standing.REFUSED not in known


def _options(plan: Plan, gemm: GemmId) -> set[tuple[bool, bool, bool]]:
    """(swiglu, overlap, prefetch) of a launch's kernels. A launch on a stream of its own does not overlap otherwise."""
    first, is_first = plan.fusions[0], gemm.linear is Linear.GATE_UP
    fusions = plan.every_fusion if gemm.share is None else (first, first & ~(Fusion.OVERLAP | Fusion.PREFETCH))
    return {
        (Fusion.EPILOGUE in each and is_first, Fusion.OVERLAP in each, Fusion.PREFETCH in each and not is_first)
        for each in fusions
    }


def build_gemms(plan: Plan) -> list[KernelSpec]:
    """Compiles the plan's GEMMs until every launch has as many that the gate passes as it can have; what those are."""

    def wanted() -> list[KernelSpec]:
        _choices.cache_clear()
        return specs_needed(plan)

    specs, _ = build_until_known(wanted, plan.gpu)  # the run says which it lacks
    return specs


def steps_needed(plan: Plan) -> list[StepSpec]:
    """Every other kernel of the plan's layers."""
    found: dict[StepSpec, None] = {}
    for cell in plan.cells:
        shape, ranks = cell.shape, cell.tokens * cell.shape.top_k <= MAX_RANKED_IDS
        for allocation in plan.of(cell):
            schemes = cell.schemes(allocation)
            for fusions in {*plan.every_fusion, plan.fusions[0] & ~Fusion.OVERLAP}:
                specs = StepSpecs.of(
                    arch=plan.gpu.arch,
                    overlap=Fusion.OVERLAP in fusions,
                    hidden=shape.hidden_size,
                    intermediate=shape.intermediate_size,
                    gate_up=schemes[Linear.GATE_UP],
                    down=schemes[Linear.DOWN],
                )
                found |= dict.fromkeys(_steps(specs, fusions, shape.top_k, ranks=ranks))
                if allocation == BF16:  # layers around others' GEMMs
                    found |= dict.fromkeys(_steps(specs, STEPS, shape.top_k, ranks=ranks))
    return list(found)


def _steps(specs: StepSpecs, fusions: Fusion, top_k: int, *, ranks: bool) -> Iterator[StepSpec]:
    gathers, routes = Fusion.GATHER in fusions, Fusion.ROUTE in fusions
    if routes and not (gathers and ranks):
        yield from (specs.count(id_bits=ID_BITS), specs.place(id_bits=ID_BITS))
    if gathers:
        for_swiglu = Fusion.SWIGLU in fusions
        yield specs.gather(top_k=top_k, id_bits=ID_BITS, ranks=routes and ranks, for_swiglu=for_swiglu)
    if Fusion.SWIGLU in fusions:
        step = specs.quantize() if Fusion.EPILOGUE in fusions else specs.swiglu()
        yield from () if step is None else (step,)
    if Fusion.COMBINE in fusions:
        yield specs.combine(top_k=top_k, weight_bits=ROUTER_WEIGHT_BITS)


def build_steps(specs: Sequence[StepSpec]) -> dict[StepSpec, Path]:
    """Object files of a layer's steps, in the cache; what it lacks is compiled, in parallel."""
    folder = default_cache_dir() / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {spec: folder / f"{spec.fingerprint()}-{dsl_version()}.o" for spec in specs}
    missing = [spec for spec in specs if not objects[spec].exists()]
    if len(missing) <= FEW_STEPS:
        for spec in missing:
            _export(spec, objects[spec])
    else:
        with (
            phase("compiling steps", len(missing), live=True) as progress,
            ProcessPoolExecutor(num_workers(len(missing)), multiprocessing.get_context("spawn")) as pool,
        ):
            for done in as_completed([pool.submit(_export, spec, objects[spec]) for spec in missing]):
                progress.step(done.result())
    return objects


def _export(spec: StepSpec, path: Path) -> str:
    """In a worker."""
    partial = path.with_suffix(".partial")
    export_step(spec, partial)
    partial.replace(path)
    return spec.name


def load_steps(objects: dict[StepSpec, Path], folder: Path) -> dict[StepSpec, Callable[..., None]]:
    """The steps' functions, from a library linked in `folder`."""
    import tvm_ffi

    folder.mkdir(parents=True, exist_ok=True)
    link(sorted(objects.values()), folder / "steps.so")
    library: Any = tvm_ffi.load_module(str(folder / "steps.so"))
    return {spec: library[spec.name] for spec in objects}
