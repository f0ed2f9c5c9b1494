"""`python -m kernel_gen.sweep`: the fastest kernel configuration per scheme and token load, measured or predicted.

`sweep` does it; `main` is the command line over it. The parts are in `kernel_gen.sweeping`; docs/sweep.md explains what
comes out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kernel_gen.space import enumerate_configs, summarise
from kernel_gen.sweeping import arguments, heatmap, progress, report
from kernel_gen.sweeping.again import cells_again
from kernel_gen.sweeping.backends import Choice, choose, guided_sweep, say, sweep, table_path
from kernel_gen.sweeping.builds import compiled_and_gated
from kernel_gen.sweeping.guided_arguments import GuidedOptions
from kernel_gen.sweeping.measuring import Bench, wanted
from kernel_gen.sweeping.plan import Cell, SweepRequest, plan
from kernel_gen.sweeping.run import SweepResult
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import INTERRUPTED, interruptible
from profiles.records import Source

if TYPE_CHECKING:
    from kernel_gen.sweeping.guided import Outcome


MAX_FAILURES_SHOWN = 5


def main(argv: Sequence[str] | None = None, *, bench: Bench | None = None) -> int:
    """Run the command line. 0: done; 2: a user's mistake, one sentence on stderr; 130: interrupted.

    `bench`: measure there, whatever GPUs this machine has (tests have one without a GPU).
    """
    try:
        options = arguments.parse(argv)
        cells = plan_of(options)
        if options.guided is not None and options.guided.only_worth:
            show_worth(options, cells, options.guided)
            return 0
        if options.build_only:
            build_kernels(options, cells)
            return 0
        choice = (
            Choice(source=Source.MEASURED) if bench else choose(options.request, options.backend, options.ray_address)
        )
        explained = explain(cells, options.request) if options.explain else {}
        result, outcome = carry_out(options, cells, choice, bench)
        picture = draw(options.request, result, choice.source)
        show(options, result, choice.source, picture, explained, outcome)
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep: interrupted; finished rows are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    return 0


def plan_of(options: arguments.Options) -> list[Cell]:
    """The cells to sweep: what the request describes, or recorded launches."""
    if not options.again:
        return plan(options.request)
    return cells_again(options.again, options.num_launches, options.request.gpu)


def show_worth(options: arguments.Options, cells: Sequence[Cell], guided: GuidedOptions) -> None:
    """What tuning would gain and take, on stdout."""
    from kernel_gen.sweeping.worth import worth  # imports what learns

    request = options.request
    found = worth(request, cells, guided.guidance(request.gpu, say))
    models = ", ".join(model.name for model in request.models)
    print(json.dumps(found.summary(), indent=1) if options.as_json else f"{models} on {request.gpu.name}, {found}")


def build_kernels(options: arguments.Options, cells: Sequence[Cell]) -> None:
    """Compiles what a sweep of these cells would measure; how many kernels there are, on stdout. UserError without a
    compiler.
    """
    request = options.request
    candidates = wanted(request, cells)
    specs = list(dict.fromkeys(candidate.spec(request.gpu) for candidate in candidates))
    gated = compiled_and_gated(
        specs, request.gpu, lambda number: progress.phase("built", number, live=not options.as_json)
    )
    counts = {
        "candidates": len(candidates),
        "kernels": len(specs),
        "were_cached": gated.num_cached,
        "refused": len(gated.refused),
    }
    if options.as_json:
        print(json.dumps(counts, indent=1))
    else:
        print(
            f"{len(specs)} kernels for {len(candidates)} candidates: {gated.num_cached} were in the cache,"
            f" {len(gated.refused)} are refused by the build gate"
        )


def carry_out(
    options: arguments.Options, cells: Sequence[Cell], choice: Choice, bench: Bench | None
) -> tuple[SweepResult, Outcome | None]:
    """Every candidate, or those that a latency model chooses; the outcome is that of its choices."""
    request, live = options.request, not options.as_json
    if choice.source is Source.PREDICTED and (options.guided or options.again):
        found = str(choice.remark).partition(",")[0]
        raise SpecError(
            f"{'--guided' if options.guided else '--again'} measures, but there is {found}: run it where the GPU is"
        )
    if options.guided is None:
        return sweep(request, cells, choice, live=live, bench=bench, ray_address=options.ray_address), None
    return guided_sweep(request, cells, options.guided.guidance(request.gpu, say), live=live, bench=bench)


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
    options: arguments.Options,
    result: SweepResult,
    source: Source,
    picture: Path | None,
    explained: Mapping[str, str],
    outcome: Outcome | None,
) -> None:
    """The closing report on stdout."""
    request, crossings = options.request, report.crossovers(result.best)
    if options.as_json:
        body: dict[str, object] = {
            "gpu": request.gpu.name,
            "source": source.value,
            "profile": str(request.out),
            "heat_map": None if picture is None else str(picture),
            "rows": {"new": result.num_new, **result.counts},
            "best": [dataclasses.asdict(cell) | {"source": cell.source.value} for cell in result.best],
            "crossovers": [dataclasses.asdict(crossing) for crossing in crossings],
            "failures": list(result.failures),
            "rejections": dict(explained),
        }
        if outcome is not None:
            body["guided"] = outcome.summary() | {"table": str(table_path(request)) if outcome.table else None}
        print(json.dumps(body, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    for label, text in explained.items():
        console.print(f"{label}: {text}", highlight=False)
    report.print_report(result.best, crossings, title=title(request, source), console=console)
    for failure in result.failures[:MAX_FAILURES_SHOWN]:
        console.print(f"failed: {failure}", highlight=False, markup=False, soft_wrap=True)
    if len(result.failures) > MAX_FAILURES_SHOWN:
        console.print(f"failed: {len(result.failures) - MAX_FAILURES_SHOWN} more, in the profile's column error")
    counts = ", ".join(f"{count} {status}" for status, count in sorted(result.counts.items()))
    console.print(
        f"{sum(result.counts.values())} rows ({counts}; {result.num_new} new) in {request.out}",
        highlight=False,
        soft_wrap=True,
    )
    if outcome is not None:
        console.print(f"guided: {outcome}", highlight=False, soft_wrap=True)
        if outcome.table is not None:
            console.print(f"cost table: {table_path(request)}", highlight=False, soft_wrap=True)
    if picture is not None:
        console.print(f"heat map: {picture}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(interruptible(main))
