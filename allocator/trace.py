"""`python -m allocator.trace`: which experts a model's tokens go to, as a trace for sweeps and allocations."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.extras import require_models
from profiles.errors import SpecError, UserError
from profiles.loads import write_trace

if TYPE_CHECKING:
    from allocator.calibration.routing import Routing


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a trace was written, 2 on a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        require_models("allocator.trace")
        routing, notes = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary(routing, notes)) if arguments.json else report(routing, notes, arguments))
    return 0


def _run(arguments: argparse.Namespace) -> tuple[Routing, tuple[str, ...]]:
    # Imported here, where what they need is known to be installed.
    from allocator.calibration import skew
    from allocator.calibration.data import read_sequences
    from allocator.calibration.model import StreamedModel
    from allocator.calibration.routing import trace

    out: Path = arguments.out
    check_output("--out", out)
    if out.suffix not in (".json", ".parquet"):
        raise SpecError(f"--out {out}: a trace ends in .json or .parquet")
    plot: Path = arguments.plot or out.with_suffix(".png")
    skew.kind_of(plot)
    check_batch_size(arguments.batch_size)
    model = StreamedModel(arguments.model, device=arguments.device)
    sequences = read_sequences(
        arguments.data,
        model.checkpoint.folder,
        vocab_size=model.vocab_size,
        length=arguments.sequence_length,
        number=arguments.num_sequences,
        seed=arguments.seed,
        max_length=model.max_length,
    )
    progress = None if arguments.quiet else lambda line: print(line, file=sys.stderr, flush=True)
    routing = trace(model, sequences, batch_size=arguments.batch_size, progress=progress)
    loads = routing.loads()
    write_trace(loads, out)
    routing.write_details(details_of(out))
    skew.write(loads, plot)
    return routing, sequences.notes


def details_of(out: Path) -> Path:
    """Where co-activation and router weights are written."""
    return out.with_name(f"{out.stem}.routing.parquet")


def summary(routing: Routing, notes: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints."""
    loads = routing.loads()
    return {
        "source": routing.source,
        "num_tokens": routing.num_tokens,
        "notes": list(notes),
        "layers": {
            str(layer): {
                "spread": load.spread,
                "busiest_over_even": load.max * load.num_experts / load.total,
                "idle": list(routing.unused().get(layer, ())),
            }
            for layer, load in loads.items()
        },
    }


def report(routing: Routing, notes: Sequence[str], arguments: argparse.Namespace) -> str:
    """What the command prints."""
    lines = [f"{routing.num_tokens} tokens ({routing.source}) through {len(routing.layers)} MoE layers", ""]
    for layer, load in routing.loads().items():
        idle = routing.unused().get(layer, ())
        named = f", {len(idle)} idle: {_listed(idle)}" if idle else ""
        busiest = load.max * load.num_experts / load.total
        lines.append(f"layer {layer:3}  spread {load.spread:.2f}  busiest {busiest:.1f}x an even share{named}")
    plot = arguments.plot or arguments.out.with_suffix(".png")
    return "\n".join(
        [
            *lines,
            *("note: " + note for note in notes),
            "",
            f"wrote {arguments.out}, {details_of(arguments.out)} and {plot}",
        ]
    )


def _listed(experts: Sequence[int], most: int = 8) -> str:
    return ", ".join(str(expert) for expert in experts[:most]) + (", ..." if len(experts) > most else "")


def check_output(option: str, path: Path) -> None:
    """SpecError unless a file can be put there."""
    if not path.absolute().parent.is_dir():
        raise SpecError(f"{option} {path}: its folder does not exist")
    if path.is_dir():
        raise SpecError(f"{option} {path}: it is a folder; name a file")


def check_batch_size(size: int) -> None:
    """SpecError unless it is one."""
    if size < 1:
        raise SpecError(f"--batch-size {size}: at least 1 is needed")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of everything that runs a model over data."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a Hugging Face checkpoint folder")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="a text file, or an .npy of token ids (needs no tokenizer)",
    )
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS", help="(default: %(default)s)")
    parser.add_argument(
        "--num-sequences", type=int, default=128, metavar="N", help="most sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="sequences at once (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sequences (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.trace",
        description="Run a model over data and write how many tokens each expert of each layer gets.",
    )
    add_data_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace, .json or .parquet")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the skew (default: beside --out, .png)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
