"""What a run's kernels are, and making them before it: in parallel, on any machine, into the cache."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernel_sets import ranked
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
STEPS = Fusion.ROUTE | Fusion.GATHER | Fusion.SWIGLU | Fusion.COMBINE
"""Everything around the GEMMs, and the GEMMs as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, which decides the kernels. fusions: which steps are ours, in as many ways as are compared; the
    first is what tuning and the launches a scheme use.
    """

    cells: tuple[Cell, ...]
    allocations: tuple[Allocation, ...]
    gpu: GpuSpec
    num_configs: int
    fusions: tuple[Fusion, ...]
    with_parts: bool = False

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
    """These fusions without each of them. What an epilogue leaves has to be quantised by SWIGLU."""
    return tuple(
        fusions & ~(one | Fusion.EPILOGUE if one is Fusion.SWIGLU else one) for one in Fusion if one in fusions
    )


def configs_of(
    schemes: Sequence[QuantScheme], cell: Cell, linear: Linear, counts: Sequence[int], gpu: GpuSpec, number: int
) -> tuple[KernelConfig, ...]:
    """The configurations worth timing for a launch of these experts with these tokens."""
    n, k = cell.shape.gemm(linear)
    return ranked(tuple(schemes), n, k, tuple(counts), gpu, number)


def launches_of(
    allocation: Allocation, cell: Cell
) -> Iterator[tuple[Linear, tuple[QuantScheme, ...], tuple[int, ...], bool]]:
    """Every GEMM launch of an allocation's contenders: the linear, the experts' schemes and tokens, and whether it is
    one scheme's share.
    """
    counts = cell.counts()
    for linear, schemes in cell.schemes(allocation).items():
        yield linear, schemes, counts, False
        if allocation.group is Group.MIXED:
            for slot in dict.fromkeys(schemes):
                mine = [count for scheme, count in zip(schemes, counts, strict=True) if scheme == slot]
                yield linear, (slot,) * len(mine), tuple(mine), True


def specs_needed(plan: Plan) -> list[KernelSpec]:
    """Every GEMM kernel that the plan may run."""
    found: dict[KernelSpec, None] = {}
    for cell in plan.cells:
        for allocation in plan.of(cell):
            for linear, schemes, counts, is_share in launches_of(allocation, cell):
                size = table_size(cell.shape.num_experts)
                for config in configs_of(schemes, cell, linear, counts, plan.gpu, plan.num_configs):
                    for swiglu, overlap in _options(plan, linear, is_share=is_share):
                        spec = KernelSpec(
                            config=config,
                            schemes=tuple(sorted(set(schemes), key=lambda scheme: scheme.name)),
                            arch=plan.gpu.arch,
                            max_experts=size,
                            swiglu=swiglu,
                            overlap=overlap,
                        )
                        found[spec] = None
    return list(found)


def _options(plan: Plan, linear: Linear, *, is_share: bool) -> set[tuple[bool, bool]]:
    """(swiglu, overlap) of a launch's kernels. A launch on a stream of its own does not overlap otherwise."""
    first, is_first_linear = plan.fusions[0], linear is Linear.GATE_UP
    fusions = (first, first & ~Fusion.OVERLAP) if is_share else plan.every_fusion
    return {(Fusion.EPILOGUE in each and is_first_linear, Fusion.OVERLAP in each) for each in fusions}


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
    if missing:
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
