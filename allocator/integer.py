"""HiGHS on what the core leaves open: branch and cut for the instances whose gap the state lists do not close."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, hstack

from allocator.core import Found, make_core
from allocator.dual import Dual
from allocator.launches import LaunchOracle
from allocator.problem import Floats, Ints, Problem

_OBJECTIVE = (
    1e3  # the gap in HiGHS's units when losses are not whole: its absolute tolerance of 1e-6 is then 1e-9 of the gap
)
_TIGHTEN = (0.0, 2e-6, 2e-5)  # of the row's scale: HiGHS lets rows pass by 1e-6


def finish(problem: Problem, dual: Dual, found: Found, *, most_variables: int, seconds: float) -> Found:
    """Improve found, and its bound, by integer programming on the core; found itself when the core is too large."""
    top = problem.ceiling() if found.assignment is None else found.cost
    gap = top - dual.bound
    core = make_core(problem, dual, gap * (1 + 1e-9), problem.num_items)
    sizes = np.array([choices.size for choices in core.choices], dtype=np.int64)
    if gap <= 0 or not sizes.size or sizes.sum() > most_variables:
        return found
    items, schemes = core.items[np.repeat(np.arange(sizes.size), sizes)], np.concatenate(core.choices)
    return _solve(problem, found, _Columns(base=core.base, items=items, schemes=schemes), None, gap, seconds)


def finish_launches(
    problem: Problem, oracle: LaunchOracle, found: Found, *, most_variables: int, seconds: float
) -> Found:
    """The same with at most k schemes a launch, over all choices, with a binary for each scheme of each launch."""
    schemes, items = np.nonzero(np.isfinite(problem.cost))
    if items.size > most_variables:
        return found
    gap = (problem.ceiling() if found.assignment is None else found.cost) - found.bound
    base = np.isfinite(problem.cost).argmax(axis=0).astype(np.int64)
    columns = _Columns(base=base, items=items.astype(np.int64), schemes=schemes.astype(np.int64))
    return found if gap <= 0 else _solve(problem, found, columns, oracle, gap, seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """The binaries: item items[i] takes schemes[i]. Items without a binary stay at base [B]."""

    base: Ints
    items: Ints
    schemes: Ints


def _solve(
    problem: Problem, found: Found, columns: _Columns, oracle: LaunchOracle | None, gap: float, seconds: float
) -> Found:
    base, items, schemes = columns.base, columns.items, columns.schemes
    objective, unit = _objective(problem, problem.cost[schemes, items] - problem.cost[base[items], items], gap)
    rows, room = _rows(problem, base, items, schemes)
    owner = np.unique(items, return_inverse=True)[1].reshape(-1)
    once = csr_array(coo_array((np.ones(owner.size), (owner, np.arange(owner.size)))))
    extra = 0 if oracle is None else oracle.num_launches * oracle.num_schemes
    fixed = [LinearConstraint(_wider(once, extra), 1.0, 1.0)]
    if oracle is not None:
        fixed += _launch_rows(oracle, items, schemes)
    base_cost = problem.cost_of(base)
    for tighten in _TIGHTEN:
        with _quiet():
            result = milp(
                np.append(objective, np.zeros(extra)),
                constraints=[*fixed, LinearConstraint(_wider(csr_array(rows), extra), -np.inf, room - tighten)],
                integrality=np.ones(owner.size + extra, dtype=np.int64),
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
        assignment = base.copy()
        chosen = result.x[: owner.size] > 0.5
        assignment[items[chosen]] = schemes[chosen]
        if problem.fits(assignment) and (oracle is None or oracle.holds(assignment)):
            return _better(problem, found, assignment, proven=result.status == 0 and tighten == 0.0)
    return found


def _wider(rows: csr_array, extra: int) -> csr_array:
    return rows if not extra else csr_array(hstack([rows, csr_array((rows.shape[0], extra))]))


def _launch_rows(oracle: LaunchOracle, items: Ints, schemes: Ints) -> list[LinearConstraint]:
    """x[item, scheme] <= y[launch, scheme], and at most k of a launch's y."""
    count, extra = items.size, oracle.num_launches * oracle.num_schemes
    place = oracle.launch[items] * oracle.num_schemes + schemes
    at = np.arange(count)
    opens = csr_array(coo_array((np.ones(count), (at, place)), shape=(count, extra)))
    uses = csr_array(coo_array((np.ones(count), (at, at))))
    launch = np.repeat(np.arange(oracle.num_launches), oracle.num_schemes)
    most = csr_array(
        coo_array((np.ones(extra), (launch, count + np.arange(extra))), shape=(oracle.num_launches, count + extra))
    )
    return [
        LinearConstraint(csr_array(hstack([uses, -opens])), -np.inf, 0.0),
        LinearConstraint(most, -np.inf, float(oracle.most_schemes)),
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard output closed to HiGHS, which prints a line there whenever it mends a solution, whatever it is told."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
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
    """Costs in HiGHS's units, and that unit: whole numbers where losses are (HiGHS then rounds its bounds), else
    fractions of the gap.
    """
    if problem.grain and gap / problem.grain < 1e7:
        return np.rint(cost / problem.grain), problem.grain
    unit = gap / _OBJECTIVE
    return cost / unit, unit


def _rows(problem: Problem, base: Ints, items: Ints, schemes: Ints) -> tuple[Floats, Floats]:
    """Limits as rows of HiGHS's problem: usage beyond the base [M, n] and the room for it [M], whole numbers where they
    can be.
    """
    use = problem.moves(items, schemes, base).T
    room = problem.limits - problem.used(base)
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
