"""Who makes a sweep's rows: this machine's GPUs, the analytic model, or either over a Ray cluster."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_gen.sweeping import cluster, progress
from kernel_gen.sweeping.builds import can_compile, compiled
from kernel_gen.sweeping.detect import describe, installed_gpus, matching_gpus
from kernel_gen.sweeping.measuring import Bench, GpuBench, measure
from kernel_gen.sweeping.plan import Backend, Cell, SweepRequest
from kernel_gen.sweeping.predict import predict, wanted_builds
from kernel_gen.sweeping.run import SweepResult, run
from profiles.errors import SpecError, UserError
from profiles.records import ProfileRecord, Source

if TYPE_CHECKING:
    from kernel_gen.sweeping.guided import Guidance, Outcome


def say(text: str) -> None:
    """One plain line on stderr."""
    print(f"sweep: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Whether to measure or predict, and what the user should hear about it."""

    source: Source
    remark: str | None = None


def choose(request: SweepRequest, backend: Backend, ray_address: str | None = None) -> Choice:
    """By `--backend` and the GPUs that are there.

    SpecError for `cuda` without the GPU; UserError when the GPU is there and what measuring needs is not installed.
    """
    if backend is Backend.PREDICT:
        return Choice(source=Source.PREDICTED)
    if ray_address is not None:
        is_there, found = bool(cluster.num_gpus(ray_address)), "no GPU in the Ray cluster"  # each actor looks which
    else:
        installed = installed_gpus()
        is_there, found = bool(matching_gpus(request.gpu, installed)), describe(installed)
    if is_there:
        if ray_address is None and not all(importlib.util.find_spec(name) for name in ("torch", "tvm_ffi")):
            raise UserError("measuring needs torch: pip install 'bitile[torch]', or use --backend predict")
        return Choice(source=Source.MEASURED)
    if backend is Backend.CUDA:
        raise SpecError(
            f"--backend cuda needs the GPU {request.gpu.name}, and {found} was found:"
            " use --backend predict, or run where the GPU is"
        )
    remark = f"no {request.gpu.name} here ({found} found), so latencies are predicted, not measured"
    return Choice(source=Source.PREDICTED, remark=remark)


def sweep(
    request: SweepRequest,
    cells: Sequence[Cell],
    choice: Choice,
    *,
    live: bool = False,
    bench: Bench | None = None,
    ray_address: str | None = None,
) -> SweepResult:
    """Make every row of `cells` that the profile lacks; `cells` is `plan(request)`. `live`: draw progress bars.

    `bench` replaces the machine's GPUs. UserError for what a user can mend, WorkerError when a measuring process met a
    programming error; finished rows stay, whatever happens.
    """
    if choice.source is Source.PREDICTED:
        return _predicted(request, cells, choice.remark, ray_address, live=live)
    if bench is not None:
        return _measured(request, cells, bench, live=live)
    with _bench(request, ray_address) as own:
        return _measured(request, cells, own, live=live)


def guided_sweep(
    request: SweepRequest,
    cells: Sequence[Cell],
    guidance: Guidance,
    *,
    live: bool = False,
    bench: Bench | None = None,
) -> tuple[SweepResult, Outcome]:
    """Measure what the guidance's model chooses; rows as `sweep` makes them. The cost table of what was chosen is
    written beside the profile (`table_path`).

    UserError and WorkerError as `sweep`; finished rows stay, whatever happens.
    """
    if bench is None:
        with _bench(request, None) as own:
            return guided_sweep(request, cells, guidance, live=live, bench=own)
    from kernel_gen.sweeping.guided import GuidedSweep  # imports what learns

    guided = GuidedSweep(request, cells, guidance, bench, say, live=live)
    result = run(request, cells, guided.rows, source=Source.MEASURED)
    outcome = guided.outcome
    assert outcome is not None  # the last row was made
    if outcome.table is not None:
        outcome.table.write(table_path(request))
    return replace(result, best=outcome.best), outcome


def table_path(request: SweepRequest) -> Path:
    """Where the cost table of a guided sweep is."""
    return request.out.with_suffix(".table.parquet")


def _bench(request: SweepRequest, ray_address: str | None) -> GpuBench:
    if ray_address is not None:
        return cluster.ClusterBench(ray_address, request, say)
    return GpuBench(request.gpu, matching_gpus(request.gpu, installed_gpus()), request.bundle, request.limit_s)


def _measured(request: SweepRequest, cells: Sequence[Cell], bench: Bench, *, live: bool) -> SweepResult:
    return run(request, cells, lambda had: measure(request, cells, bench, had, live=live), source=Source.MEASURED)


def _predicted(
    request: SweepRequest, cells: Sequence[Cell], remark: str | None, ray_address: str | None, *, live: bool
) -> SweepResult:
    def rows(_: Mapping[str, ProfileRecord]) -> Iterator[ProfileRecord]:
        if remark is not None:
            say(remark)  # only now: a request that is refused has one sentence
        made = (
            _predict_here(request, cells, live=live)
            if ray_address is None
            else cluster.predict_on(ray_address, request, cells)
        )
        seen: set[tuple[object, ...]] = set()
        with progress.phase("predicted", len(cells), live=live) as bar:
            for record in made:
                yield record
                place = record.model, record.linear, record.load.tokens_per_expert, record.schemes
                if place not in seen:
                    seen.add(place)
                    bar.step(f"{record.model} {record.linear}")

    return run(request, cells, rows, source=Source.PREDICTED)


def _predict_here(request: SweepRequest, cells: Sequence[Cell], *, live: bool) -> Iterator[ProfileRecord]:
    wanted = wanted_builds(request, cells)
    if wanted and not can_compile():
        say("no compiler here, so build facts are estimates; pip install 'bitile[compile]' for real ones")
        wanted = []
    built = compiled(wanted, request.gpu, lambda number: progress.phase("built", number, live=live))
    return predict(request, cells, built)
