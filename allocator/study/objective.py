"""A trial: parameters -> choice -> values, constraints and attributes, or a pruned trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from optuna.trial import BaseTrial, FrozenTrial

from allocator.study.evaluate import ERROR_WEIGHTS, Evaluator
from allocator.study.menu import MOST_RANKS, Choice
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
CAPS, PRICES = LIMITS_BY = ("caps", "prices")
"""What holds the inner problem within the budget's latency limits."""
WARM_START, START = "warm_start", "start"
"""Attributes of a trial that was not sampled: where it is from, and an assignment to be judged with it."""


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
    capped = bool(problem.budget.max_latency_us) and trial.suggest_categorical("limits_by", LIMITS_BY) == CAPS
    factors = {
        name: trial.suggest_float(_cap_name(name), *CAP_FACTORS, log=True) for name in problem.budget.max_latency_us
    }
    caps = {name: problem.budget.max_latency_us[name] * factor for name, factor in factors.items()} if capped else {}
    own_kernels = trial.suggest_categorical("inner_latency", INNER_LATENCY) == OWN
    compiled, configs = {}, {}
    for kind in problem.kinds:
        names = [SOLVED, *(scheme.name for scheme in menu.schemes[kind.linear])]
        slots = [trial.suggest_categorical(name, names) for name in _slot_names(evaluator, kind.linear)]
        compiled[kind.linear] = menu.compatible(kind, _schemes(slots, solver, kind.linear, weights, caps))
        for scenario in problem.scenarios:
            rank = trial.suggest_int(_rank_name(kind.linear, scenario), 0, MOST_RANKS)
            if rank > 0:
                configs[kind.linear, scenario] = menu.config(kind, scenario, compiled[kind.linear], rank - 1)
    start = trial.user_attrs.get(START)
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
            start=None if start is None else tuple(start),
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
    if evaluator.problem.budget.max_latency_us:
        params["limits_by"] = CAPS if choice.latency_caps_us else PRICES
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


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether a finished trial holds every constraint."""
    return all(value <= 0 for value in trial.constraints.values())
