"""Budgets that hold in every layer, and nothing that joins layers: one small problem a layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from allocator.core import Found
from allocator.dual import Dual
from allocator.launches import LaunchOracle
from allocator.problem import Ints, Problem, Resource
from allocator.solver import Effort, Outcome, solve, solve_launches


def separable(problem: Problem, oracle: LaunchOracle | None) -> Ints | None:
    """The segments int64 [B] when every limit holds in a segment and no launch has items of two; else None."""
    segments = [resource.segment for resource in problem.resources]
    first = segments[0]
    if first is None or any(other is None or not np.array_equal(other, first) for other in segments[1:]):
        return None
    if oracle is not None:
        segment_of_launch = np.zeros(oracle.num_launches, dtype=np.int64)
        segment_of_launch[oracle.launch] = first
        if (segment_of_launch[oracle.launch] != first).any():
            return None
    return first


def solve_segments(problem: Problem, segment: Ints, oracle: LaunchOracle | None, effort: Effort) -> Outcome:
    """Solves each segment by itself; costs, bounds and prices are put together."""
    assignment = np.zeros(problem.num_items, dtype=np.int64)
    cost, bound, complete = 0.0, 0.0, True
    prices = np.zeros(problem.num_limits)
    count = int(segment.max()) + 1
    effort = replace(effort, milp_seconds=max(effort.milp_seconds / count, 1.0))
    for i in range(count):
        items = np.flatnonzero(segment == i)
        part = _part(problem, items, i)
        outcome = solve(part, effort) if oracle is None else solve_launches(part, _part_oracle(oracle, items), effort)
        if outcome.found.assignment is None or outcome.dual is None:
            return Outcome(found=replace(outcome.found, cost=np.inf), dual=outcome.dual)
        assignment[items] = outcome.found.assignment
        cost, bound = cost + outcome.found.cost, bound + outcome.found.bound
        complete = complete and outcome.found.complete
        for (_, place), price in zip(problem.slots(), outcome.dual.prices, strict=True):
            prices[place.start + i] = price
    found = Found(assignment=assignment, cost=problem.cost_of(assignment), bound=min(bound, cost), complete=complete)
    return Outcome(found=found, dual=Dual(bound=found.bound, prices=prices, mixture=(), cuts=()))


def _part(problem: Problem, items: Ints, i: int) -> Problem:
    resources = tuple(
        Resource(name=r.name, amount=np.ascontiguousarray(r.amount[:, items]), limit=r.limit[i : i + 1])
        for r in problem.resources
    )
    return replace(problem, cost=np.ascontiguousarray(problem.cost[:, items]), resources=resources)


def _part_oracle(oracle: LaunchOracle, items: Ints) -> LaunchOracle:
    launches, launch = np.unique(oracle.launch[items], return_inverse=True)
    return LaunchOracle(
        launch=launch.astype(np.int64).reshape(-1),
        num_launches=int(launches.size),
        most_schemes=oracle.most_schemes,
        num_schemes=oracle.num_schemes,
    )
