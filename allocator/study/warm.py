"""First trials: the uniform schemes that the budget admits, and the Lagrangian breakpoints of the additive problem, in
which every scheme has its own best kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from allocator.arrays import InfeasibleError, solve_arrays
from allocator.front import pareto_front, solve_product
from allocator.study.evaluate import INNER_EFFORT
from allocator.study.menu import Choice
from allocator.study.objective import LATENCY_WEIGHTS
from allocator.study.sets import Sets, SetSolver

MOST_UNIFORM = 4
LOSS_WEIGHTS = (0.9, 0.75, 0.5, 0.25)
FRONT_POINTS = 4
AROUND = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 0.7, 0.5)
CAPS = (0.9, 0.75, 0.6)


def choices(solver: SetSolver, loss_weight: float | None = None) -> dict[str, Choice]:
    """The first trials by name, without repetition of scheme sets at equal weights; kernels are left to be priced.

    loss_weight: the goal's, where it is a product: prices of latency around the one of its own corner come first.
    """
    around = {} if loss_weight is None or not 0 < loss_weight < 1 else near_corner(solver, loss_weight)
    found = at_limits(solver) | around | breakpoints(solver) | uniforms(solver)
    seen: set[str] = set()
    kept = {}
    for name, choice in found.items():
        text = repr((choice.compiled, choice.latency_weights, choice.latency_caps_us, choice.own_kernels))
        if text not in seen:
            kept[name] = choice
        seen.add(text)
    return kept


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
    """What latency weighs where loss^r * latency^(1-r) of the additive problem is least; None: no such corner."""
    evaluator, problem, table = solver.evaluator, solver.evaluator.problem, solver.table
    try:
        corner = solve_product(
            table.loss,
            problem.bits,
            latency_us=table.relative_latency.sum(axis=2),
            loss_weight=r,
            avg_bits=problem.bits_limit,
            sizes=problem.sizes,
            effort=INNER_EFFORT,
        )
    except InfeasibleError:
        return None
    loss = float(table.loss[np.arange(len(problem.ids)), corner.solution.assignment].sum())
    return (1 - r) / r * loss / corner.latency_us / evaluator.reference_loss if loss > 0 else None


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
