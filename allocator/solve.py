"""`python -m allocator.solve`: an allocation from a sensitivity, a cost table and a budget."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allocator.allocate import MAX_SCHEMES_PER_LAUNCH, Options, allocate
from allocator.allocation import Allocation, Granularity
from allocator.budget import Budget
from allocator.command import check_outputs
from allocator.sensitivity import Sensitivity
from costmodel.table import CostTable
from profiles import schemes
from profiles.errors import SpecError, UserError
from profiles.interrupt import interruptible
from profiles.models import LinearId, find_model
from profiles.schemes import QuantScheme


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when an allocation was written, 2 on a user's mistake (its sentence on stderr)."""
    arguments = _parser().parse_args(argv)
    try:
        allocation = _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary(allocation)) if arguments.json else report(allocation, arguments.out))
    return 0


def _run(arguments: argparse.Namespace) -> Allocation:
    check_outputs(arguments, "--out")
    budget = Budget(
        avg_weight_bits=arguments.budget_bits,
        weight_bytes=arguments.budget_bytes,
        max_latency_us=_limits(arguments.max_latency),
        per_layer=arguments.per_layer,
    )
    sensitivity = Sensitivity.read(arguments.sensitivity)
    options = Options(
        granularity=Granularity(arguments.granularity),
        schemes=None
        if arguments.schemes is None
        else tuple(schemes.parse(name) for name in arguments.schemes.split(",")),
        max_schemes=arguments.max_schemes,
        pinned=_pins(arguments.pin, sensitivity),
    )
    allocation = allocate(
        sensitivity,
        None if arguments.cost is None else CostTable.read(arguments.cost),
        budget,
        shape=None if arguments.model is None else find_model(arguments.model),
        options=options,
    )
    allocation.write(arguments.out)
    return allocation


