"""A trial: parameters -> choice -> values, constraints and attributes, or a pruned trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import optuna
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from allocator.study.evaluate import ERROR_WEIGHTS, Evaluator, Inner
from allocator.study.menu import NUM_RANKS, Choice
from allocator.study.sets import SetSolver
from profiles.errors import SpecError
from profiles.schemes import QuantScheme, parse

LATENCY_WEIGHTS = (1e-4, 1e2)
"""Range of a latency weight: relative loss for one unit of relative latency."""
CAP_FACTORS = (0.5, 1.2)
"""Range of a cap over its limit where a trial's scheme sets are solved for: shares of latency are not launches."""
ERROR_FACTORS = (0.25, 4.0)
SOLVED = "solved"
"""A slot's value: as the solver has it."""
LAUNCH, OWN = INNER_LATENCY = ("launch", "own")
"""Whose kernel the inner problem's latencies are of: the launch's, or each scheme's own best."""
WARM_START = "warm_start"
"""Attribute of a trial that was not sampled: where it is from."""


class Objective(Enum):
    """What is minimised."""

    PRODUCT = "product"  # loss^r * relative latency^(1 - r), MxMoE's for one block (arXiv 2505.05799)
    LOSS = "loss"  # under the budget's latency limits
    BOTH = "both"  # the front of loss and relative latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The objective; loss_weight is its r, from 0 to 1."""

    objective: Objective = Objective.PRODUCT
    loss_weight: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.loss_weight <= 1:
            raise SpecError(f"the loss weight must be from 0 to 1, not {self.loss_weight}")

    def values(self, loss: float, relative_latency: float) -> tuple[float, ...]:
        """What Optuna minimises. SpecError: a product of a loss that is not positive."""
        if self.objective is Objective.LOSS:
            return (loss,)
        if self.objective is Objective.BOTH:
            return loss, relative_latency
        if loss <= 0:
            raise SpecError(f"a product needs a positive loss, an assignment has {loss:g}: use --objective both")
        return (float(loss**self.loss_weight * relative_latency ** (1 - self.loss_weight)),)


def sample(trial: BaseTrial, solver: SetSolver) -> Choice:
    """A legal choice from a trial's parameters, the same for the same parameters.

    A slot names a scheme, or leaves it to the set that the solver finds for the trial's latency weights; a kernel is
    one of the ranked configurations, or left to be priced.
    """
    evaluator = solver.evaluator
    menu, problem = evaluator.menu, evaluator.problem
    weights = {
        name: trial.suggest_float(f"latency_weight.{name}", *LATENCY_WEIGHTS, log=True) for name in problem.scenarios
    }
    caps = {
        name: limit * trial.suggest_float(_cap_name(name), *CAP_FACTORS, log=True)
        for name, limit in problem.budget.max_latency_us.items()
    }
    own_kernels = trial.suggest_categorical("inner_latency", INNER_LATENCY) == OWN
    compiled, configs = {}, {}
    for kind in problem.kinds:
        names = [SOLVED, *(scheme.name for scheme in menu.schemes[kind.linear])]
        slots = [trial.suggest_categorical(name, names) for name in _slot_names(evaluator, kind.linear)]
        compiled[kind.linear] = menu.compatible(kind, _schemes(slots, solver, kind.linear, weights, caps))
        for scenario in problem.scenarios:
            rank = trial.suggest_int(_rank_name(kind.linear, scenario), 0, NUM_RANKS)
            if rank > 0:
                configs[kind.linear, scenario] = menu.config(kind, scenario, compiled[kind.linear], rank - 1)
    errors = {}
    if (
        problem.is_corrected
    ):  # where losses add up, the inner problem's sum is the outer loss, and a factor of 1 is best
        errors = {name: trial.suggest_float(f"error_weight.{name}", *ERROR_FACTORS, log=True) for name in ERROR_WEIGHTS}
    return evaluator.settle(
        Choice(
            compiled=compiled,
            configs=configs,
            latency_weights=weights,
            latency_caps_us=caps,
            own_kernels=own_kernels,
            error_weights=errors,
        )
    )


def _schemes(
    slots: list[str], solver: SetSolver, linear: str, weights: Mapping[str, float], caps: Mapping[str, float]
) -> list[QuantScheme]:
    """What the slots name."""
    if SOLVED not in slots:
        return [parse(name) for name in slots]
    solved = solver.solved(weights, caps)[linear]
    schemes = [
        parse(name) if name != SOLVED else solved[i] if i < len(solved) else None for i, name in enumerate(slots)
    ]
    return [scheme for scheme in schemes if scheme is not None] or [solved[0]]


def params_of(choice: Choice, solver: SetSolver) -> dict[str, Any]:
    """Parameters that `sample` makes this choice of."""
    evaluator = solver.evaluator
    solved = solver.solved(choice.latency_weights, choice.latency_caps_us)
    params: dict[str, Any] = {f"latency_weight.{name}": weight for name, weight in choice.latency_weights.items()}
    for name, limit in evaluator.problem.budget.max_latency_us.items():
        params[_cap_name(name)] = float(np.clip(choice.latency_caps_us.get(name, limit) / limit, *CAP_FACTORS))
    params["inner_latency"] = OWN if choice.own_kernels else LAUNCH
    for kind in evaluator.problem.kinds:
        held = choice.compiled[kind.linear]
        is_solved = held == solved[kind.linear]
        for i, name in enumerate(_slot_names(evaluator, kind.linear)):
            params[name] = SOLVED if is_solved else held[min(i, len(held) - 1)].name
        for scenario in evaluator.problem.scenarios:
            config = choice.configs.get((kind.linear, scenario))
            rank = 0 if config is None else 1 + evaluator.menu.rank(kind, scenario, held, config)
            params[_rank_name(kind.linear, scenario)] = rank
    if evaluator.problem.is_corrected:
        params |= {f"error_weight.{name}": choice.error_weights.get(name, 1.0) for name in ERROR_WEIGHTS}
    return params


def _slot_names(evaluator: Evaluator, linear: str) -> list[str]:
    menu = evaluator.menu
    return [f"{linear}.scheme{i}" for i in range(min(menu.max_schemes, len(menu.schemes[linear])))]


def _cap_name(scenario: str) -> str:
    return f"latency_cap.{scenario}"


def _rank_name(linear: str, scenario: str) -> str:
    return f"{linear}.{scenario}.kernel"


def run_trial(trial: Trial, solver: SetSolver, goal: Goal) -> tuple[float, ...]:
    """Optuna's objective function."""
    evaluator = solver.evaluator
    choice, inner = evaluator.solve_within_limits(sample(trial, solver))
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


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a finished trial holds every constraint."""
    return all(value <= 0 for value in trial.constraints.values())
