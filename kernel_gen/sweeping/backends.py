"""Who makes a sweep's rows: this machine's GPUs, the analytic model, or either over a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from kernel_gen.sweeping import cluster, progress
from kernel_gen.sweeping.builds import can_compile, compiled
from kernel_gen.sweeping.detect import describe, installed_gpus, matching_gpus
from kernel_gen.sweeping.measuring import Bench, GpuBench, measure
from kernel_gen.sweeping.plan import Backend, Cell, SweepRequest
from kernel_gen.sweeping.predict import KEPT_PER_CELL, predict, wanted_builds
from kernel_gen.sweeping.run import SweepResult, run
from profiles.errors import SpecError
from profiles.records import ProfileRecord, Source


def say(text: str) -> None:
    """One plain line on stderr."""
    print(f"sweep: {text}", file=sys.stderr, flush=True)


def choose_source(request: SweepRequest, backend: Backend, ray_address: str | None = None) -> Source:
    """Whether to measure or predict. With `auto` and no such GPU, says so on stderr; with `cuda`, SpecError."""
    if backend is Backend.PREDICT:
        return Source.PREDICTED
    if ray_address is not None:
        is_there, found = (
            bool(cluster.num_gpus(ray_address)),
            "no GPU in the Ray cluster",
        )  # which GPU, each actor looks
    else:
        installed = installed_gpus()
        is_there, found = bool(matching_gpus(request.gpu, installed)), describe(installed)
    if is_there:
        return Source.MEASURED
    if backend is Backend.CUDA:
        raise SpecError(
            f"--backend cuda wants a {request.gpu.name}, but found was {found}:"
            " use --backend predict, or run where the GPU is"
        )
    say(f"no {request.gpu.name} here ({found} found), so latencies are predicted, not measured")
    return Source.PREDICTED


def sweep(
    request: SweepRequest,
    cells: Sequence[Cell],
    source: Source,
    *,
    live: bool = False,
    bench: Bench | None = None,
    ray_address: str | None = None,
) -> SweepResult:
    """Make every row of `cells` that the profile lacks; `cells` is `plan(request)`. `live`: draw progress bars.

    `bench` replaces the machine's GPUs. UserError for what a user can mend, WorkerError when a measuring process met a
    programming error; finished rows stay, whatever happens.
    """
    if source is Source.PREDICTED:
        return _predicted(request, cells, ray_address, live=live)
    if bench is not None:
        return _measured(request, cells, bench, live=live)
    with _bench(request, ray_address) as own:
        return _measured(request, cells, own, live=live)


def _bench(request: SweepRequest, ray_address: str | None) -> GpuBench:
    if ray_address is not None:
        return cluster.ClusterBench(ray_address, request, say)
    return GpuBench(request.gpu, matching_gpus(request.gpu, installed_gpus()), request.bundle, request.limit_s)


def _measured(request: SweepRequest, cells: Sequence[Cell], bench: Bench, *, live: bool) -> SweepResult:
    return run(request, cells, lambda had: measure(request, cells, bench, had, live=live), source=Source.MEASURED)


def _predicted(request: SweepRequest, cells: Sequence[Cell], ray_address: str | None, *, live: bool) -> SweepResult:
    def rows(_: Mapping[str, ProfileRecord]) -> Iterator[ProfileRecord]:
        made = (
            _predict_here(request, cells, live=live)
            if ray_address is None
            else cluster.predict_on(ray_address, request, cells)
        )
        total = sum(min(KEPT_PER_CELL, len(cell.configs)) for cell in cells)
        with progress.phase("predicted", total, live=live) as bar:
            for record in made:
                yield record
                bar.step(f"{record.model} {record.linear} {record.config.name}")

    return run(request, cells, rows, source=Source.PREDICTED)


def _predict_here(request: SweepRequest, cells: Sequence[Cell], *, live: bool) -> Iterator[ProfileRecord]:
    wanted = wanted_builds(request, cells)
    if wanted and not can_compile():
        say("no compiler here, so build facts are estimates; pip install 'bitile[compile]' for real ones")
        wanted = []
    with progress.phase("built", len(wanted), live=live) as bar:
        built = compiled(wanted, request.gpu, bar.step)
    return predict(request, cells, built)
