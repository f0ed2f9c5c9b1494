"""`python -m allocator.trace`: which experts a model's tokens go to, as a trace for sweeps and allocations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator import command
from profiles.errors import SpecError
from profiles.interrupt import interruptible
from profiles.loads import write_trace

if TYPE_CHECKING:
    from allocator.calibration.routing import Routing


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a trace was written, 2 on a user's mistake, said on stderr."""
    return command.run(_parser(), argv, _run)


def _run(arguments: argparse.Namespace) -> command.Outcome:
    # Imported here, where what they need is known to be installed.
    from allocator.calibration import picture, skew
    from allocator.calibration.routing import trace

    out: Path = arguments.out
    command.check_outputs(arguments, "--out", "--plot")
    if out.suffix not in (".json", ".parquet"):
        raise SpecError(f"--out {out}: a trace ends in .json or .parquet")
    plot: Path = arguments.plot or out.with_suffix(".png")
    picture.kind_of(plot)
    model = command.open_model(arguments)
    sequences = command.open_data(arguments, model, arguments.data)
    progress = command.progress_of(arguments)
    routing = trace(model, sequences, batch_size=arguments.batch_size, progress=progress)
    loads = routing.loads()
    write_trace(loads, out)
    routing.write_details(details_of(out))
    picture.write(skew.figure(loads), plot)
    return command.Outcome(
        summary=summary(routing, sequences.notes), text=report(routing, sequences.notes, arguments, plot)
    )


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


def report(routing: Routing, notes: Sequence[str], arguments: argparse.Namespace, plot: Path) -> str:
    """What the command prints."""
    lines = [f"{routing.num_tokens} tokens ({routing.source}) through {len(routing.layers)} MoE layers", ""]
    for layer, load in routing.loads().items():
        idle = routing.unused().get(layer, ())
        named = f", {len(idle)} idle: {_listed(idle)}" if idle else ""
        busiest = load.max * load.num_experts / load.total
        lines.append(f"layer {layer:3}  spread {load.spread:.2f}  busiest {busiest:.1f}x an even share{named}")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.trace",
        description="Run a model over data and write how many tokens each expert of each layer gets.",
    )
    command.add_data_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace, .json or .parquet")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the skew (default: beside --out, .png)")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
