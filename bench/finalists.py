"""Finalists of a known model's shapes, for a GPU to measure: `python -m bench.finalists --out DIR`.

Losses are those of `bench.study`, latencies those of the model fitted on the tables of bench.present: what
`allocator.latency` then measures tells how far a predicted allocation is from a measured one. DIR gets finalists.json,
trace.json and predicted.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from allocator import Allocation, Budget, Options, allocate
from allocator.allocation import Granularity
from allocator.json_file import write_json
from allocator.scenarios import by_share, learned_table, loads_of
from allocator.study.evaluate import Evaluator
from allocator.study.evidence import Evidence
from allocator.study.finalists import best_of_study
from allocator.study.objective import Goal
from allocator.study.problem import of as problem_of
from allocator.study.run import Settings
from bench.present import latency_model
from bench.study_problem import sensitivity
from profiles import schemes
from profiles.errors import UserError
from profiles.interrupt import interruptible
from profiles.loads import TokenLoad, log_normal, write_trace
from profiles.models import MoeShape, model
from profiles.schemes import QuantScheme

SCHEMES = (
    "w16a16,w8a16_g128_sym,w4a16_g128_sym,w4a16_g-1_asym,w3a16_g128_asym,w2a16_g128_sym,w8a8_g-1_sym,w4a8_g128_sym"
)
TRACED_TOKENS = 8192
NUM_TRIALS = 30


def finalists(
    shape: MoeShape, trace: Mapping[int, TokenLoad], loads: Mapping[str, TokenLoad],
    offered: Sequence[QuantScheme], bits: float, storage: str,
) -> tuple[dict[str, Allocation], dict[str, Mapping[str, float] | None]]:  # fmt: skip
    """Mixed, one scheme an expert, uniform, and studies'; and by name what their launches are predicted to take."""
    losses = sensitivity(list(offered), len(trace), 0, shape)
    fitted = latency_model()
    table = learned_table(fitted, shape, loads, offered)
    budget = Budget(avg_weight_bits=bits)
    found = {
        "mixed": allocate(losses, table, budget, shape=shape),
        "one scheme an expert": allocate(
            losses, table, budget, shape=shape, options=Options(granularity=Granularity.EXPERT)
        ),
    }
    for uniform in found["mixed"].uniform:
        if uniform.within_budget or uniform.scheme.name == "w8a8_g-1_sym":
            wide = Budget(avg_weight_bits=max(bits, uniform.avg_weight_bits))
            options = Options(schemes=(uniform.scheme,))
            found[f"uniform {uniform.scheme.name}"] = allocate(losses, table, wide, shape=shape, options=options)
    evidence = replace(Evidence.from_cost_table(table, shape.name, shape.num_experts, loads), latency_model=fitted)
    experts = {layer: by_share(load) for layer, load in trace.items()}
    problem = problem_of(losses, shape, budget, evidence, experts=experts)
    evaluator = Evaluator.of(problem)
    for r in (0.5, 0.75):
        study = best_of_study(evaluator, Settings(goal=Goal(loss_weight=r), num_trials=NUM_TRIALS), storage)
        found |= {} if study is None else {f"study, r = {r:g}": study}
    return found, {name: evaluator.best_launches_us(one.assignment) for name, one in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.finalists", description=__doc__)
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--loads", default="decode=64,prefill=4096", metavar="A=TOKENS", help="(default: %(default)s)")
    parser.add_argument("--budget-bits", type=float, default=4.25, metavar="BITS", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an existing folder")
    arguments = parser.parse_args(argv)
    try:
        shape = model(arguments.model)
        trace = {
            layer: log_normal(shape.num_experts, TRACED_TOKENS, shape.top_k, layer) for layer in range(arguments.layers)
        }
        loads = loads_of(arguments.loads, trace, shape)
        offered = [schemes.parse(name) for name in SCHEMES.split(",")]
        storage = f"sqlite:///{(arguments.out / 'study.db').absolute()}"
        found, launches = finalists(shape, trace, loads, offered, arguments.budget_bits, storage)
        write_trace(trace, arguments.out / "trace.json")
        write_json(arguments.out / "finalists.json", {name: one.to_json() for name, one in found.items()})
        write_json(arguments.out / "predicted.json", launches, indent=1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, one in found.items():
        us = ", ".join(f"{scenario} {value:.1f} us" for scenario, value in (launches[name] or {}).items())
        print(f"{name}: {one.avg_weight_bits:.3f} bits, loss {one.predicted_loss:.5g}, {us}")
    return 0


if __name__ == "__main__":
    sys.exit(interruptible(main))
