"""`python -m bench.peers`: recorded launches against the peers; `--measure`: everything in one run on this GPU;
`--build`: compiles the kernels for that, on any machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bench.arguments import at_least_one, whole_numbers
from bench.peers import plot, report
from bench.peers.mixed import compare_mixed
from bench.peers.published import read_peers
from bench.peers.recorded import compare, read_launches
from bench.peers.roofline import H200
from bench.peers.routing import Draw
from kernel_gen.timing import monotonic_s
from profiles import gpus, schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.gpus import GpuSpec
from profiles.interrupt import interruptible
from profiles.kernels import KernelConfig
from profiles.models import Linear, model
from profiles.schemes import QuantScheme

if TYPE_CHECKING:
    from bench.peers.cells import Cell

EARLIER = ("hopper_v2", "mixed_v2", "few_tokens", "decode_v3", "mixed_v3", "mixtral_v3")
TABLES = (*(f"earlier/{name}" for name in EARLIER), "drawn_v4", "mixed_v4")
"""Of profiles/data/h200: those that have several configurations of every cell, three generations of kernels."""
RECORDED = tuple(Path("profiles/data/h200") / f"{name}.parquet" for name in TABLES)
OUT = Path("docs/peers")
MODELS = ("qwen1.5-moe-a2.7b", "mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b")
TOKENS = (16, 512, 8192, 1, 64, 2048)
SCHEMES = tuple(scheme.name for scheme in schemes.KERNEL_SCHEMES if scheme.math in H200.peak_tops)
"""All that have kernels and a roofline on the card."""


def report_recorded(profiles: Sequence[Path], out: Path, *, command: str) -> str:
    """Writes recorded.md, recorded.parquet, mixed.parquet and recorded.png to a folder; gives the Markdown.

    DataError: a profile or the peers' table is refused, or the folder cannot be written.
    """
    launches, peers = read_launches(profiles), read_peers()
    compared, mixed = compare(launches, peers), compare_mixed(launches)
    text = report.markdown(compared, mixed, peers, command=command)
    try:
        out.mkdir(parents=True, exist_ok=True)
        plot.draw(compared, peers, out / "recorded.png")
        write_rows(compared, out / "recorded.parquet")
        write_rows(mixed, out / "mixed.parquet")
        write_text(text, out / "recorded.md")
    except OSError as error:
        raise _unwritable(out, error) from error
    return text


def measure_all(arguments: argparse.Namespace) -> None:
    """Measures every cell of the options that the file in `--out` lacks, on this GPU, and writes rows as it goes.

    UserError: no GPU that can be used, options that cannot be, a folder that cannot be written.
    """
    from bench.gpu import this_gpu
    from bench.peers.cells import specs_of
    from bench.peers.device import open_device
    from bench.peers.measuring import measure

    listed, gpu = _cells(arguments), this_gpu(only=H200.gpu)
    cells = _configs(listed, arguments, gpu)
    path, started = _measured_path(arguments), monotonic_s()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            device = open_device(gpu, specs_of(cells, gpu), Path(folder))
            print(f"{monotonic_s() - started:.0f} s: kernels are ready", file=sys.stderr, flush=True)
            for cell, rows in measure(cells, device, path, rounds=arguments.rounds):
                seconds = monotonic_s() - started
                words = " ".join(map(str, cell.key))
                lost = "; the GPU's context was lost, the same command goes on" if rows[-1]["context_lost"] else ""
                print(f"{seconds:.1f} s: {words}: {len(rows)} contenders{lost}", file=sys.stderr, flush=True)
                if seconds > arguments.seconds:
                    print("out of time; the same command goes on", file=sys.stderr)
                    break
    except OSError as error:
        raise _unwritable(arguments.out, error) from error


def report_measured(arguments: argparse.Namespace, *, command: str) -> str:
    """Markdown and picture of what was measured so far. DataError: nothing was, or the folder cannot be written."""
    from bench.peers.measured_report import measured_markdown, of_roofline
    from bench.peers.measuring import read_measured
    from bench.peers.mixed_report import mixed_markdown

    measured, peers = read_measured(_measured_path(arguments)), read_peers()
    try:
        if arguments.mixed:
            text = mixed_markdown(measured, command=command)
            write_text(text, arguments.out / "measured_mixed.md")
            return text
        text = measured_markdown(measured, peers, command=command)
        write_text(text, arguments.out / "measured.md")
        plot.draw(of_roofline(measured), peers, arguments.out / "measured.png", band="one launch a replay")
    except OSError as error:
        raise _unwritable(arguments.out, error) from error
    return text


def _measured_path(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / ("measured_mixed.parquet" if arguments.mixed else "measured.parquet")


def build_all(arguments: argparse.Namespace) -> None:
    """Compiles what the cache lacks of the kernels that `--measure` with the same options runs, until every cell has as
    many that the gate passes as it can have. UserError: options that cannot be.
    """
    from bench.kernel_sets import build_until_known
    from bench.peers.cells import specs_of

    gpu = gpus.gpu(H200.gpu)
    listed = _cells(arguments)
    specs, are_all = build_until_known(lambda: specs_of(_configs(listed, arguments, gpu), gpu), gpu)
    if not are_all:
        print("some could not be compiled", file=sys.stderr)
    print(f"{len(specs)} kernels, of {len(listed)} cells", file=sys.stderr)


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """What to measure, in turn."""
    from bench.peers.cells import Cell, in_order
    from bench.peers.mixes import mixes_and_parts

    shapes, tokens = [model(name) for name in arguments.models.split(",")], whole_numbers("--tokens", arguments.tokens)
    if arguments.mixed:
        return mixes_and_parts([shape.name for shape in shapes], tokens)[: arguments.cells]
    every = [
        Cell(model=shape.name, linear=linear, tokens=number, draw=draw, what=scheme)
        for shape in shapes
        for linear in Linear
        for scheme in _schemes(arguments.schemes)  # before tokens: neighbouring cells share a workload's weights
        for number in tokens
        for draw in _draws(arguments.draws)
    ]
    return in_order(every)[: arguments.cells]


def _configs(cells: Sequence[Cell], arguments: argparse.Namespace, gpu: GpuSpec) -> dict[Cell, list[KernelConfig]]:
    """The configurations of ours to try in each."""
    from bench.peers.cells import our_configs

    recorded = read_launches(arguments.profiles or RECORDED)
    number, built_only = arguments.configs, arguments.built_only
    return {cell: our_configs(cell, gpu, recorded, number, built_only=built_only) for cell in cells}


def write_rows(frame: pd.DataFrame, path: Path) -> None:
    """A table as Parquet, whole or not at all."""
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False)


def write_text(text: str, path: Path) -> None:
    """A text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(f"{out}: cannot be written ({error.strerror or error}); choose another --out")


