"""Mixed allocations against uniform GPTQ on one model: `python -m bench.mixed_evidence --model DIR --sensitivity FILE`.

At equal size: how much of the divergence that uniform GPTQ causes a mixed allocation removes. At equal perplexity: how
much faster it is, with latencies that were measured for another model's launches (`--priced-as`): a small model has no
launches of its own that a GPU would notice, so its layers are priced as that model's, each expert an even share of a
launch in one scheme. Uniform rows are measured with plain GPTQ and with the quantiser of the mixed ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allocator import Budget, InfeasibleError, Options, Sensitivity, allocate
from allocator.calibration.quantizer import Method, Quantizer
from allocator.calibration.streams import Assignment, measure_allocations
from allocator.sensitivity import SHARED_EXPERT
from bench.evaluate import add_model_options, open_evaluator, write_text
from bench.evaluation import Evaluator, average_bits
from bench.paper_variants import WEIGHT_ACTIVATION, WEIGHT_ONLY, Blend, Uniform, assignment_of
from costmodel.table import CostTable
from profiles import schemes
from profiles.errors import DataError, UserError
from profiles.models import MoeShape
from profiles.schemes import QuantScheme
from profiles.store import ProfileStore

QUANTIZER = Quantizer(method=Method.GPTQ, clip=True, rotate=True)
PLAIN = Quantizer(method=Method.GPTQ, clip=False, rotate=False)
EQUAL_PERPLEXITY = 0.001
"""Relative. Perplexities this close count as equal: the text is too short to tell them apart."""
LATENCY_STEPS = 6
_W4A4, _W8A8 = schemes.parse("w4a4_g128_sym"), schemes.parse("w8a8_g-1_sym")
SETTINGS: tuple[tuple[str, Uniform | Blend, tuple[QuantScheme, ...], float], ...] = (
    ("2.25 bits, weights", Uniform(scheme=schemes.parse("w2a16_g128_asym")), WEIGHT_ONLY, 2.25),
    ("3.25 bits, weights", Uniform(scheme=schemes.parse("w3a16_g128_asym")), WEIGHT_ONLY, 3.25),
    ("5 bits, weights and activations", Blend(low=_W4A4, high=_W8A8, avg_bits=5.0), WEIGHT_ACTIVATION, 5.0),
)
"""(setting, what a uniform scheme of that size does, what a mixed allocation may use, average bits)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured variant. latency_us: by scenario, of the routed experts priced as another model's."""

    name: str
    group: str
    is_mixed: bool
    quantizer: str
    avg_weight_bits: float
    mean_kl: float
    perplexity: float
    latency_us: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is to be measured."""

    name: str
    group: str
    is_mixed: bool
    assignment: Assignment
    latency_us: Mapping[str, float]


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
        found.append(Variant(name=rule.name, group=setting, is_mixed=False, assignment=uniform, latency_us={}))
        name = f"mixed of {len(known)} schemes"
        found.append(Variant(name=name, group=setting, is_mixed=True, assignment=mixed.assignment, latency_us={}))
    return found


def priced_as(profile: Path, donor: str, name: str, tokens: Sequence[int], top_k: int) -> CostTable:
    """A profile's measured launches of one model as another's cost table, for batches of some sizes. DataError: the
    profile has none such.
    """
    rows = ProfileStore(profile).records(source="measured")
    rows = rows[rows["model"] == donor]
    batch = rows["tokens_per_expert"].map(lambda counts: int(np.sum(counts)) // top_k)
    rows = rows[batch.isin(list(tokens))]
    if rows.empty:
        raise DataError(f"{profile}: no measured launches of {donor} with {', '.join(map(str, tokens))} tokens")
    return CostTable.from_profile(rows.assign(model=name, load_source=batch[rows.index].map(lambda n: f"{n} tokens")))


def of_latency(shape: MoeShape, sensitivity: Sensitivity, table: CostTable) -> list[Variant]:
    """Uniform schemes, and for each scenario mixed allocations of falling latency: routed experts only."""
    frame = sensitivity.frame()
    routed = Sensitivity(frame[frame["expert"] != SHARED_EXPERT])
    scenarios = sorted(set(table.frame()["scenario"]))
    priced = {(row.linear, row.scheme, row.scenario): row.latency_us for row in table.frame().itertuples()}
    runnable = [
        s for s in routed.schemes if all((lin, s.name, sc) in priced for lin in ("gate_up", "down") for sc in scenarios)
    ]
    found = []
    for scheme in runnable:
        one = Options(schemes=(scheme,))
        made = allocate(routed, table, Budget(avg_weight_bits=17.0), shape=shape, options=one)
        found.append(_variant(scheme.name, "uniform", False, made.assignment, made.predicted_latency_us))
    for scenario in scenarios:
        us = [variant.latency_us[scenario] for variant in found if not variant.is_mixed]
        for limit in np.geomspace(min(us) * 1.002, max(us), LATENCY_STEPS):
            budget = Budget(max_latency_us={scenario: float(limit)})
            try:
                made = allocate(routed, table, budget, shape=shape, options=Options(schemes=tuple(runnable)))
            except InfeasibleError:
                continue
            name = f"mixed, at most {limit:.0f} us"
            found.append(_variant(name, scenario, True, made.assignment, made.predicted_latency_us))
    return found


def _variant(name: str, group: str, is_mixed: bool, assignment: Assignment, us: Mapping[str, float]) -> Variant:
    return Variant(name=name, group=group, is_mixed=is_mixed, assignment=assignment, latency_us=dict(us))


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
            latency_us=variant.latency_us,
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
    curves = [row for row in rows if row.latency_us]
    if curves:
        lines += ["", "## At equal perplexity", "", *_speed(curves, measured_on)]
    return "\n".join(lines) + "\n"


def _size_row(row: Row, setting: str, removed: str) -> str:
    return (
        f"| {setting} | {row.name} | {row.quantizer} | {row.avg_weight_bits:.3f} | {row.perplexity:.4f} |"
        f" {row.mean_kl:.5f} | {removed} |"
    )


def _speed(rows: Sequence[Row], measured_on: Mapping[str, Any]) -> list[str]:
    uniform = [row for row in rows if not row.is_mixed]
    lines = [
        f"Routed experts only, each layer priced as one of {measured_on['priced_as']} ({measured_on['profile']}:"
        " measured launches in one scheme). A mixed launch is charged their linear mix, which no launch has confirmed"
        f" here. Beside a mixed row stands the fastest uniform scheme whose perplexity is at most"
        f" {EQUAL_PERPLEXITY:.1%} worse; all rows are rounded with {QUANTIZER.name}.",
    ]
    for scenario in sorted({row.group for row in rows if row.is_mixed}, key=lambda name: int(name.split()[0])):
        lines += ["", f"### {scenario}", "", "| | us | bits | perplexity | fastest uniform no worse | us | faster |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted(uniform, key=lambda one: one.latency_us[scenario]):
            us = row.latency_us[scenario]
            lines.append(f"| {row.name} | {us:.1f} | {row.avg_weight_bits:.2f} | {row.perplexity:.4f} | | | |")
        for row in (row for row in rows if row.is_mixed and row.group == scenario):
            us = row.latency_us[scenario]
            peers = [one for one in uniform if one.perplexity <= row.perplexity * (1 + EQUAL_PERPLEXITY)]
            best = min(peers, key=lambda one: one.latency_us[scenario], default=None)
            beside = "none is | | " if best is None else (
                f"{best.name} | {best.latency_us[scenario]:.1f} | {best.latency_us[scenario] / us - 1:+.1%}"
            )  # fmt: skip
            lines.append(f"| {row.name} | {us:.1f} | {row.avg_weight_bits:.2f} | {row.perplexity:.4f} | {beside} |")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mixed_evidence", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--sensitivity", type=Path, required=True, metavar="FILE", help="of allocator.calibrate")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured launches: speed at equal quality")
    parser.add_argument("--priced-as", default="qwen1.5-moe-a2.7b", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 512, 8192], metavar="N", help="batches to price")
    parser.add_argument("--top-k", type=int, default=4, metavar="K", help="of the model priced as (default: 4)")
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
        if arguments.profile is not None:
            table = priced_as(arguments.profile, arguments.priced_as, shape.name, arguments.tokens, arguments.top_k)
            variants += of_latency(shape, sensitivity, table)
        plain = [variant for variant in variants if not variant.is_mixed and not variant.latency_us]
        rows, exact = measured(evaluator, variants, QUANTIZER)
        rows = [*measured(evaluator, plain, PLAIN)[0], *rows]
        measured_on = {
            "model": shape.name,
            "data": held_out.source,
            "calibration": calibration.source,
            "losses": f"{sensitivity.metric}, {sensitivity.provenance['data']}",
            "priced_as": arguments.priced_as,
            "profile": None if arguments.profile is None else arguments.profile.name,
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
    sys.exit(main())
