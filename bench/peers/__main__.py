"""`python -m bench.peers`: recorded launches against the peers; `--measure`: everything in one run on this GPU."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.peers import plot, report
from bench.peers.mixed import compare_mixed
from bench.peers.published import read_peers
from bench.peers.recorded import compare, read_launches
from bench.peers.routing import Draw
from profiles import schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError, UserError
from profiles.models import Linear, model
from profiles.schemes import QuantScheme

RECORDED = tuple(Path("profiles/data/h200") / f"{name}.parquet" for name in ("hopper_v2", "mixed_v2"))
OUT = Path("docs/peers")
TOKENS = (1, 16, 128, 512, 2048, 8192)


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


def measure_all(arguments: argparse.Namespace, *, command: str) -> str:
    """Measures every cell of the options on this GPU; writes measured.parquet as it goes, then measured.md.

    UserError: no GPU that can be used, options that cannot be, a folder that cannot be written.
    """
    shapes = [model(name) for name in arguments.models]
    from bench.peers.device import check_gpu, open_device
    from bench.peers.measured_report import measured_markdown
    from bench.peers.measuring import Cell, measure, read_measured, specs_of

    gpu = check_gpu()
    cells = [
        Cell(model=shape.name, linear=linear, tokens=tokens, draw=draw, scheme=scheme)
        for shape in shapes
        for linear in Linear
        for scheme in arguments.schemes  # before tokens: cells of one workload follow each other and share its weights
        for tokens in arguments.tokens
        for draw in arguments.draws
    ]
    recorded = read_launches(arguments.profiles or RECORDED)
    path = arguments.out / "measured.parquet"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            device = open_device(gpu, specs_of(cells, gpu, recorded), Path(folder))
            for cell, rows in measure(cells, device, recorded, path):
                print(f"{' '.join(map(str, cell.key))}: {len(rows)} contenders", file=sys.stderr)
        text = measured_markdown(read_measured(path), read_peers(), command=command)
        write_text(text, arguments.out / "measured.md")
    except OSError as error:
        raise _unwritable(arguments.out, error) from error
    return text


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


def _tokens(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise SpecError(f"--tokens {text}: expected whole numbers of at least 1, as in 16,512")
    return [int(word) for word in words]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument(
        "profiles",
        nargs="*",
        type=Path,
        metavar="FILE.parquet",
        help="recorded launches (default: profiles/data/h200/{hopper_v2,mixed_v2}.parquet)",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where the results go (default: {OUT})")
    parser.add_argument(
        "--measure", action="store_true", help="measure ours, torch's and Triton's kernels on this GPU instead"
    )
    models = sorted({key[0] for key in read_peers()})
    parser.add_argument("--models", default=",".join(models), metavar="A,B", help="to measure (default: %(default)s)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), metavar="A,B", help="(default: %(default)s)")
    parser.add_argument(
        "--schemes",
        default=",".join(report.REPRESENTATIVES.values()),
        metavar="A,B",
        help="(default: one of each class of peers)",
    )
    draws = ",".join(draw.value for draw in Draw)
    parser.add_argument("--draws", default=draws, metavar="A,B", help="loads: %(default)s (the default: both)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    words = argv if argv is not None else sys.argv[1:]
    command = " ".join(["python -m bench.peers", *words])
    try:
        if arguments.measure:
            arguments.models = arguments.models.split(",")
            arguments.tokens, arguments.draws = _tokens(arguments.tokens), _draws(arguments.draws)
            arguments.schemes = _schemes(arguments.schemes)
            print(measure_all(arguments, command=command), end="")
            return 0
        text = report_recorded(arguments.profiles or RECORDED, arguments.out, command=command)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text.split("## Cells")[0], end="")
    print(f"written: {arguments.out}/recorded.md, recorded.parquet, mixed.parquet, recorded.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
