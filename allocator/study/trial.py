"""A trial: a sampled choice, solved, priced and recorded; or pruned, when it can no longer win."""

from __future__ import annotations

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from allocator.study.assigned import assigned
from allocator.study.evaluate import Evaluator, Inner
from allocator.study.menu import Choice
from allocator.study.objective import Goal, Objective, is_feasible, sample
from allocator.study.sets import SetSolver


def run_trial(trial: Trial, solver: SetSolver, goal: Goal) -> tuple[float, ...]:
    """Optuna's objective function."""
    evaluator = solver.evaluator
    choice, inner = assigned(evaluator, sample(trial, solver), goal)
    _record(trial, evaluator, choice, inner)
    latency: dict[str, float] = {}
    for step, scenario in enumerate(evaluator.problem.scenarios):
        _prune(trial, evaluator, goal, inner, latency, step)
        latency[scenario] = evaluator.launches_us(choice, inner.assignment, scenario)
        trial.set_user_attr(f"latency_us[{scenario}]", latency[scenario])
        limit = evaluator.problem.budget.max_latency_us.get(scenario)
        if limit is not None:
            trial.set_constraint(f"max_latency_us[{scenario}]", latency[scenario] - limit)
    relative = evaluator.relative_latency(latency)
    trial.set_user_attr("relative_latency", relative)
    return goal.values(inner.loss, relative)


def _record(trial: Trial, evaluator: Evaluator, choice: Choice, inner: Inner) -> None:
    trial.set_constraint("avg_bits", inner.excess_bits)
    attributes = {
        "avg_bits": inner.avg_bits,
        "loss": inner.loss,
        "inner_objective": inner.objective,
        "bound": inner.bound,
        "gap": inner.gap,
        "schemes": {linear: [scheme.name for scheme in held] for linear, held in choice.compiled.items()},
        "kernels": {f"{linear}, {scenario}": config.name for (linear, scenario), config in choice.configs.items()},
    }
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def _prune(trial: Trial, evaluator: Evaluator, goal: Goal, inner: Inner, latency: dict[str, float], step: int) -> None:
    """Report what the value is at least, scenarios not yet priced at nothing; stop if that decides."""
    if goal.objective is Objective.BOTH:
        return  # Optuna has no intermediate values of several objectives
    known = sum(us / evaluator.fastest_uniform_us[name] for name, us in latency.items())
    least = goal.values(inner.loss, known / len(evaluator.problem.scenarios))[0]
    trial.report(least, step)
    if trial.should_prune():
        raise optuna.TrialPruned


class BoundPruner(optuna.pruners.BasePruner):
    """Stops a trial whose reported value is a lower bound that reaches the best feasible trial's value: such a trial
    cannot win.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the bound decides."""
        step = trial.last_step
        if step is None:
            return False
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = min((other.value for other in done if is_feasible(other) and other.value is not None), default=np.inf)
        return bool(trial.intermediate_values[step] >= best)
