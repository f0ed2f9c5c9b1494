"""First trials: the sequential pipeline's answers, uniform schemes that the budget admits, and Lagrangian breakpoints
of the additive problem, in which every scheme has its own best kernel.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from allocator.arrays import InfeasibleError, solve_arrays
from allocator.front import pareto_front
from allocator.study import sequential
from allocator.study.evaluate import INNER_EFFORT
from allocator.study.menu import Choice
from allocator.study.objective import LATENCY_WEIGHTS, Goal, Objective
from allocator.study.sets import Sets, SetSolver

MOST_UNIFORM = 4
LOSS_WEIGHTS = (0.9, 0.75, 0.5, 0.25)
FRONT_POINTS = 4
AROUND = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 0.7, 0.5)
CAPS = (0.9, 0.75, 0.6)
SEQUENTIAL = "sequential pipeline"


def choices(solver: SetSolver, goal: Goal, num_prices: int) -> dict[str, Choice]:
    """The first trials by name, without repetition; kernels are left to be priced, but for those of the sequential
    pipeline's own answers: a study is never worse than these.

    num_prices: of latency, for which the sequential pipeline is solved; its best is one trial.
    """
    r = goal.loss_weight
    around = near_corner(solver, r) if goal.objective is Objective.PRODUCT and 0 < r < 1 else {}
    found = in_sequence(solver, goal, num_prices) | at_limits(solver) | around | breakpoints(solver) | uniforms(solver)
    seen: set[str] = set()
    kept = {}
    for name, choice in found.items():
        text = repr((choice.compiled, choice.latency_weights, choice.latency_caps_us, choice.own_kernels, choice.start))
        if text not in seen:
            kept[name] = choice
        seen.add(text)
    return kept


def in_sequence(solver: SetSolver, goal: Goal, num_prices: int) -> dict[str, Choice]:
    """What the sequential pipeline ends at, once and with a price of latency a solve; with its own assignments."""
    found = {}
    prices = sequential.prices_of(solver.evaluator, goal, num_prices)
    makers = {
        SEQUENTIAL: partial(sequential.one_pass, solver, goal),
        f"{SEQUENTIAL}, {num_prices} prices of latency": partial(sequential.swept, solver, goal, prices),
    }
    for name, make in makers.items():
        try:
            judged = make()
        except InfeasibleError:
            continue
        if judged is not None:
            weights = {name: _clipped(weight) for name, weight in judged.choice.latency_weights.items()}
            start = tuple(judged.assignment.tolist())
            found[name] = replace(judged.choice, latency_weights=weights, start=start)
    return found


def at_limits(solver: SetSolver) -> dict[str, Choice]:
    """Scheme sets of least loss where shares of latency may add up to more or less than the budget's limits."""
    limits = solver.evaluator.problem.budget.max_latency_us
    least = dict.fromkeys(solver.evaluator.problem.scenarios, LATENCY_WEIGHTS[0])
    found = {}
    for factor in CAPS if limits else ():
        caps = {name: factor * limit for name, limit in limits.items()}
        begun = _choice(solver, solver.solved(least, caps), LATENCY_WEIGHTS[0])
        found[f"limits times {factor:g}"] = replace(begun, latency_caps_us=caps)
        found[f"limits times {factor:g}, own kernels"] = replace(begun, latency_caps_us=caps, own_kernels=True)
    return found


def uniforms(solver: SetSolver) -> dict[str, Choice]:
    """One scheme for all linears, those of least loss within the average bits; if there are none, the leanest."""
    problem, menu = solver.evaluator.problem, solver.evaluator.menu
    offered = [s for s in problem.schemes if all(s in held for held in menu.schemes.values())]
    columns = [problem.schemes.index(scheme) for scheme in offered]
    bits = [float(np.average(problem.bits[:, column], weights=problem.sizes)) for column in columns]
    fits = [i for i in range(len(offered)) if bits[i] <= problem.avg_bits * (1 + 1e-12)]
    fits = sorted(fits, key=lambda i: float(problem.loss[:, columns[i]].sum()))[:MOST_UNIFORM]
    if not fits and offered:
        fits = [int(np.argmin(bits))]
    found = {}
    for scheme in (offered[i] for i in fits):
        found[f"uniform {scheme.name}"] = _choice(
            solver, {kind.linear: (scheme,) for kind in problem.kinds}, LATENCY_WEIGHTS[0]
        )
    return found


def near_corner(solver: SetSolver, r: float) -> dict[str, Choice]:
    """Scheme sets at the price of latency of the additive product's corner, and at multiples of it: shared kernels and
    skewed loads move the launches' corner away from it.
    """
    price = _corner_price(solver, r)
    found: dict[str, Choice] = {}
    for factor in AROUND if price is not None else ():
        assert price is not None
        weight = _clipped(price * factor)
        weights = dict.fromkeys(solver.evaluator.problem.scenarios, weight)
        choice = _choice(solver, solver.solved(weights), weight)
        found[f"price times {factor:g}, own kernels"] = replace(choice, own_kernels=True)
    return found


def _corner_price(solver: SetSolver, r: float) -> float | None:
    """`sequential.corner_price` for r between 0 and 1; None: no such corner."""
    try:
        price = sequential.corner_price(solver, r)
    except InfeasibleError:
        return None
    return price if price > 0 else None  # a loss of 0 has none


def breakpoints(solver: SetSolver) -> dict[str, Choice]:
    """Scheme sets and multipliers of the additive problem's corners: products of loss and latency, and fewer bits."""
    problem, table = solver.evaluator.problem, solver.table
    common: dict[str, Any] = {"sizes": problem.sizes, "effort": INNER_EFFORT}
    found: dict[str, Choice] = {}
    try:
        front = pareto_front(table.loss, problem.bits, num_points=FRONT_POINTS, **common)
        plain = solve_arrays(table.loss, problem.bits, avg_bits=problem.bits_limit, **common)
    except InfeasibleError:
        return found
    if plain.loss > 0:
        for r in LOSS_WEIGHTS:
            price = _corner_price(solver, r)
            if price is None:
                continue
            weight = _clipped(price)
            choice = _choice(solver, solver.solved(dict.fromkeys(problem.scenarios, weight)), weight)
            found[f"product, r = {r:g}"] = choice
            found[f"product, r = {r:g}, own kernels"] = replace(choice, own_kernels=True)
    least = dict.fromkeys(problem.scenarios, LATENCY_WEIGHTS[0])
    found["least loss"] = _choice(solver, solver.solved(least), LATENCY_WEIGHTS[0])
    for point in front:
        if point.avg_bits < problem.bits_limit * (1 - 1e-3):
            try:
                assignment = solver.assign(solver.cost(least), point.avg_bits * (1 + 1e-9))
            except InfeasibleError:
                continue  # so few bits take more schemes than a launch may hold
            found[f"front, {point.avg_bits:.3f} bits"] = _choice(
                solver, solver.compiled(assignment), LATENCY_WEIGHTS[0]
            )
    return found


def _choice(solver: SetSolver, compiled: Sets, weight: float) -> Choice:
    weights = dict.fromkeys(solver.evaluator.problem.scenarios, weight)
    return Choice(compiled=compiled, configs={}, latency_weights=weights)


def _clipped(weight: float) -> float:
    return float(np.clip(weight, *LATENCY_WEIGHTS))
