"""`python -m allocator.study`: schemes, kernels and their trade-off together, in a study that can be stopped."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from allocator.allocation import Allocation
from allocator.arrays import InfeasibleError
from allocator.budget import Budget
from allocator.command import check_outputs
from allocator.extras import require_study
from allocator.sensitivity import Sensitivity
from allocator.study.evidence import Evidence
from allocator.study.problem import Problem
from allocator.study.problem import of as problem_of
from costmodel import model_file
from costmodel.table import CostTable
from profiles import schemes
from profiles.errors import SpecError, UserError
from profiles.interrupt import INTERRUPTED, interruptible
from profiles.models import MoeShape, find_model
from profiles.store import ProfileStore

if TYPE_CHECKING:
    import optuna

    from allocator.study.evaluate import Evaluator
    from allocator.study.run import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when the study is done, 2 on a user's mistake (its sentence on stderr), 130 when it
    was interrupted: its trials are kept, the same command goes on.
    """
    arguments = _parser().parse_args(argv)
    try:
        require_study("allocator.study")
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    # Imported here, where what they need is known to be installed.
    import optuna

    from allocator.study import run
    from allocator.study.objective import Goal, Objective
    from allocator.study.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_outputs(arguments, "--out")
    settings = run.Settings(
        goal=Goal(objective=Objective(arguments.objective), loss_weight=arguments.loss_weight),
        num_trials=arguments.trials,
        seed=arguments.seed,
    )
    evaluator = run.evaluator_of(_problem(arguments))
    _require_bits(evaluator)
    with open_storage(arguments.storage or f"sqlite:///{arguments.out.absolute().with_suffix('.db')}") as storage:
        try:
            study = run.run(evaluator, settings, storage, on_trial=None if arguments.quiet else _show)
            code = 0
        except KeyboardInterrupt:
            study, code = run.open_study(evaluator.problem, settings.goal, storage), INTERRUPTED
            print(
                f"stopped with {run.num_done(study)} of {settings.num_trials} trials done; the same command goes on",
                file=sys.stderr,
            )
        written = _write(study, evaluator, settings, arguments.out)
        if not written and code == 0:
            over = ", ".join(f"{name} by {above:.4g}" for name, above in run.nearest(study).items())
            raise InfeasibleError(
                f"none of the study's {run.num_done(study)} trials holds every limit"
                + (f"; the nearest is over {over}" if over else "")
                + ": raise a limit by so much, allow more schemes or --trials"
            )
        print(json.dumps(_summary(study, written)) if arguments.json else _report(study, written))
    return code


def _require_bits(evaluator: Evaluator) -> None:
    """InfeasibleError: even the leanest schemes have more bits than the budget."""
    problem = evaluator.problem
    least = float(
        np.average(np.where(np.isfinite(problem.loss), problem.bits, np.inf).min(axis=1), weights=problem.sizes)
    )
    if least > problem.avg_bits * (1 + 1e-12):
        raise InfeasibleError(
            f"the budget cannot be met: avg_bits {problem.avg_bits:g} is {least - problem.avg_bits:.3g} below the least"
            f" possible, {least:g}; raise it to that or allow cheaper schemes"
        )


def _problem(arguments: argparse.Namespace) -> Problem:
    sensitivity = Sensitivity.read(arguments.sensitivity)
    shape = find_model(arguments.model or sensitivity.model)
    budget = Budget(
        avg_weight_bits=arguments.budget_bits,
        max_latency_us={
            name: _number(option, us) for option, name, us in _pairs("--max-latency", arguments.max_latency)
        },
    )
    return problem_of(
        sensitivity,
        shape,
        budget,
        _evidence(arguments, shape),
        schemes=None if arguments.schemes is None else [schemes.parse(name) for name in arguments.schemes.split(",")],
        corrected_loss=None if arguments.additivity is None else _corrected(arguments.additivity, sensitivity, shape),
    )


def _evidence(arguments: argparse.Namespace, shape: MoeShape) -> Evidence:
    scenarios = {name: source for _, name, source in _pairs("--scenario", arguments.scenario)}
    fitted = None if arguments.latency_model is None else model_file.read(arguments.latency_model)
    if arguments.cost is not None:
        if scenarios:
            raise SpecError("--scenario names loads of a profile; a cost table has its own scenarios")
        found = Evidence.from_cost_table(CostTable.read(arguments.cost), shape.name, shape.num_experts)
        return replace(found, latency_model=fitted)
    for path in arguments.profile:
        if not path.is_file():
            raise SpecError(f"--profile {path}: no such file")
    frames = [ProfileStore(path).records() for path in arguments.profile]
    found = Evidence.from_profile(pd.concat(frames, ignore_index=True), shape.name, scenarios or None)
    return replace(found, latency_model=fitted)