def _schemes(text: str) -> list[QuantScheme]:
    return [schemes.parse(name) for name in text.split(",")]


def _draws(text: str) -> list[Draw]:
    known = {draw.value: draw for draw in Draw}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise SpecError(f"--draws: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "profiles",
        nargs="*",
        type=Path,
        metavar="FILE.parquet",
        help=f"recorded launches (default: of profiles/data/h200 {', '.join(TABLES)})",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where the results go (default: {OUT})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--measure", action="store_true", help="measure ours, torch's and Triton's kernels on this GPU instead"
    )
    what.add_argument(
        "--build", action="store_true", help="compile the kernels that --measure with the same options needs, and end"
    )
    what.add_argument("--report", action="store_true", help="the report of what --measure has measured so far")
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="to measure (default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument(
        "--schemes",
        default=",".join(SCHEMES),
        metavar="A,B",
        help="(default: all; the bytes of the peers' first)",
    )
    draws = ",".join(draw.value for draw in Draw)
    parser.add_argument("--draws", default=draws, metavar="A,B", help="loads: %(default)s (the default: both)")
    parser.add_argument(
        "--configs", type=at_least_one, default=8, metavar="N", help="ours tried (default: %(default)s)"
    )
    parser.add_argument("--cells", type=at_least_one, metavar="N", help="only the first N cells (default: all)")
    parser.add_argument(
        "--mixed", action="store_true", help="mixed launches, each beside its schemes alone under the same load"
    )
    parser.add_argument("--built-only", action="store_true", help="run the kernels that the cache has, compile none")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=at_least_one, default=3600, metavar="N", help="begin no cell later (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    words = argv if argv is not None else sys.argv[1:]
    command = " ".join(["python -m bench.peers", *words])
    try:
        if arguments.build:
            build_all(arguments)
            return 0
        if arguments.measure:
            measure_all(arguments)
        if arguments.measure or arguments.report:
            text = report_measured(arguments, command=command)
            print(text.split("## Below")[0].split("## Launches")[0], end="")
            return 0
        text = report_recorded(arguments.profiles or RECORDED, arguments.out, command=command)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text.split("## Cells")[0], end="")
    print(f"written: {arguments.out}/recorded.md, recorded.parquet, mixed.parquet, recorded.png")
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
