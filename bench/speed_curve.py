"""How much faster a mixed allocation is at equal perplexity, as launched: `python -m bench.speed_curve plan | report`.

A small model has no launches that a GPU would notice, so its experts are launched at another model's size (`--size`):
its losses, its routing and its perplexities, that model's matrices. `plan` writes, for each load, uniform allocations
and mixed ones of least loss between the fastest uniform scheme and the one to be faster than. `allocator.latency`
launches them on a GPU. `report` measures their perplexities and puts the two together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from allocator import Allocation, Budget, Options, Sensitivity, allocate
from allocator.calibration.streams import measure_allocations
from allocator.json_file import write_json
from allocator.latencies import Latencies, digest_of
from allocator.latency import read_finalists
from allocator.scenarios import by_share, learned_table, loads_of, parse_loads
from allocator.sensitivity import SHARED_EXPERT
from allocator.study.evaluate import Evaluator
from allocator.study.evidence import Evidence
from allocator.study.finalists import best_of_study
from allocator.study.objective import Goal, Objective
from allocator.study.problem import of as problem_of
from allocator.study.run import Settings
from bench.evaluate import add_model_options, open_evaluator, write_text
from bench.mixed_evidence import QUANTIZER
from bench.present import MIXED, UNIFORM, latency_model
from bench.speed_report import Row, compared, markdown, plot
from costmodel import shipped
from costmodel.model_file import FittedModel
from costmodel.table import CostTable
from profiles import schemes
from profiles.errors import DataError, SpecError, UserError
from profiles.gpus import gpu
from profiles.interrupt import interruptible
from profiles.loads import TokenLoad, read_trace
from profiles.models import MoeShape, find_model
from profiles.schemes import QuantScheme

QUALITY = "quality.json"
LOADS = "t16=16,t64=64,t512=512"
UNIFORM_SCHEMES = (
    "w2a16_g128_asym,w3a16_g128_asym,w4a8_g128_sym,w4a16_g-1_asym,w4a16_g-1_sym,w4a16_g128_asym,w4a16_g128_sym,"
    "w8a16_g-1_sym,w8a16_g128_sym,w8a8_g-1_sym"
)
POINTS = (0.15, 0.3, 0.45, 0.7)
"""Latency limits of the mixed allocations: shares of the way from the fastest uniform scheme to the one beside it."""


def routed_of(sensitivity: Sensitivity, name: str) -> Sensitivity:
    """The routed experts' losses, as another model's."""
    frame = sensitivity.frame()
    return Sensitivity(frame[frame["expert"] != SHARED_EXPERT].assign(model=name))


def curve(
    losses: Sensitivity,
    table: CostTable,
    shape: MoeShape,
    scenario: str,
    *,
    uniform: Sequence[QuantScheme],
    mixed: Sequence[QuantScheme],
    beside: QuantScheme,
    points: Iterable[float] = POINTS,
) -> dict[str, Allocation]:
    """Uniform and mixed allocations for one load. SpecError: `beside` is not one of the uniform schemes."""
    found = {
        scheme.name: allocate(
            losses, table, Budget(avg_weight_bits=17.0), shape=shape, options=Options(schemes=(scheme,))
        )
        for scheme in uniform
    }
    if beside.name not in found:
        raise SpecError(f"{beside.name} is not one of the uniform schemes: {', '.join(found)}")
    us = {name: one.predicted_latency_us[scenario] for name, one in found.items()}
    fastest, slowest = min(us.values()), us[beside.name]
    for point in points:
        budget = Budget(max_latency_us={scenario: fastest + point * (slowest - fastest)})
        options = Options(schemes=tuple(mixed))
        found[f"mixed, {point:.0%} of the way"] = allocate(losses, table, budget, shape=shape, options=options)
    return found


def studied(
    losses: Sensitivity,
    table: CostTable,
    fitted: FittedModel,
    shape: MoeShape,
    scenario: str,
    limit_us: float,
    *,
    mixed: Sequence[QuantScheme],
    loads: Mapping[str, TokenLoad],
    trace: Mapping[int, TokenLoad],
    num_trials: int,
) -> Allocation | None:
    """The outer study's allocation of least loss whose launches, as predicted, are within a limit under one load."""
    frame = table.frame()
    evidence = Evidence.from_cost_table(
        CostTable(frame[frame["scenario"] == scenario]), shape.name, shape.num_experts, {scenario: loads[scenario]}
    )
    evidence = replace(evidence, latency_model=fitted)
    experts = {layer: by_share(load) for layer, load in trace.items()}
    budget = Budget(max_latency_us={scenario: limit_us})
    problem = problem_of(losses, shape, budget, evidence, schemes=mixed, experts=experts)
    settings = Settings(goal=Goal(objective=Objective.LOSS), num_trials=num_trials)
    return best_of_study(Evaluator.of(problem), settings, None)


