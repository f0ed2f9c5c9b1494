"""HiGHS on what the core leaves open: branch and cut for the instances whose gap the state lists do not close."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from allocator.core import Core, Found, make_core
from allocator.dual import Dual
from allocator.problem import Floats, Ints, Problem

_OBJECTIVE = 1e3  # the gap in HiGHS's units when losses are not whole: its absolute tolerance of 1e-6 is then 1e-9 of the gap
_TIGHTEN = (0.0, 2e-6, 2e-5)  # of the row's scale: HiGHS lets rows pass by 1e-6


def finish(problem: Problem, dual: Dual, found: Found, *, most_variables: int, seconds: float) -> Found:
    """Improve found, and its bound, by mixed-integer programming on the core; found itself when the core is too large."""
    top = problem.ceiling() if found.assignment is None else found.cost
    gap = top - dual.bound
    core = make_core(problem, dual, gap * (1 + 1e-9), problem.num_items)
    sizes = np.array([choices.size for choices in core.choices], dtype=np.int64)
    if gap <= 0 or not sizes.size or sizes.sum() > most_variables:
        return found
    owner = np.repeat(np.arange(sizes.size), sizes)
    items, schemes = core.items[owner], np.concatenate(core.choices)
    objective, unit = _objective(problem, problem.cost[schemes, items] - problem.cost[core.base[items], items], gap)
    base_cost = problem.cost_of(core.base)
    once = LinearConstraint(csr_array(coo_array((np.ones(owner.size), (owner, np.arange(owner.size))))), 1.0, 1.0)
    rows, room = _rows(problem, core, items, schemes)
    for tighten in _TIGHTEN:
        with _quiet():
            result = milp(
                objective,
                constraints=[once, LinearConstraint(csr_array(rows), -np.inf, room - tighten)],
                integrality=np.ones(owner.size, dtype=np.int64),
                bounds=Bounds(0.0, 1.0),
                options={"mip_rel_gap": 0.0, "time_limit": seconds},
            )
        if tighten == 0.0:
            if result.status == 2 and found.assignment is None:
                return Found(assignment=None, cost=np.inf, bound=np.inf, complete=True)
            if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
                below = base_cost + (result.mip_dual_bound - 1e-5) * unit
                found = replace(found, bound=min(max(found.bound, problem.lift(below)), found.cost))
        if result.x is None:
            break
        assignment = core.base.copy()
        chosen = result.x > 0.5
        assignment[items[chosen]] = schemes[chosen]
        if problem.fits(assignment):
            return _better(problem, found, assignment, proven=result.status == 0 and tighten == 0.0)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard output closed to HiGHS, which prints a line there whenever it mends a solution, whatever it is told."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _better(problem: Problem, found: Found, assignment: Ints, *, proven: bool) -> Found:
    cost = problem.cost_of(assignment)
    if cost < found.cost:
        found = Found(assignment=assignment, cost=cost, bound=min(found.bound, cost), complete=False)
    return replace(found, bound=found.cost, complete=True) if proven else found


def _objective(problem: Problem, cost: Floats, gap: float) -> tuple[Floats, float]:
    """Costs in HiGHS's units, and that unit: whole numbers where losses are (HiGHS then rounds its bounds), else fractions of the gap."""
    if problem.grain and gap / problem.grain < 1e7:
        return np.rint(cost / problem.grain), problem.grain
    unit = gap / _OBJECTIVE
    return cost / unit, unit


def _rows(problem: Problem, core: Core, items: Ints, schemes: Ints) -> tuple[Floats, Floats]:
    """Limits as rows of HiGHS's problem: usage beyond the base [M, n] and the room for it [M], whole numbers where they can be."""
    use = problem.moves(items, schemes, core.base).T
    room = problem.limits - problem.used(core.base)
    for row in range(room.size):
        magnitude = np.abs(use[row])
        if not magnitude.any():
            continue
        step = magnitude[magnitude > magnitude.max() * 1e-6].min()
        for divisor in (1, 2, 4, 8):
            whole = use[row] / (step / divisor)
            if magnitude.max() / step < 1e4 and np.abs(whole - np.rint(whole)).max() < 1e-9:
                use[row], room[row] = np.rint(whole), np.floor(room[row] / (step / divisor) + 1e-7)
                break
        else:
            use[row], room[row] = use[row] / magnitude.max(), room[row] / magnitude.max()
    return use, room
