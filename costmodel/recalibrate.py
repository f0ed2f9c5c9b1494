"""`python -m costmodel.recalibrate`: makes a fitted model right for changed software or another card of the kind, from
at most 50 measurements, and names what changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from costmodel import model_file
from costmodel.fit import read_profiles, seed_number
from costmodel.recalibration import ENOUGH_ROWS, MIN_ROWS, Recalibration, recalibrate
from costmodel.sessions import usable
from profiles.errors import UserError
from profiles.interrupt import interruptible

EPILOG = f"""examples:
  # Choose {ENOUGH_ROWS} launches of the recorded ones and measure them again, then see what changed.
  python -m kernel_gen.sweep --gpu h200 --again profiles/data/h200/*.parquet --out again.parquet
  python -m costmodel.recalibrate --base h200.npz --measured again.parquet --recorded profiles/data/h200/*.parquet \\
      --out h200-now.npz

exit status: 0 done, whether anything changed or not (--json says it); 2 a mistake that you can mend"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake, whose sentence goes to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        base = model_file.read(arguments.base)
        recorded = usable(read_profiles(arguments.recorded)) if arguments.recorded else None
        found = recalibrate(base, usable(read_profiles(arguments.measured)), recorded, seed=arguments.seed)
        model_file.write(arguments.out, found.fitted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary(found), indent=1) if arguments.json else text(found, arguments.out))
    return 0


def text(found: Recalibration, out: Path) -> str:
    """What was found, for people."""
    against = f"{found.num_paired} of them recorded before"
    if found.num_paired < MIN_ROWS:
        against += ", too few: all are compared with the model's predictions"
    lines = [f"{found.num_rows} launches measured, {against}"]
    if not found.effects:
        lines.append("no drift: what differs is noise")
    lines += [f"{'drift' if effect.is_drift else 'small change'}: {effect}" for effect in found.effects]
    if found.clock_ratio is not None:
        lines.append(f"SM clock seen, now over recorded: {found.clock_ratio:.3f}, median")
    for name, (was, now) in found.versions.items():
        lines.append(f"{name} was {was}, is {now}" if was else f"{name}: {now}")
    lines.append(
        f"{out}: mean error on these launches {100 * found.error_after:.1f}%, before {100 * found.error_before:.1f}%;"
        f" intervals {found.widening:.2f} times as wide"
    )
    return "\n".join(lines)


def summary(found: Recalibration) -> dict[str, object]:
    """The same, for JSON."""
    effects = [
        {
            "cause": effect.explanation.cause.value,
            "name": effect.explanation.name,
            "is_drift": effect.is_drift,
            **{name: getattr(effect, name) for name in ("factor", "low", "high", "p_value")},
        }
        for effect in found.effects
    ]
    numbers = ("num_rows", "num_paired", "error_before", "error_after", "widening", "clock_ratio", "versions")
    return {
        "drift": any(effect.is_drift for effect in found.effects),
        "effects": effects,
        **{name: getattr(found, name) for name in numbers},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m costmodel.recalibrate",
        description="Correct a latency model for what changed since it was fitted, and name that.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="the model (costmodel.fit)")
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="a profile of now",
    )
    parser.add_argument(
        "--recorded",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the profiles that the model was fitted on: the same launch compares better than a prediction",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the corrected model's file (.npz)")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the test's draws (default 0)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
