"""`python -m allocator.report`: an allocation as one HTML page, its pictures as PNG, its numbers as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from allocator.allocate import Options
from allocator.allocation import Allocation
from allocator.command import check_outputs
from allocator.report_data import FRONT_POINTS, ReportData, collect
from allocator.report_page import page
from allocator.report_plots import plots
from allocator.report_text import headline
from allocator.sensitivity import Sensitivity
from allocator.verify import Verification
from costmodel.table import CostTable
from profiles import schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.interrupt import interruptible
from profiles.models import MoeShape, find_model


def write_report(data: ReportData, shape: MoeShape, out: Path) -> tuple[Path, ...]:
    """The page at `out` and its pictures beside it, each whole or not at all; gives all paths. DataError: a path cannot
    be written.
    """
    pictures = plots(data, shape)
    written = [_put(out.with_name(f"{out.stem}.{name}.png"), png) for name, png in pictures.items()]
    return (_put(out, page(data, pictures).encode()), *written)


def _put(path: Path, content: bytes) -> Path:
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a report was written, 2 on a user's mistake (its sentence on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        data, written = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(data.to_json()))
    else:
        print(f"{headline(data)}\nwrote {', '.join(map(str, written))}")
    return 0


def _run(arguments: argparse.Namespace) -> tuple[ReportData, tuple[Path, ...]]:
    out: Path = arguments.out
    if out.suffix != ".html":
        raise SpecError(f"--out {out}: a report is HTML, with its pictures beside it; name it FILE.html")
    check_outputs(arguments, "--out")
    if arguments.points < 2:
        raise SpecError(f"--points {arguments.points}: a front has at least 2")
    allocation = Allocation.read(arguments.allocation)
    shape = find_model(arguments.model or allocation.model)
    options = None
    if arguments.schemes is not None:
        offered = tuple(schemes.parse(name) for name in arguments.schemes.split(","))
        options = Options(granularity=allocation.granularity, schemes=offered)
    data = collect(
        allocation,
        shape,
        sensitivity=None if arguments.sensitivity is None else Sensitivity.read(arguments.sensitivity),
        cost_table=None if arguments.cost is None else CostTable.read(arguments.cost),
        options=options,
        verification=None if arguments.verification is None else Verification.read(arguments.verification),
        num_points=arguments.points,
    )
    return data, write_report(data, shape, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.report", description="Show an allocation: one HTML page, with its pictures as PNG."
    )
    parser.add_argument("--allocation", required=True, type=Path, metavar="FILE", help="of allocator.solve, JSON")
    parser.add_argument("--sensitivity", type=Path, metavar="FILE", help="its losses: for the front and more bits")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="its cost table: shows where the time goes")
    parser.add_argument("--verification", type=Path, metavar="FILE", help="what was measured of it")
    parser.add_argument(
        "--model", metavar="NAME", help="a known model or a config.json (default: the allocation's model)"
    )
    parser.add_argument("--schemes", metavar="A,B", help="schemes of the front (default: all that have losses)")
    parser.add_argument("--points", type=int, default=FRONT_POINTS, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="the page; PNGs go beside it")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
