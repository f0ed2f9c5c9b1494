"""`python -m allocator.calibrate`: what every scheme costs every linear of a model, as a sensitivity file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator import command
from allocator.json_file import write_json
from profiles import schemes
from profiles.interrupt import interruptible

if TYPE_CHECKING:
    from allocator.calibration.sensitivities import Calibration

DEFAULT_MEASURE = "fisher"
DEFAULT_SCHEMES = (
    "w16a16,w8a16_g-1_sym,w4a16_g128_asym,w3a16_g128_asym,w2a16_g128_asym,w8a8_g-1_sym,w4a8_g128_sym,w4a4_g128_sym"
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a sensitivity was written, 2 on a user's mistake, said on stderr."""
    return command.run(_parser(), argv, _run)


def _run(arguments: argparse.Namespace) -> command.Outcome:
    # Imported here, where what they need is known to be installed.
    from allocator.calibration.layer_losses import LossOptions
    from allocator.calibration.measures import measure_of
    from allocator.calibration.partial import Partial, fingerprint
    from allocator.calibration.quantizer import Method, Quantizer
    from allocator.calibration.sensitivities import calibrate, describe

    out: Path = arguments.out
    command.check_outputs(arguments, "--out")
    measure = measure_of(arguments.measure)
    names = list(dict.fromkeys(arguments.schemes.split(",")))
    options = LossOptions(
        schemes=tuple(schemes.parse(name) for name in names),
        quantizer=Quantizer(
            method=Method(arguments.method),
            clip=not arguments.no_clip,
            rotate=arguments.rotate,
            damping=arguments.damping,
            activation_order=not arguments.no_activation_order,
        ),
        max_rows=arguments.max_rows,
    )
    model = command.open_model(arguments, layers_kept=10_000 if measure.needs_ahead else 1)
    sequences = command.open_data(arguments, model, arguments.data)
    partial = Partial(out, fingerprint(model, sequences.tokens, [measure.name], options, arguments.seed))
    calibration = calibrate(
        model,
        sequences,
        [measure],
        options,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        partial=partial,
        progress=command.progress_of(arguments),
    )
    notes = [*sequences.notes, *describe(calibration.notes)]
    calibration.sensitivities[measure.name].write(out)
    write_json(report_of(out), {"notes": notes, "layers": calibration.report()}, indent=1)
    partial.remove()
    return command.Outcome(summary=summary(calibration, notes), text=report(calibration, notes, out))


def report_of(out: Path) -> Path:
    """Where the notes are written: experts with too few tokens, fallbacks."""
    return out.with_name(f"{out.stem}.report.json")


def summary(calibration: Calibration, notes: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints: each scheme's loss if all linears had it, and the notes."""
    (sensitivity,) = calibration.sensitivities.values()
    totals = sensitivity.frame().groupby("scheme")["loss"].sum()
    return {
        **sensitivity.provenance,
        "seconds": calibration.seconds,
        "resumed_layers": list(calibration.resumed),
        "total_loss": {str(name): float(loss) for name, loss in totals.sort_values().items()},
        "notes": list(notes),
    }


def report(calibration: Calibration, notes: Sequence[str], out: Path) -> str:
    """What the command prints."""
    (sensitivity,) = calibration.sensitivities.values()
    frame = sensitivity.frame()
    totals = frame.groupby("scheme")["loss"].sum().sort_values()
    linears = len(frame) // frame["scheme"].nunique()
    lines = [f"{sensitivity.model}: {linears} linears, {sensitivity.metric}, {frame['data'].iloc[0]}", ""]
    lines += [f"{name:24} {loss:.6g}" for name, loss in totals.items()]
    return "\n".join([*lines, "", *(f"note: {note}" for note in notes), f"wrote {out} and {report_of(out)}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.calibrate",
        description="Measure what every precision scheme costs every linear layer of every expert.",
    )
    command.add_data_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the sensitivity to write, Parquet")
    parser.add_argument("--schemes", default=DEFAULT_SCHEMES, metavar="A,B", help="(default: %(default)s)")
    parser.add_argument(
        "--measure",
        default=DEFAULT_MEASURE,
        metavar="NAME",
        help="block-l2 (MxMoE's), block-relative, fisher, statistic or kl (default: %(default)s)",
    )
    parser.add_argument("--method", choices=("rtn", "gptq"), default="gptq", help="rounding (default: %(default)s)")
    parser.add_argument("--no-clip", action="store_true", help="no search for narrower ranges")
    parser.add_argument(
        "--rotate", action="store_true", help="rotate inputs whose activations are quantised (Hadamard)"
    )
    parser.add_argument("--damping", type=float, default=0.01, metavar="SHARE", help="GPTQ's (default: %(default)s)")
    parser.add_argument("--no-activation-order", action="store_true", help="GPTQ takes columns as they are")
    parser.add_argument(
        "--max-rows",
        type=int,
        default=2048,
        metavar="N",
        help="most tokens of an expert that a loss is measured at (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
