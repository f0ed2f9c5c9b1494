"""`python -m bench.study`: the outer study against the sequential pipeline and against direct search over blocks."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from allocator.arrays import InfeasibleError
from allocator.study import run, sequential
from allocator.study.evaluate import Evaluator
from allocator.study.objective import Goal
from allocator.study.sequential import Judged
from allocator.study.sets import SetSolver
from bench.study_baselines import NOTHING, Outcome, best_uniform, direct, outcome
from bench.study_problem import METRIC, MODEL, SCENARIOS, SETTINGS, Setting, study_evaluator
from profiles.atomic import replacing
from profiles.errors import SpecError, UserError
from profiles.interrupt import interruptible

TIE = 1e-4
"""Relative difference below which values are level: a trial solves to 0.01%."""
Method = Callable[[Evaluator, Goal, int, int], Outcome]
BEGUN = "begun at the sequential result"
LONGER = 5
"""A trial of the study solves the inner problem several times: so many prices take about as long."""
MOST_LAYERS_BEGUN = 1
"""The whole model has thousands of blocks: direct search is run once there, without the head start."""


def outer_study(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    study = run.run(evaluator, run.Settings(goal=goal, num_trials=num_trials, seed=seed))
    trials = run.best_trials(study)
    if not trials:
        return NOTHING
    attributes = trials[0].user_attrs
    return Outcome(
        value=trials[0].values[0],
        loss=attributes["loss"],
        relative_latency=attributes["relative_latency"],
        avg_bits=attributes["avg_bits"],
    )


def _sequential(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return outcome(evaluator, _swept(evaluator, goal, num_trials))


_RESULTS: dict[tuple[str, str, int, int], Judged | None] = {}


def _swept(evaluator: Evaluator, goal: Goal, num_prices: int) -> Judged | None:
    """Kept, since three methods begin where it ends."""
    key = (evaluator.problem.digest, repr(goal), num_prices, evaluator.menu.max_schemes)
    if key not in _RESULTS:
        prices = sequential.prices_of(evaluator, goal, num_prices)
        _RESULTS[key] = sequential.swept(SetSolver(evaluator), goal, prices)
    return _RESULTS[key]


def _sequential_longer(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return outcome(evaluator, _swept(evaluator, goal, LONGER * num_trials))


def _one_pass(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    try:
        return outcome(evaluator, sequential.one_pass(SetSolver(evaluator), goal))
    except InfeasibleError:
        return NOTHING


def _uniform(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return best_uniform(evaluator, goal)


def _tpe(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return direct(evaluator, goal, TPESampler(seed=seed), num_trials)


def _nsga(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return direct(evaluator, goal, NSGAIISampler(seed=seed, population_size=20), num_trials)


def _tpe_on(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return _begun(evaluator, goal, TPESampler(seed=seed), num_trials)


def _nsga_on(evaluator: Evaluator, goal: Goal, num_trials: int, seed: int) -> Outcome:
    return _begun(evaluator, goal, NSGAIISampler(seed=seed, population_size=20), num_trials)


def _begun(evaluator: Evaluator, goal: Goal, sampler: BaseSampler, num_trials: int) -> Outcome:
    found = _swept(evaluator, goal, num_trials)
    if found is None:
        return NOTHING
    return direct(evaluator, goal, sampler, num_trials, (found.choice, found.assignment))


METHODS: dict[str, Method] = {
    "outer study": outer_study,
    "sequential pipeline": _one_pass,
    "sequential pipeline, a price of latency a trial": _sequential,
    f"sequential pipeline, {LONGER} prices of latency a trial": _sequential_longer,
    "TPE over blocks": _tpe,
    "NSGA-II over blocks": _nsga,
    f"TPE over blocks, {BEGUN}": _tpe_on,
    f"NSGA-II over blocks, {BEGUN}": _nsga_on,
    "best uniform scheme": _uniform,
}


def compare(
    layers: int, avg_bits: float, setting: Setting, num_trials: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a method: the median over seeds, which draw the losses and seed the samplers."""
    rows = []
    for name, method in METHODS.items():
        if name.endswith(BEGUN) and layers > MOST_LAYERS_BEGUN:
            continue
        found, seconds = [], []
        for seed in seeds:
            evaluator = study_evaluator(layers, avg_bits, seed, setting)
            started = time.perf_counter()
            found.append(method(evaluator, setting.goal, num_trials, seed))
            seconds.append(time.perf_counter() - started)
            print(
                f"{layers} layers, {name}, seed {seed}: {found[-1]}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True
            )
        medians = {key: float(np.median([asdict(one)[key] for one in found])) for key in asdict(found[0])}
        rows.append(
            {
                "layers": layers,
                "method": name,
                **{key: value if np.isfinite(value) else None for key, value in medians.items()},
                "values": [one.value if np.isfinite(one.value) else None for one in found],
                "seconds": float(np.median(seconds)),
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown, one section an instance."""
    lines = []
    for instance in report["instances"]:
        rows = instance["rows"]
        study = rows[0]["values"]
        lines += [
            f"{instance['layers']} layer(s), {instance['blocks']} blocks, {instance['setting']},"
            f" {instance['trials']} trials, {len(instance['seeds'])} seed(s):",
            "",
            "| method | value | to the study | study ahead, level | loss | relative latency | bits | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            ratios = [
                np.inf if one is None else one / ours for one, ours in zip(row["values"], study, strict=True) if ours
            ]
            ahead, level = sum(ratio > 1 + TIE for ratio in ratios), sum(abs(ratio - 1) <= TIE for ratio in ratios)
            wins = "" if row is rows[0] else f"{ahead}, {level} of {len(study)}"
            if row["value"] is None:
                lines.append(f"| {row['method']} | nothing within the limits | | {wins} | | | | {row['seconds']:.1f} |")
                continue
            worse = f"{100 * (np.median(ratios) - 1):+.2f}%" if ratios else ""
            lines.append(
                f"| {row['method']} | {row['value']:.4f} | {worse} | {wins} | {row['loss']:.4f} |"
                f" {row['relative_latency']:.3f} | {row['avg_bits']:.4f} | {row['seconds']:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 where the study is behind on some seed, 2 on a user's mistake."""
    arguments = _parser().parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", ExperimentalWarning)
    try:
        if not arguments.out.absolute().parent.is_dir():
            raise SpecError(f"--out {arguments.out}: its folder does not exist")
        report: dict[str, Any] = {
            "model": MODEL.name,
            "gpu": "h200",
            "scenarios": SCENARIOS,
            "losses": METRIC,
            "budget_avg_bits": arguments.budget_bits,
            "instances": [],
        }
        for text in arguments.instance:
            layers, trials, seeds = (int(part) for part in text.split(","))
            for name in arguments.setting:
                report["instances"].append(
                    {
                        "layers": layers,
                        "blocks": 2 * layers * MODEL.num_experts,
                        "trials": trials,
                        "seeds": list(range(seeds)),
                        "setting": name,
                        "rows": compare(layers, arguments.budget_bits, SETTINGS[name], trials, range(seeds)),
                    }
                )
                with replacing(arguments.out) as temporary:
                    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    return 0 if _wins(report) else 1


def _wins(report: dict[str, Any]) -> bool:
    """Whether no method is ahead of the study on any seed."""
    for instance in report["instances"]:
        study, *others = (row["values"] for row in instance["rows"])
        for values in others:
            for ours, theirs in zip(study, values, strict=True):
                if theirs is not None and (ours is None or ours > theirs * (1 + TIE)):
                    return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__)
    parser.add_argument("--budget-bits", type=float, default=4.25, metavar="BITS", help="(default: %(default)s)")
    parser.add_argument(
        "--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="(default: all)"
    )
    parser.add_argument(
        "--instance",
        nargs="+",
        default=["1,150,3", f"{MODEL.num_moe_layers},60,1"],
        metavar="LAYERS,TRIALS,SEEDS",
        help="(default: one layer, and the whole model)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the report, JSON")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
