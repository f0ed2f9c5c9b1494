"""The solver's steps in order: reach, dual, rounding, core, HiGHS. Works on a Problem; solve_arrays is its face."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from allocator.core import Found, search
from allocator.dual import Dual, Unreachable, independent, maximise, reach
from allocator.integer import finish, finish_launches
from allocator.launches import LaunchOracle
from allocator.primal import fill, first_solution
from allocator.problem import Problem

_CORE_LIMITS = 6  # state lists need few dimensions; with more limits than this HiGHS closes the gap alone
_MOST_PASSES = 3
_MOST_RESETTLED = 6
_MOST_LAUNCH_VARIABLES = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far to go. Up to small_items items the gap is to be closed; larger instances stop at good_gap.

    narrow, wide: (states, items) of the core's search, the quick pass and the thorough one. Seconds bound HiGHS alone;
    they are reached on hard instances only, and are then the one thing that makes the result depend on the machine.
    """

    good_gap: float = 1e-5
    small_items: int = 3000
    narrow: tuple[int, int] = (4_000, 150)
    wide: tuple[int, int] = (20_000, 200)
    milp_variables: int = 20_000
    milp_seconds: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """found.assignment is None when nothing fits (found.complete: proven); dual is None when even mixtures cannot reach
    the limits.
    """

    found: Found
    dual: Dual | None


def nothing() -> Outcome:
    """Proven infeasible."""
    return Outcome(found=Found(assignment=None, cost=np.inf, bound=np.inf, complete=True), dual=None)


def relative_gap(problem: Problem, found: Found) -> float:
    """(loss - bound) / max(|loss|, |bound|) in the caller's units; 0 when they are equal."""
    loss, bound = problem.loss_of(found.cost), problem.loss_of(found.bound)
    if loss <= bound:
        return 0.0
    return (loss - bound) / max(abs(loss), abs(bound))


def solve(problem: Problem, effort: Effort) -> Outcome:
    """Every item for itself under the problem's limits."""
    seeds = reach(problem, independent)
    if isinstance(seeds, Unreachable):
        return nothing()
    dual = maximise(problem, independent, seeds)
    incumbent = first_solution(problem, dual)
    cost = np.inf if incumbent is None else problem.cost_of(incumbent)
    found = Found(assignment=incumbent, cost=cost, bound=min(problem.lift(dual.bound), cost), complete=False)
    found = _deepen(problem, dual, found, effort.narrow, effort)
    found = close(problem, dual, found, effort.milp_seconds / 4, effort)
    found = _deepen(problem, dual, found, effort.wide, effort)
    found = close(problem, dual, found, effort.milp_seconds, effort)
    return Outcome(found=found, dual=dual)


def close(problem: Problem, dual: Dual, found: Found, seconds: float, effort: Effort) -> Found:
    """HiGHS, on instances that are small enough and still open."""
    if found.complete or found.cost <= found.bound or problem.num_items > effort.small_items:
        return found
    return finish(problem, dual, found, most_variables=effort.milp_variables, seconds=seconds)


def _done(problem: Problem, found: Found, effort: Effort) -> bool:
    if found.complete or found.cost <= found.bound:
        return True
    return problem.num_items > effort.small_items and relative_gap(problem, found) <= effort.good_gap


def _deepen(problem: Problem, dual: Dual, found: Found, breadth: tuple[int, int], effort: Effort) -> Found:
    """Search the core again as long as a better incumbent makes it smaller."""
    if problem.num_limits > _CORE_LIMITS:
        return found
    for _ in range(_MOST_PASSES):
        if _done(problem, found, effort):
            return found
        keep = 0.0
        if problem.num_items > effort.small_items and found.assignment is not None:
            keep = effort.good_gap * abs(problem.loss_of(found.cost)) / problem.scale
        states, items = breadth
        again = search(problem, dual, found.assignment, most_states=states, most_items=items, keep_gap=keep)
        assignment = again.assignment
        if assignment is not None and not again.complete:
            assignment = fill(problem, assignment, dual.prices)
        cost = np.inf if assignment is None else problem.cost_of(assignment)
        better = cost < found.cost
        bound = min(max(again.bound, found.bound), cost)
        found = Found(assignment=assignment, cost=cost, bound=bound, complete=again.complete)
        if not better:
            break
    return found


def solve_launches(problem: Problem, oracle: LaunchOracle, effort: Effort) -> Outcome:
    """With at most k schemes a launch: the dual over subsets bounds; settled subsets are solved as above, then chosen
    again at the prices found, until they repeat.
    """
    free = solve(problem, effort)
    if free.found.assignment is None or oracle.holds(free.found.assignment):
        return free
    seeds = reach(problem, oracle)
    if isinstance(seeds, Unreachable):
        return nothing()
    dual = maximise(problem, oracle, seeds)
    best = Found(assignment=None, cost=np.inf, bound=max(dual.bound, free.found.bound), complete=False)
    quick = replace(effort, milp_seconds=effort.milp_seconds / _MOST_RESETTLED / 2)
    tried: set[bytes] = set()
    for admitted in (oracle.round_mixture(dual), oracle.choose(problem.priced(dual.prices))[1]):
        for _ in range(_MOST_RESETTLED):
            if admitted.tobytes() in tried:
                break
            tried.add(admitted.tobytes())
            outcome = solve(oracle.restrict(problem, admitted), quick)
            found = outcome.found
            if outcome.dual is None or found.assignment is None:
                break
            if found.cost < best.cost:
                best = replace(found, bound=min(best.bound, found.cost), complete=found.cost <= best.bound)
            admitted = oracle.choose(problem.priced(outcome.dual.prices))[1]
    if not best.complete:
        variables = min(effort.milp_variables, _MOST_LAUNCH_VARIABLES)
        best = finish_launches(problem, oracle, best, most_variables=variables, seconds=effort.milp_seconds)
    return Outcome(found=best, dual=dual)
