"""`python -m bench.layer`: reports measured layers; `--measure`: measures them on this GPU first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.layer import plot, report
from bench.layer.allocations import ALLOCATIONS, allocation
from bench.layer.cells import Cell
from bench.layer.measuring import measure, read_measured, specs_needed
from kernel_gen.timing import monotonic_s
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.models import model

OUT = Path("docs/layer")
MODELS = ("qwen1.5-moe-a2.7b", "deepseek-v2-lite", "qwen3-30b-a3b", "mixtral-8x7b")
TOKENS = (1, 4, 16, 64, 2048, 8192)


def measure_all(arguments: argparse.Namespace) -> None:
    """Measures every cell of the options that layer.parquet lacks. UserError: no GPU, or options that cannot be."""
    from bench.layer.device import open_device, this_gpu

    names = arguments.models.split(",")
    chosen = [allocation(name) for name in arguments.allocations.split(",")]
    cells = [Cell(model=model(name).name, tokens=tokens) for tokens in _numbers(arguments.tokens) for name in names]
    gpu = this_gpu()
    specs = specs_needed(cells, chosen, gpu, arguments.configs)
    print(f"{len(specs)} kernels", file=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = open_device(specs, arguments.out / "bundle")
    started = monotonic_s()
    found = measure(
        cells,
        chosen,
        device,
        arguments.out / "layer.parquet",
        rounds=arguments.rounds,
        num_configs=arguments.configs,
        compiled=arguments.compiled,
    )
    for cell, rows in found:
        seconds = monotonic_s() - started
        failed = [f"  {row['allocation']}, {row['variant']}: {row['error']}" for row in rows if row["status"] != "ok"]
        done = f"{seconds:.0f} s: {cell.model}, {cell.tokens} tokens: {len(rows)} rows, {len(failed)} failed"
        print(done, *failed, sep="\n", file=sys.stderr, flush=True)
        if seconds > arguments.seconds:
            print("out of time; the same command goes on", file=sys.stderr)
            return


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


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise SpecError(f"--tokens {text}: expected whole numbers of at least 1, as in 16,512")
    return [int(word) for word in words]


def _at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where the results are (default: {OUT})")
    parser.add_argument("--measure", action="store_true", help="measure on this GPU what the results lack")
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="A,B", help="(default: %(default)s)")
    names = ",".join(item.name for item in ALLOCATIONS)
    parser.add_argument("--allocations", default=names, metavar="A,B", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=_at_least_one, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--configs", type=_at_least_one, default=8, metavar="N", help="timed for each launch (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=_at_least_one, default=3600, metavar="N", help="begin no cell later (default: %(default)s)"
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
    sys.exit(main())
