"""Which method suits a problem's limits."""

from __future__ import annotations

from allocator.launches import LaunchOracle
from allocator.mixed import solve_mixed
from allocator.problem import Problem
from allocator.segments import separable, solve_segments
from allocator.solver import Effort, Outcome, solve, solve_launches


def solve_any(problem: Problem, oracle: LaunchOracle | None, effort: Effort) -> Outcome:
    """Layers one by one where nothing joins them; else with few or many limits; with at most k schemes a launch."""
    segment = separable(problem, oracle)
    if segment is not None:
        return solve_segments(problem, segment, oracle, effort)
    if oracle is not None:
        return solve_launches(problem, oracle, effort)
    own = [resource for resource in problem.resources if resource.segment is not None and resource.limit.size > 4]
    return solve_mixed(problem, own[0], effort) if len(own) == 1 else solve(problem, effort)