def _plan(arguments: argparse.Namespace) -> None:
    if not arguments.out.is_dir():
        raise SpecError(f"--out {arguments.out}: no such folder")
    shape, trace = find_model(arguments.size), read_trace(arguments.trace)
    loads = loads_of(arguments.loads, trace, shape)
    uniform, mixed = (
        [schemes.parse(name) for name in text.split(",")] for text in (arguments.uniform, arguments.mixed)
    )
    losses = routed_of(Sensitivity.read(arguments.sensitivity), shape.name)
    fitted = latency_model(tuple(arguments.profile))
    table = learned_table(fitted, shape, loads, list(dict.fromkeys([*uniform, *mixed])))
    for scenario in loads:
        beside = schemes.parse(arguments.beside)
        found = curve(losses, table, shape, scenario, uniform=uniform, mixed=mixed, beside=beside)
        if loads[scenario].num_active == shape.num_experts:  # an idle expert would be free there, which it is not
            limit = found[f"mixed, {POINTS[1]:.0%} of the way"].predicted_latency_us[scenario]
            study = studied(losses, table, fitted, shape, scenario, limit, mixed=mixed, loads=loads, trace=trace,
                            num_trials=arguments.trials)  # fmt: skip
            found |= {} if study is None else {"outer study": study}
        write_json(arguments.out / f"{scenario}.json", {name: one.to_json() for name, one in found.items()})
        for name, one in found.items():
            us = one.predicted_latency_us[scenario]
            print(f"{scenario}: {name}: {us:.1f} us, {one.avg_weight_bits:.2f} bits, loss {one.predicted_loss:.5g}")


