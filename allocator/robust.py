"""`python -m allocator.robust`: an allocation's regret under other loads, and the allocation of least worst case."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.allocate import Options
from allocator.allocation import Allocation
from allocator.command import check_outputs
from allocator.robustness import latency_regrets, loss_regrets, minimise_worst_case, reweighted, summary
from allocator.sensitivity import Sensitivity
from costmodel.table import CostTable
from profiles.errors import SpecError, UserError
from profiles.interrupt import interruptible
from profiles.loads import read_trace
from profiles.models import find_model

CALIBRATED = "calibrated"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 on a user's mistake (its sentence on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        found = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if arguments.json else report(found, arguments.out))
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    check_outputs(arguments, "--out")
    allocation = Allocation.read(arguments.allocation)
    sensitivity = Sensitivity.read(arguments.sensitivity)
    cost_table = None if arguments.cost is None else CostTable.read(arguments.cost)
    shape = find_model(arguments.model or allocation.model)
    loads = {CALIBRATED: sensitivity}
    if arguments.load and arguments.trace is None:
        raise SpecError("--load needs --trace, the loads of the data that the sensitivity was calibrated on")
    calibrated = None if arguments.trace is None else read_trace(arguments.trace)
    for text in arguments.load:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in loads:
            raise SpecError(f"--load {text}: it is NAME=TRACE, each name once and none of them {CALIBRATED!r}")
        assert calibrated is not None
        loads[name] = reweighted(sensitivity, calibrated, read_trace(path), name)
    losses = loss_regrets(allocation, loads, cost_table=cost_table, shape=shape)
    latencies = () if cost_table is None else latency_regrets(allocation, sensitivity, cost_table, shape)
    worst = None
    if arguments.out is not None:
        options = Options(granularity=allocation.granularity)
        worst = minimise_worst_case(loads, allocation.budget, cost_table=cost_table, shape=shape, options=options)
        worst.allocation.write(arguments.out)
    return summary(losses, latencies, worst)


def report(found: dict[str, Any], out: Path | None) -> str:
    """What the command prints."""
    lines = ["loss, against the best allocation for that load alone:"]
    lines += [f"  {one['load']:20} {one['loss']:.6g}  regret {one['regret']:.2%}" for one in found["loss"]]
    if found["latency"]:
        lines.append("latency, against the fastest allocation with no more loss and bits:")
        lines += [
            f"  {one['scenario']:20} {one['latency_us']:.1f} us  regret {one['regret']:.2%}" for one in found["latency"]
        ]
    if found["worst_case"] is not None:
        worst = found["worst_case"]
        ratios = ", ".join(f"{name} {ratio - 1:.2%}" for name, ratio in worst["ratios"].items())
        lines.append(
            f"least worst case: regret {worst['worst'] - 1:.2%} (none has less than {worst['bound'] - 1:.2%}): {ratios}"
        )
        lines.append(f"wrote {out}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.robust",
        description="How much worse an allocation is than the best under other loads.",
    )
    parser.add_argument("--allocation", required=True, type=Path, metavar="FILE", help="of allocator.solve, JSON")
    parser.add_argument("--sensitivity", required=True, type=Path, metavar="FILE", help="the losses it was made from")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="a cost table: regret in latency in its scenarios")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="loads of the data that was calibrated on")
    parser.add_argument(
        "--load", action="append", default=[], metavar="NAME=TRACE", help="another data set's loads; may be repeated"
    )
    parser.add_argument("--model", metavar="NAME", help="a known model or a config.json (default: the allocation's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the allocation of least worst case here")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
