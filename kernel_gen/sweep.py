"""`python -m kernel_gen.sweep`: the fastest kernel configuration per scheme and token load, measured or predicted.

`sweep` does it; `main` is the command line over it. The parts are in `kernel_gen.sweeping`; docs/sweep.md explains what
comes out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from kernel_gen.space import enumerate_configs, summarise
from kernel_gen.sweeping import arguments, heatmap, progress, report
from kernel_gen.sweeping.builds import can_compile, compiled
from kernel_gen.sweeping.detect import describe, installed_gpus, matching_gpus
from kernel_gen.sweeping.measuring import Bench, GpuBench, measure
from kernel_gen.sweeping.plan import Backend, Cell, SweepRequest, plan
from kernel_gen.sweeping.predict import KEPT_PER_CELL, predict, wanted_builds
from kernel_gen.sweeping.run import SweepResult, run
from profiles.errors import DataError, SpecError, UserError
from profiles.records import ProfileRecord, Source

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(argv: Sequence[str] | None = None, *, bench: Bench | None = None) -> int:
    """Run the command line. 0: done; 2: a user's mistake, one sentence on stderr; 130: interrupted.

    `bench`: measure there, whatever GPUs this machine has (tests have one without a GPU).
    """
    try:
        options = arguments.parse(argv)
        source = Source.MEASURED if bench else choose_source(options.request, options.backend)
        cells = plan(options.request)
        explained = explain(cells, options.request) if options.explain else {}
        result = sweep(options.request, cells, source, live=not options.as_json, bench=bench)
        picture = draw(options.request, result, source)
        show(options, result, source, picture, explained)
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: interrupted; finished rows are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def choose_source(request: SweepRequest, backend: Backend) -> Source:
    """Whether to measure or predict. With `auto` and no such GPU, says so on stderr; with `cuda`, SpecError."""
    if backend is Backend.PREDICT:
        return Source.PREDICTED
    installed = installed_gpus()
    if matching_gpus(request.gpu, installed):
        return Source.MEASURED
    if backend is Backend.CUDA:
        raise SpecError(
            f"--backend cuda wants a {request.gpu.name}, this machine has {describe(installed)}:"
            " use --backend predict, or run where the GPU is"
        )
    print(
        f"sweep: no {request.gpu.name} here ({describe(installed)} found), so latencies are predicted, not measured",
        file=sys.stderr,
    )
    return Source.PREDICTED


def sweep(
    request: SweepRequest, cells: Sequence[Cell], source: Source, *, live: bool, bench: Bench | None = None
) -> SweepResult:
    """Make every row of `cells` that the profile lacks. UserError for what a user can mend; finished rows stay,
    whatever happens.

    WorkerError when a measuring process met a programming error.
    """
    if source is Source.PREDICTED:
        return _predicted(request, cells, live=live)
    if bench is not None:
        return _measured(request, cells, bench, live=live)
    with GpuBench(request.gpu, matching_gpus(request.gpu, installed_gpus()), request.bundle, request.limit_s) as own:
        return _measured(request, cells, own, live=live)


def _measured(request: SweepRequest, cells: Sequence[Cell], bench: Bench, *, live: bool) -> SweepResult:
    return run(request, cells, lambda had: measure(request, cells, bench, had, live=live), source=Source.MEASURED)


def _predicted(request: SweepRequest, cells: Sequence[Cell], *, live: bool) -> SweepResult:
    compile_now = request.bundle is None and can_compile()
    if request.bundle is None and not compile_now:
        print(
            "sweep: no compiler here, so build facts are estimates; pip install 'bitile[compile]' for real ones",
            file=sys.stderr,
        )

    def rows(_: Mapping[str, ProfileRecord]) -> Iterator[ProfileRecord]:
        wanted = wanted_builds(request, cells) if compile_now else []
        with progress.phase("built", len(wanted), live=live) as bar:
            built = compiled(wanted, request.gpu, bar.step)
        with progress.phase(
            "predicted", sum(min(KEPT_PER_CELL, len(cell.configs)) for cell in cells), live=live
        ) as bar:
            for record in predict(request, cells, built):
                yield record
                bar.step(f"{record.model} {record.linear} {record.config.name}")

    return run(request, cells, rows, source=Source.PREDICTED)


def explain(cells: Sequence[Cell], request: SweepRequest) -> dict[str, str]:
    """Per combination of schemes, how many configurations are legal and why the others are not."""
    found = {}
    for work in {cell.workload.label: cell.workload for cell in cells}.values():
        found[work.label] = str(
            summarise(enumerate_configs(work.slots, request.gpu, request.effort, max_experts=work.max_experts))
        )
    return found


def draw(request: SweepRequest, result: SweepResult, source: Source) -> Path | None:
    """The heat map beside the profile; None when nothing succeeded. DataError when it cannot be written."""
    if not result.best:
        return None
    path = request.out.with_suffix(".png")
    try:
        heatmap.draw(result.best, title=title(request, source), path=path)
    except OSError as error:
        raise DataError(
            f"{path}: the heat map cannot be written ({error.strerror or error}); the profile is complete"
        ) from error
    return path


def title(request: SweepRequest, source: Source) -> str:
    """What every table and picture says: predicted or measured, on which GPU, when."""
    return f"{source.value} on {request.gpu.name}, {datetime.now(UTC):%Y-%m-%d}"


def show(
    options: arguments.Options, result: SweepResult, source: Source, picture: Path | None, explained: Mapping[str, str]
) -> None:
    """The closing report on stdout."""
    request, crossings = options.request, report.crossovers(result.best)
    if options.as_json:
        body = {
            "gpu": request.gpu.name,
            "source": source.value,
            "profile": str(request.out),
            "heat_map": None if picture is None else str(picture),
            "rows": {"new": result.num_new, **result.counts},
            "best": [dataclasses.asdict(cell) | {"source": cell.source.value} for cell in result.best],
            "crossovers": [dataclasses.asdict(crossing) for crossing in crossings],
            "rejections": dict(explained),
        }
        print(json.dumps(body, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    for label, text in explained.items():
        console.print(f"{label}: {text}", highlight=False)
    report.print_report(result.best, crossings, title=title(request, source), console=console)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(result.counts.items()))
    console.print(
        f"{sum(result.counts.values())} rows ({counts}; {result.num_new} new) in {request.out}",
        highlight=False,
        soft_wrap=True,
    )
    if picture is not None:
        console.print(f"heat map: {picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
