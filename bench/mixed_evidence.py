"""Mixed allocations against uniform GPTQ on one model: `python -m bench.mixed_evidence --model DIR --sensitivity FILE`.

How much of the divergence that uniform GPTQ causes a mixed allocation of the same size removes. Uniform rows are
measured with plain GPTQ and with the quantiser of the mixed ones. How much faster one is at equal perplexity:
bench.speed_curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allocator import Budget, Options, Sensitivity, allocate
from allocator.calibration.quantizer import Method, Quantizer
from allocator.calibration.streams import Assignment, measure_allocations
from bench.evaluate import add_model_options, open_evaluator, write_text
from bench.evaluation import Evaluator, average_bits
from bench.paper_variants import WEIGHT_ACTIVATION, WEIGHT_ONLY, Blend, Uniform, assignment_of
from profiles import schemes
from profiles.errors import UserError
from profiles.interrupt import interruptible
from profiles.schemes import QuantScheme

QUANTIZER = Quantizer(method=Method.GPTQ, clip=True, rotate=True)
PLAIN = Quantizer(method=Method.GPTQ, clip=False, rotate=False)
_W4A4, _W8A8 = schemes.parse("w4a4_g128_sym"), schemes.parse("w8a8_g-1_sym")
SETTINGS: tuple[tuple[str, Uniform | Blend, tuple[QuantScheme, ...], float], ...] = (
    ("2.25 bits, weights", Uniform(scheme=schemes.parse("w2a16_g128_asym")), WEIGHT_ONLY, 2.25),
    ("3.25 bits, weights", Uniform(scheme=schemes.parse("w3a16_g128_asym")), WEIGHT_ONLY, 3.25),
    ("5 bits, weights and activations", Blend(low=_W4A4, high=_W8A8, avg_bits=5.0), WEIGHT_ACTIVATION, 5.0),
)
"""(setting, what a uniform scheme of that size does, what a mixed allocation may use, average bits)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured variant."""

    name: str
    group: str
    is_mixed: bool
    quantizer: str
    avg_weight_bits: float
    mean_kl: float
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is to be measured."""

    name: str
    group: str
    is_mixed: bool
    assignment: Assignment


def of_size(evaluator: Evaluator, sensitivity: Sensitivity) -> list[Variant]:
    """For each setting, the uniform rule and the mixed allocation of the same average bits."""
    found = []
    for setting, rule, offered, bits in SETTINGS:
        uniform = assignment_of(rule, evaluator.linears, evaluator.model.shape, sensitivity)
        known = tuple(scheme for scheme in offered if scheme in sensitivity.schemes)
        mixed = allocate(
            sensitivity,
            None,
            Budget(avg_weight_bits=bits),
            shape=evaluator.model.shape,
            options=Options(schemes=known),
        )
        found.append(Variant(name=rule.name, group=setting, is_mixed=False, assignment=uniform))
        name = f"mixed of {len(known)} schemes"
        found.append(Variant(name=name, group=setting, is_mixed=True, assignment=mixed.assignment))
    return found


def measured(evaluator: Evaluator, variants: Sequence[Variant], quantizer: Quantizer) -> tuple[list[Row], float]:
    """All variants in one walk, and the model's own perplexity."""
    found = measure_allocations(
        evaluator.model,
        evaluator.held_out,
        evaluator.calibration,
        [variant.assignment for variant in variants],
        quantizer,
        batch_size=evaluator.batch_size,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    rows = [
        Row(
            name=variant.name,
            group=variant.group,
            is_mixed=variant.is_mixed,
            quantizer=quantizer.name,
            avg_weight_bits=average_bits(evaluator.model.shape, list(variant.assignment), variant.assignment),
            mean_kl=one.kl,
            perplexity=one.perplexity,
        )
        for variant, one in zip(variants, found.allocations, strict=True)
    ]
    return rows, found.exact_perplexity


def markdown(command: str, measured_on: Mapping[str, Any], rows: Sequence[Row], exact: float) -> str:
    """The tables."""
    lines = [
        "# Mixed against uniform, measured",
        "",
        f"`{command}`",
        "",
        f"{measured_on['model']}, own perplexity {exact:.4f}. Held out: {measured_on['data']}. Calibration:"
        f" {measured_on['calibration']}. Losses: {measured_on['losses']}. KL from the model's own"
        " logits, nats a token.",
        "",
        "## At equal size",
        "",
        "The share of a uniform row's KL, and of its excess perplexity, that the mixed row of that size does not have.",
        "",
        "| size | schemes | rounding | bits a weight | perplexity | KL | KL removed | perplexity removed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, *_ in SETTINGS:
        (mixed,) = (row for row in rows if row.group == setting and row.is_mixed)
        for row in (row for row in rows if row.group == setting and not row.is_mixed):
            excess = (mixed.perplexity - exact) / (row.perplexity - exact)
            lines.append(_size_row(row, setting, f"{1 - mixed.mean_kl / row.mean_kl:.1%} | {1 - excess:.1%}"))
        lines.append(_size_row(mixed, setting, " | "))
    return "\n".join(lines) + "\n"


def _size_row(row: Row, setting: str, removed: str) -> str:
    return (
        f"| {setting} | {row.name} | {row.quantizer} | {row.avg_weight_bits:.3f} | {row.perplexity:.4f} |"
        f" {row.mean_kl:.5f} | {removed} |"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mixed_evidence", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--sensitivity", type=Path, required=True, metavar="FILE", help="of allocator.calibrate")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="FILE.md is written beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        sensitivity = Sensitivity.read(arguments.sensitivity)
        evaluator, held_out, calibration = open_evaluator(arguments)
        shape = evaluator.model.shape
        variants = of_size(evaluator, sensitivity)
        plain = [variant for variant in variants if not variant.is_mixed]
        rows, exact = measured(evaluator, variants, QUANTIZER)
        rows = [*measured(evaluator, plain, PLAIN)[0], *rows]
        measured_on = {
            "model": shape.name,
            "data": held_out.source,
            "calibration": calibration.source,
            "losses": f"{sensitivity.metric}, {sensitivity.provenance['data']}",
        }
        content = {"measured_on": measured_on, "exact_perplexity": exact, "rows": [asdict(row) for row in rows]}
        write_text(arguments.out, json.dumps(content, indent=1) + "\n")
        command = f"python -m bench.mixed_evidence {' '.join(argv if argv is not None else sys.argv[1:])}"
        text = markdown(command, measured_on, rows, exact)
        write_text(arguments.out.with_suffix(".md"), text)
        print(text, end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
