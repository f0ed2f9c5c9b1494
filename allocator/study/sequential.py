"""The sequential pipeline: best kernel per scheme first, bits second. What a study is compared with, and begins at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from allocator.arrays import InfeasibleError
from allocator.front import solve_product
from allocator.problem import Ints
from allocator.study.evaluate import INNER_EFFORT, Evaluator
from allocator.study.menu import Choice
from allocator.study.objective import LATENCY_WEIGHTS, Goal, Objective
from allocator.study.problem import LaunchKind
from allocator.study.sets import SetSolver
from profiles.kernels import KernelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A choice and an assignment, priced as launches. value: the goal's first, inf where a limit is broken."""

    choice: Choice
    assignment: Ints
    latency_us: Mapping[str, float]
    loss: float
    avg_bits: float
    value: float


def judge(evaluator: Evaluator, goal: Goal, choice: Choice, assignment: Ints) -> Judged:
    """An assignment under a choice's kernels."""
    problem = evaluator.problem
    latency = {name: evaluator.launches_us(choice, assignment, name) for name in problem.scenarios}
    loss = problem.corrected_loss(assignment)
    bits = float(np.average(problem.bits[np.arange(len(assignment)), assignment], weights=problem.sizes))
    holds = all(latency[name] <= limit for name, limit in problem.budget.max_latency_us.items())
    value = np.inf
    if holds and bits <= problem.avg_bits * (1 + 1e-12):
        value = goal.values(loss, evaluator.relative_latency(latency))[0]
    return Judged(
        choice=choice, assignment=assignment, latency_us=latency, loss=loss, avg_bits=bits, value=float(value)
    )


def one_pass(solver: SetSolver, goal: Goal) -> Judged | None:
    """The exact least of the additive goal within the additive limits, once; None where it has no launches.

    Where its launches then take more than the limits, its value is inf. Raises InfeasibleError: no assignment holds the
    limits' shares.
    """
    problem = solver.evaluator.problem
    if goal.objective is Objective.LOSS:
        found = solver.within(problem.budget.max_latency_us)
        return _as_launches(solver, goal, found, dict.fromkeys(problem.scenarios, 0.0))
    price = corner_price(solver, goal.loss_weight)
    return swept(solver, goal, [dict.fromkeys(problem.scenarios, price)])


def corner_price(solver: SetSolver, r: float) -> float:
    """What latency weighs where loss^r * latency^(1-r) of the additive problem is least; as much as it may where loss
    weighs nothing. Raises InfeasibleError: no assignment holds the bits.
    """
    evaluator, problem, table = solver.evaluator, solver.evaluator.problem, solver.table
    corner = solve_product(
        table.loss,
        problem.bits,
        latency_us=table.relative_latency.sum(axis=2),
        loss_weight=r,
        avg_bits=problem.bits_limit,
        sizes=problem.sizes,
        effort=INNER_EFFORT,
    )
    if r == 0:
        return LATENCY_WEIGHTS[1]
    loss = float(table.loss[np.arange(len(problem.ids)), corner.solution.assignment].sum())
    return (1 - r) / r * loss / corner.latency_us / evaluator.reference_loss


def prices_of(evaluator: Evaluator, goal: Goal, number: int) -> list[dict[str, float]]:
    """Prices of latency to try: of a product on a grid, the same for every load; within limits drawn for each load, for
    one price cannot hold several.
    """
    names = evaluator.problem.scenarios
    if goal.objective is not Objective.LOSS:
        return [dict.fromkeys(names, price) for price in np.geomspace(*LATENCY_WEIGHTS, number).tolist()]
    low, high = np.log(LATENCY_WEIGHTS)
    drawn = np.exp(np.random.default_rng(0).uniform(low, high, (number, len(names))))
    return [dict(zip(names, row, strict=True)) for row in drawn.tolist()]


def swept(solver: SetSolver, goal: Goal, prices: Iterable[Mapping[str, float]]) -> Judged | None:
    """An exact solve for each set of prices, of which the one is kept whose launches are best; None where none of them
    has launches at all.

    As many schemes a linear as a launch may hold, chosen by the solver; a launch then runs with the fastest of its
    schemes' own kernels that holds them all, each priced as a launch.
    """
    best: Judged | None = None
    for weights in prices:
        try:
            assignment = solver.assign(solver.cost(weights), solver.evaluator.problem.bits_limit)
        except InfeasibleError:
            return None  # the bits cannot be held, whatever latency is worth
        found = _as_launches(solver, goal, assignment, weights)
        if found is not None and (best is None or found.value < best.value):
            best = found
    return best


def _as_launches(solver: SetSolver, goal: Goal, assignment: Ints, weights: Mapping[str, float]) -> Judged | None:
    """None: no kernel holds some linear's schemes together."""
    problem, compiled = solver.evaluator.problem, solver.compiled(assignment)
    for kind in problem.kinds:
        used = {problem.schemes[column] for column in np.unique(assignment[kind.rows.ravel()])}
        if not used <= set(compiled[kind.linear]):
            return None
    choice = Choice(compiled=compiled, configs={}, latency_weights=weights, own_kernels=True)
    return judge(solver.evaluator, goal, _own_kernels(solver, choice, assignment), assignment)


def _own_kernels(solver: SetSolver, choice: Choice, assignment: Ints) -> Choice:
    """Each launch with the fastest of its schemes' own kernels that holds them all; without one, the fastest legal."""
    evaluator, configs = solver.evaluator, {}
    for kind in evaluator.problem.kinds:
        held = choice.compiled[kind.linear]
        legal = evaluator.menu.legal_configs(kind, held)
        for scenario in evaluator.problem.scenarios:
            own = {solver.table.configs[kind.linear, scenario, scheme] for scheme in held} & set(legal)
            tried = {
                config: evaluator.launches_us(_with(choice, kind, scenario, config), assignment, scenario, kind)
                for config in sorted(own, key=lambda config: config.name)
            }
            fallback = evaluator.menu.config(kind, scenario, held, 0)
            configs[kind.linear, scenario] = min(tried, key=lambda config: tried[config]) if tried else fallback
    return replace(choice, configs=configs)


def _with(choice: Choice, kind: LaunchKind, scenario: str, config: KernelConfig) -> Choice:
    return replace(choice, configs={**choice.configs, (kind.linear, scenario): config})