def _quality(arguments: argparse.Namespace) -> None:
    """Perplexity and divergence of every allocation, by digest: equal assignments are measured once."""
    evaluator, held_out, calibration = open_evaluator(arguments)
    found = {digest_of(one): one for file in _files(arguments.plan) for one in read_finalists([file]).values()}
    measured = measure_allocations(
        evaluator.model,
        evaluator.held_out,
        evaluator.calibration,
        [one.assignment for one in found.values()],
        QUANTIZER,
        batch_size=evaluator.batch_size,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    rows = {
        digest: {"perplexity": one.perplexity, "mean_kl": one.kl}
        for digest, one in zip(found, measured.allocations, strict=True)
    }
    content = {
        "model": evaluator.model.shape.name,
        "held_out": held_out.source,
        "calibration": calibration.source,
        "quantizer": QUANTIZER.name,
        "exact_perplexity": measured.exact_perplexity,
        "allocations": rows,
    }
    write_json(arguments.plan / QUALITY, content, indent=1)


def _report(arguments: argparse.Namespace) -> None:
    quality = json.loads((arguments.plan / QUALITY).read_text(encoding="utf-8"))
    shape, trace = find_model(arguments.size), read_trace(arguments.trace)
    batches = {name: batch.num_tokens for name, batch in parse_loads(arguments.loads).items()}
    loads = loads_of(arguments.loads, trace, shape)
    curves = {}
    for scenario, load in loads.items():
        allocations = read_finalists([arguments.plan / f"{scenario}.json"])
        measured = Latencies.read(arguments.latencies / f"{scenario}.json")
        predicted = _predicted(allocations, shape, scenario, load, trace)
        rows = []
        for name, one in allocations.items():
            us = measured.of(one)
            if us is None:
                print(f"{scenario}: {name} was not measured", file=sys.stderr)
                continue
            known = quality["allocations"][digest_of(one)]
            rows.append(
                Row(
                    name=name,
                    is_mixed=len(set(one.assignment.values())) > 1,
                    avg_weight_bits=one.avg_weight_bits,
                    perplexity=known["perplexity"],
                    mean_kl=known["mean_kl"],
                    added_us=one.predicted_latency_us[scenario],
                    predicted_us=predicted[name],
                    measured_us=us[scenario],
                )
            )
        curves[scenario] = compared(rows)
    where = {key: value for key, value in quality.items() if key != "allocations"}
    where |= {"size": shape.name, "loads": batches}
    content = {"measured_on": where, "curves": {name: [asdict(row) for row in rows] for name, rows in curves.items()}}
    write_json(arguments.out, content, indent=1)
    text = markdown(curves, batches, quality["exact_perplexity"])
    write_text(arguments.out.with_suffix(".md"), text)
    plot(curves, batches, quality["exact_perplexity"], arguments.out.with_suffix(".png"))
    print(text, end="")


def _predicted(
    allocations: Mapping[str, Allocation],
    shape: MoeShape,
    scenario: str,
    load: TokenLoad,
    trace: Mapping[int, TokenLoad],
) -> dict[str, float]:
    """By name, all launches as the model of the launches that come with bitile has them, each with the best of its
    ranked configurations.
    """
    schemes_used = list(dict.fromkeys(s for one in allocations.values() for s in one.assignment.values()))
    losses = Sensitivity.from_losses(
        {(block, s): 1.0 for block in next(iter(allocations.values())).assignment for s in schemes_used},
        model=shape.name, metric="none", data="none", num_samples=1, seed=0,
    )  # fmt: skip
    evidence = Evidence(gpu=gpu("h200"), loads={scenario: load}, latency_model=shipped.fitted(gpu("h200")))
    experts = {layer: by_share(of_layer) for layer, of_layer in trace.items()}
    evaluator = Evaluator.of(problem_of(losses, shape, Budget(avg_weight_bits=17.0), evidence, experts=experts))
    found = {}
    for name, one in allocations.items():
        us = evaluator.best_launches_us(one.assignment)
        found[name] = np.nan if us is None else us[scenario]
    return found


def _files(folder: Path) -> list[Path]:
    """The plan's files, one a load. DataError: there are none."""
    files = sorted(file for file in folder.glob("*.json") if file.name != QUALITY)
    if not files:
        raise DataError(f"{folder}: no allocations, which `plan` writes")
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.speed_curve", description=__doc__)
    commands = parser.add_subparsers(required=True)
    plan = commands.add_parser("plan", help="write the allocations, one file a load")
    add = plan.add_argument
    add("--sensitivity", type=Path, required=True, metavar="FILE", help="of the small model, by allocator.calibrate")
    add("--trace", type=Path, required=True, metavar="FILE", help="its tokens per expert, by allocator.trace")
    add("--size", required=True, metavar="MODEL", help="a config.json or known model with as many experts")
    add(
        "--profile",
        type=Path,
        nargs="+",
        default=[UNIFORM, MIXED],
        metavar="FILE",
        help="what the latency model learns from (default: the tables of bench.present)",
    )
    add("--loads", default=LOADS, metavar="A=TOKENS", help="(default: %(default)s)")
    add("--uniform", default=UNIFORM_SCHEMES, metavar="A,B", help="schemes (default: %(default)s)")
    add("--mixed", default="w4a8_g128_sym,w8a8_g-1_sym", metavar="A,B", help="schemes (default: %(default)s)")
    add("--beside", default="w8a8_g-1_sym", metavar="SCHEME", help="to be faster than (default: %(default)s)")
    add("--trials", type=int, default=40, metavar="N", help="of the outer study (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="an existing folder")
    plan.set_defaults(run=_plan)
    quality = commands.add_parser("quality", help="measure their perplexities on the small model")
    add_model_options(quality)
    quality.add_argument("--plan", type=Path, required=True, metavar="DIR", help="what `plan` wrote")
    quality.set_defaults(run=_quality)
    report = commands.add_parser(
        "report", help="perplexities beside what allocator.latency measured: JSON, table, picture"
    )
    add = report.add_argument
    add("--plan", type=Path, required=True, metavar="DIR", help="what `plan` and `quality` wrote")
    add("--latencies", type=Path, required=True, metavar="DIR", help="of allocator.latency, a file a load")
    add("--trace", type=Path, required=True, metavar="FILE", help="as for `plan`")
    add("--size", required=True, metavar="MODEL", help="as for `plan`")
    add("--loads", default=LOADS, metavar="A=TOKENS", help="(default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FILE.json", help="FILE.md and FILE.png are written beside it")
    report.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