def _limits(texts: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, us = _limit(text)
        if name in found:
            raise SpecError(f"--max-latency {text}: {name} has a limit already, of {found[name]:g} us")
        found[name] = us
    return found


def _pins(texts: Sequence[str], sensitivity: Sensitivity) -> dict[LinearId, QuantScheme]:
    """LAYER=SCHEME or FIRST-LAST=SCHEME: every linear of those layers."""
    blocks, _, _ = sensitivity.arrays()
    found: dict[LinearId, QuantScheme] = {}
    for text in texts:
        layers, equals, name = text.partition("=")
        first, dash, last = layers.partition("-")
        if not (equals and first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise SpecError(f"--pin {text}: it is LAYER=SCHEME or FIRST-LAST=SCHEME, such as 0=w8a16_g-1_sym")
        scheme, wanted = schemes.parse(name), range(int(first), int(last or first) + 1)
        pinned = [block for block in blocks if block.layer in wanted]
        if {block.layer for block in pinned} != set(wanted) or not wanted:
            raise SpecError(f"--pin {text}: the sensitivity has no such layers; it has {_spans(blocks)}")
        if twice := [block for block in pinned if found.get(block, scheme) != scheme]:
            raise SpecError(f"--pin {text}: layer {twice[0].layer} is pinned to {found[twice[0]].name} already")
        found |= dict.fromkeys(pinned, scheme)
    return found


def _spans(blocks: Sequence[LinearId]) -> str:
    layers = sorted({block.layer for block in blocks})
    return f"{len(layers)} layers from {layers[0]} to {layers[-1]}"


def _limit(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name if equals and name else _no_limit(text), float(value)
    except ValueError:
        return _no_limit(text), 0.0


def _no_limit(text: str) -> str:
    raise SpecError(f"--max-latency {text}: it is SCENARIO=MICROSECONDS, such as decode=850")


def summary(allocation: Allocation) -> dict[str, Any]:
    """What `--json` prints: the allocation's numbers without its assignment, and how many linears each scheme got."""
    content = allocation.to_json()
    del content["assignment"], content["kernel_configs"]
    return content | {"linears_per_scheme": _counts(allocation)}


def _counts(allocation: Allocation) -> dict[str, int]:
    counts: dict[str, int] = {}
    for scheme in allocation.assignment.values():
        counts[scheme.name] = counts.get(scheme.name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def report(allocation: Allocation, out: Path) -> str:
    """What the command prints: the allocation beside the uniform schemes, the certificate, what more budget buys."""
    scenarios = list(allocation.predicted_latency_us)
    head = ["", "bits", "loss", *(f"{name} us" for name in scenarios), ""]
    rows = [
        [
            "mixed",
            f"{allocation.avg_weight_bits:.4f}",
            f"{allocation.predicted_loss:.6g}",
            *(f"{allocation.predicted_latency_us[name]:.1f}" for name in scenarios),
            "this allocation",
        ]
    ]
    for uniform in sorted(allocation.uniform, key=lambda u: u.avg_weight_bits):
        latency = [f"{uniform.latency_us[name]:.1f}" if name in uniform.latency_us else "-" for name in scenarios]
        verdict = "within the budget" if uniform.within_budget else "beyond the budget"
        rows.append([uniform.scheme.name, f"{uniform.avg_weight_bits:.4f}", f"{uniform.loss:.6g}", *latency, verdict])
    total = len(allocation.assignment)
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in _counts(allocation).items())
    lines = [
        f"{allocation.model}"
        + (f" on {allocation.gpu}" if allocation.gpu else "")
        + f": {total} linears, {allocation.granularity.value} by {allocation.granularity.value}",
        "",
        *_table([head, *rows]),
        "",
        f"loss {allocation.predicted_loss:.6g}; no allocation within the budget is below {allocation.bound:.6g}"
        f" (gap {100 * allocation.gap:.2g}%)",
        f"schemes: {shares}",
        *_worth(allocation),
        f"wrote {out}",
    ]
    return "\n".join(lines)


def _worth(allocation: Allocation) -> list[str]:
    """What a little more of each limit buys at most."""
    lines = []
    for name, price in allocation.shadow_prices.items():
        if name.startswith("avg_bits"):
            lines.append(f"the next 0.1 {name} buys up to {0.1 * price:.4g} of loss")
        else:
            limit = allocation.budget.max_latency_us[name.removeprefix("max_latency_us[").removesuffix("]")]
            lines.append(f"the next 1% of {name} ({limit / 100:.4g} us) buys up to {limit / 100 * price:.4g} of loss")
    return lines if len(lines) <= 8 else [*lines[:7], f"({len(lines) - 7} more prices in the file)"]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.solve",
        description="Choose a scheme for every linear of every expert: least loss in the budget, with a certified gap.",
    )
    parser.add_argument("--sensitivity", required=True, type=Path, metavar="FILE", help="losses, Parquet")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="a cost table, Parquet: latencies and kernels")
    parser.add_argument("--budget-bits", type=float, metavar="BITS", help="most stored bits per weight, on average")
    parser.add_argument("--budget-bytes", type=int, metavar="BYTES", help="the same limit in bytes")
    parser.add_argument(
        "--max-latency",
        action="append",
        default=[],
        metavar="SCENARIO=US",
        help="most latency in a scenario; may be repeated",
    )
    parser.add_argument("--per-layer", action="store_true", help="--budget-bits holds in every layer")
    parser.add_argument(
        "--granularity",
        choices=[granularity.value for granularity in Granularity],
        default=Granularity.LINEAR.value,
        help="what gets one scheme (default: %(default)s)",
    )
    parser.add_argument("--schemes", metavar="A,B", help="schemes that may be used (default: all that have losses)")
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="LAYER=SCHEME",
        help="a layer's scheme, or several layers', FIRST-LAST=SCHEME; may be repeated",
    )
    parser.add_argument(
        "--max-schemes",
        type=int,
        default=MAX_SCHEMES_PER_LAUNCH,
        metavar="K",
        help="most schemes a launch may hold (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a known model or a config.json (default: the sensitivity's model)"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the allocation to write, JSON")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
