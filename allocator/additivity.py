"""`python -m allocator.additivity`: whether a sensitivity's sum orders whole allocations as measured loss does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allocator import command
from allocator.json_file import write_json
from allocator.sensitivity import Sensitivity
from profiles import schemes
from profiles.errors import SpecError
from profiles.interrupt import interruptible

if TYPE_CHECKING:
    from allocator.calibration.additivity import Additivity


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when a report was written, 2 on a user's mistake, said on stderr."""
    return command.run(_parser(), argv, _run)


def _run(arguments: argparse.Namespace) -> command.Outcome:
    # Imported here, where what they need is known to be installed.
    from allocator.calibration import picture, scatter
    from allocator.calibration.additivity import Blocks
    from allocator.calibration.check import CheckOptions, check_additivity, corrected
    from allocator.calibration.quantizer import Method, Quantizer

    command.check_outputs(arguments, "--out", "--corrected", "--plot")
    plot: Path = arguments.plot or arguments.out.with_suffix(".png")
    picture.kind_of(plot)
    low, high = _range(arguments.bits)
    options = CheckOptions(
        low=low,
        high=high,
        number=arguments.allocations,
        equal=tuple(arguments.equal_bits),
        number_equal=arguments.equal_allocations,
        seed=arguments.seed,
    )
    sensitivity = _of_schemes(Sensitivity.read(arguments.sensitivity), arguments.schemes)
    model = command.open_model(arguments)
    held_out, calibration = (command.open_data(arguments, model, file) for file in (arguments.held_out, arguments.data))
    quantizer = Quantizer(method=Method(arguments.method), clip=not arguments.no_clip, rotate=arguments.rotate)
    found = check_additivity(
        model,
        held_out,
        calibration,
        sensitivity,
        quantizer,
        options,
        batch_size=arguments.batch_size,
        progress=command.progress_of(arguments),
    )
    write_json(arguments.out, found.report())
    picture.write(scatter.figure(found, f"{sensitivity.model}, {sensitivity.metric}"), plot)
    if arguments.corrected is not None:
        corrected(sensitivity, found, Blocks.of(sensitivity, model.shape)).write(arguments.corrected)
    return command.Outcome(summary=found.report(), text=report(found, arguments.out, plot))


def _of_schemes(sensitivity: Sensitivity, names: str | None) -> Sensitivity:
    """Some schemes of a sensitivity; None: all. SpecError: it has none such."""
    if names is None:
        return sensitivity
    wanted = [schemes.parse(name) for name in names.split(",")]
    absent = [scheme.name for scheme in wanted if scheme not in sensitivity.schemes]
    if absent:
        raise SpecError(f"--schemes: the sensitivity has no {', '.join(absent)}")
    frame = sensitivity.frame()
    return Sensitivity(frame[frame["scheme"].isin([scheme.name for scheme in wanted])])


def _range(text: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        return (float(low), float(high)) if dash else _no_range(text)
    except ValueError:
        return _no_range(text)


def _no_range(text: str) -> tuple[float, float]:
    raise SpecError(f"--bits {text}: it is LOW-HIGH, such as 2.5-4.5")


def report(found: Additivity, out: Path, plot: Path) -> str:
    """What the command prints: rank correlations of each prediction, by group."""
    names = list(found.groups)
    lines = [f"{'Spearman with measured KL':28}" + "".join(f"{name:>18}" for name in names)]
    for correction in found.predicted:
        values = found.correlations(correction)
        mark = "  <- chosen" if correction is found.chosen else ""
        lines.append(f"{correction.value:28}" + "".join(f"{values[name]:18.4f}" for name in names) + mark)
    lines += [
        "",
        f"perplexity {found.exact_perplexity:.4f}, of these allocations {found.perplexity.min():.4f} to"
        f" {found.perplexity.max():.4f}; KL {found.measured_kl.min():.4g} to {found.measured_kl.max():.4g} nats",
        f"wrote {out} and {plot}",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.additivity",
        description="Measure random allocations and compare with what a sensitivity predicts for them.",
    )
    command.add_data_options(parser)
    parser.add_argument("--held-out", required=True, type=Path, metavar="FILE", help="data to measure on")
    parser.add_argument("--sensitivity", required=True, type=Path, metavar="FILE", help="losses, Parquet")
    parser.add_argument("--bits", required=True, metavar="LOW-HIGH", help="range of average bits, such as 2.5-4.5")
    parser.add_argument("--schemes", metavar="A,B", help="only these of the sensitivity's (default: all)")
    parser.add_argument("--allocations", type=int, default=100, metavar="N", help="of the range (default: %(default)s)")
    parser.add_argument(
        "--equal-bits", type=float, action="append", default=[], metavar="BITS", help="allocations of one size too"
    )
    parser.add_argument("--equal-allocations", type=int, default=40, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="gptq", help="rounding (default: %(default)s)")
    parser.add_argument("--no-clip", action="store_true", help="no search for narrower ranges")
    parser.add_argument("--rotate", action="store_true", help="rotate inputs whose activations are quantised")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the report, JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the picture (default: beside --out, .png)")
    parser.add_argument("--corrected", type=Path, metavar="FILE", help="the sensitivity with the correction, Parquet")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