def _corrected(path: Path, sensitivity: Sensitivity, shape: MoeShape) -> Any:
    from allocator.extras import require_models

    require_models("allocator.study --additivity")
    from allocator.study.correction import read_correction

    return read_correction(path, sensitivity, shape)


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(option, name, value) of NAME=VALUE texts."""
    pairs: list[tuple[str, str, str]] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise SpecError(f"{option} {text}: expected NAME=VALUE")
        if any(name == known for _, known, _ in pairs):
            raise SpecError(f"{option} {text}: {name} is there twice")
        pairs.append((option, name, value))
    return pairs


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{option} {text}: expected a number of microseconds") from None


def _show(trial: optuna.trial.FrozenTrial) -> None:
    """One line a trial, on stderr."""
    values = " ".join(f"{value:.5g}" for value in trial.values or ())
    attributes = trial.user_attrs
    print(
        f"trial {trial.number} {trial.state.name.lower()} {values}"
        f" ({attributes.get('avg_bits', np.nan):.4f} bits, gap {100 * attributes.get('gap', np.nan):.2g}%)"
        f" {attributes.get('warm_start', '')}".rstrip(),
        file=sys.stderr,
        flush=True,
    )


def _write(
    study: optuna.Study, evaluator: Evaluator, settings: Settings, out: Path
) -> list[tuple[optuna.trial.FrozenTrial, Allocation, Path]]:
    """The best trial's allocation to `out`; of two objectives each of the front's, with the trial's number in its
    name.
    """
    from allocator.study.run import allocation_of, best_trials

    written = []
    for trial in best_trials(study):
        path = out if len(study.directions) == 1 else out.with_stem(f"{out.stem}-{trial.number}")
        allocation = allocation_of(trial, evaluator, settings.goal)
        allocation.write(path)
        written.append((trial, allocation, path))
    return written


def _summary(study: optuna.Study, written: list[tuple[optuna.trial.FrozenTrial, Allocation, Path]]) -> dict[str, Any]:
    from allocator.study.run import num_done

    return {
        "study": study.study_name,
        "trials": num_done(study),
        "best": [
            {
                "trial": trial.number,
                "values": trial.values,
                "out": str(path),
                "avg_weight_bits": allocation.avg_weight_bits,
                "predicted_loss": allocation.predicted_loss,
                "bound": allocation.bound,
                "gap": allocation.gap,
                "predicted_latency_us": dict(allocation.predicted_latency_us),
                "schemes": trial.user_attrs["schemes"],
                "kernels": trial.user_attrs["kernels"],
            }
            for trial, allocation, path in written
        ],
    }


def _report(study: optuna.Study, written: list[tuple[optuna.trial.FrozenTrial, Allocation, Path]]) -> str:
    from allocator.study.run import num_done

    lines = [f"{study.study_name}: {num_done(study)} trials"]
    for trial, allocation, path in written:
        latency = ", ".join(f"{name} {us:.1f} us" for name, us in allocation.predicted_latency_us.items())
        lines += [
            f"trial {trial.number}: loss {allocation.predicted_loss:.6g} at {allocation.avg_weight_bits:.4f} bits,"
            f" {latency}",
            f"  as fast and as small, no allocation of its schemes has a loss below {allocation.bound:.6g}"
            f" (gap {100 * allocation.gap:.2g}%)",
            *(f"  {linear}: {', '.join(names)}" for linear, names in trial.user_attrs["schemes"].items()),
            *(f"  {launch}: {config}" for launch, config in trial.user_attrs["kernels"].items()),
            f"  wrote {path}",
        ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allocator.study",
        description="Choose schemes and kernels together: an Optuna study around the exact solver, priced as launches.",
    )
    add = parser.add_argument
    add("--sensitivity", required=True, type=Path, metavar="FILE", help="losses, Parquet")
    known = parser.add_mutually_exclusive_group(required=True)
    known.add_argument("--profile", nargs="+", type=Path, metavar="FILE", help="a sweep's profiles, Parquet")
    known.add_argument("--cost", type=Path, metavar="FILE", help="a cost table, Parquet; loads are taken as even")
    add(
        "--scenario",
        action="append",
        default=[],
        metavar="NAME=LOAD",
        help="a load of the profile by its source; may be repeated (default: every load of the model)",
    )
    add("--latency-model", type=Path, metavar="FILE", help="prices launches; by costmodel.fit (default: analytic)")
    add("--model", metavar="NAME", help="a known model or a config.json (default: the sensitivity's model)")
    add("--budget-bits", required=True, type=float, metavar="BITS", help="most stored bits per weight, on average")
    add(
        "--max-latency",
        action="append",
        default=[],
        metavar="SCENARIO=US",
        help="most launch-level latency of all layers in a scenario; may be repeated",
    )
    add("--schemes", metavar="A,B", help="schemes that may be used (default: all that have losses)")
    add(
        "--objective",
        choices=("product", "loss", "both"),
        default="product",
        help="loss^r * latency^(1-r); the loss within latency limits; or the front of both (default: %(default)s)",
    )
    add("--loss-weight", type=float, default=0.75, metavar="R", help="r of the product (default: %(default)s)")
    add("--additivity", type=Path, metavar="FILE", help="allocator.additivity's report, whose correction is used")
    add("--trials", type=int, default=100, metavar="N", help="of the whole study (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampler (default: %(default)s)")
    add(
        "--storage",
        metavar="URL",
        help="sqlite:///FILE, postgresql://USER@HOST/DB or grpc://HOST:PORT (default: SQLite beside --out)",
    )
    add("--out", required=True, type=Path, metavar="FILE", help="the allocation, JSON; of a front one file a trial")
    add("--json", action="store_true", help="print the result as one JSON object")
    add("--quiet", action="store_true", help="no line a trial on stderr")
    return parser


if __name__ == "__main__":
    sys.exit(interruptible(main))
