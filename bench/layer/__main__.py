"""`python -m bench.layer`: reports measured layers; `--measure`: measures them on this GPU first; `--build`: compiles
the kernels for that, on any machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import at_least_one, whole_numbers
from bench.layer import plot, report
from bench.layer.allocations import ALLOCATIONS, allocation
from bench.layer.building import Plan, build_gemms, build_steps, steps_needed
from bench.layer.cells import Cell
from bench.layer.contenders import FUSIONS
from bench.layer.measuring import Measured, measure, read_measured
from kernel_gen.moe import Fusion
from kernel_gen.timing import monotonic_s
from profiles import gpus
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.gpus import GpuSpec
from profiles.interrupt import interruptible
from profiles.models import model

OUT = Path("docs/layer")
MODELS = ("qwen1.5-moe-a2.7b", "mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b")
TOKENS = (16, 8192, 64, 2048, 1, 512)
"""What matters most comes first: a run may be cut by its time limit."""
BUILT_FOR = "h200"


def build_all(arguments: argparse.Namespace) -> None:
    """Compiles what the cache lacks of the kernels that `--measure` with the same options runs."""
    plan = _plan(arguments, gpus.gpu(arguments.gpu))
    steps = steps_needed(plan)
    build_steps(steps)
    print(f"{len(build_gemms(plan))} GEMM kernels and {len(steps)} others, of {len(plan.cells)} cells", file=sys.stderr)


def measure_all(arguments: argparse.Namespace) -> None:
    """Measures every cell of the options that layer.parquet lacks. UserError: no GPU, or options that cannot be."""
    from bench.gpu import this_gpu
    from bench.layer.device import open_device

    plan = _plan(arguments, this_gpu())
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = monotonic_s()
    with tempfile.TemporaryDirectory(prefix="bitile-layer-") as folder:
        device = open_device(plan, Path(folder))
        print(f"{monotonic_s() - started:.0f} s: kernels are ready", file=sys.stderr, flush=True)
        path = arguments.out / "layer.parquet"
        for found in measure(plan, device, path, rounds=arguments.rounds, compiled=arguments.compiled):
            seconds = monotonic_s() - started
            _say(found, seconds)
            if seconds > arguments.seconds:
                print("out of time; the same command goes on", file=sys.stderr)
                return


def _say(found: Measured, seconds: float) -> None:
    failed, cell = [row for row in found.rows if row["status"] != "ok"], found.cell
    print(
        f"{seconds:.0f} s: {cell.model}, {cell.tokens} tokens: {len(found.rows)} rows, {len(failed)} failed;"
        f" {found.preparing_s:.1f} s preparing, {found.timing_s:.1f} s timing",
        *(f"  {row['allocation']}, {row['variant']} {row['part']} {row['fusions']}: {row['error']}" for row in failed),
        sep="\n",
        file=sys.stderr,
        flush=True,
    )


def write_report(out: Path, *, command: str) -> str:
    """Markdown and picture of layer.parquet in the folder. DataError: none is there, or it cannot be written."""
    if not (out / "layer.parquet").exists():
        raise DataError(f"{out / 'layer.parquet'} is not there: measure with --measure --out {out}")
    rows = read_measured(out / "layer.parquet")
    text = report.markdown(rows, command=command)
    plot.draw(report.whole_layers(rows), out / "layer.png")
    with replacing(out / "layer.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _plan(arguments: argparse.Namespace, gpu: GpuSpec) -> Plan:
    names = arguments.models.split(",")
    return Plan(
        cells=tuple(
            Cell(model=model(name).name, tokens=tokens)
            for tokens in whole_numbers("--tokens", arguments.tokens)
            for name in names
        ),
        allocations=tuple(allocation(name.strip()) for name in arguments.allocations.split(";")),
        gpu=gpu,
        num_configs=arguments.configs,
        fusions=_fusions(arguments.fusions),
        with_parts=arguments.parts,
        built_only=arguments.built_only,
    )


def _fusions(text: str) -> tuple[Fusion, ...]:
    unknown = [name for name in text.split(",") if name not in FUSIONS]
    if unknown:
        raise SpecError(f"--fusions: unknown {', '.join(unknown)}; known are {', '.join(FUSIONS)}")
    return tuple(dict.fromkeys(FUSIONS[name] for name in text.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where the results are (default: {OUT})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="measure on this GPU what the results lack")
    what.add_argument(
        "--build", action="store_true", help="compile the kernels that --measure with the same options needs, and end"
    )
    parser.add_argument("--gpu", default=BUILT_FOR, help="what --build is for (default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="A,B", help="(default: %(default)s)")
    names = ";".join(item.name for item in ALLOCATIONS)
    parser.add_argument("--allocations", default=names, metavar="A;B", help="(default: %(default)s)")
    parser.add_argument(
        "--fusions",
        default=",".join(FUSIONS),
        metavar="A,B",
        help="ways to run a layer; the first also runs a launch a scheme (default: %(default)s)",
    )
    parser.add_argument("--parts", action="store_true", help="two layers also part by part, and without each fusion")
    parser.add_argument("--built-only", action="store_true", help="run the kernels that the cache has, compile none")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--configs", type=at_least_one, default=3, metavar="N", help="timed for each launch (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=at_least_one, default=3600, metavar="N", help="begin no cell later (default: %(default)s)"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="torch's layer also compiled, which takes longer than all the rest"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    words = argv if argv is not None else sys.argv[1:]
    try:
        if arguments.build:
            build_all(arguments)
            return 0
        if arguments.measure:
            measure_all(arguments)
        text = write_report(arguments.out, command=" ".join(["python -m bench.layer", *words]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or arguments.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    print(text.split("## bf16 layers")[0], end="")
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
