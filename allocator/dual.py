"""The Lagrangian dual: prices for the limits whose relaxed optimum is the largest lower bound on the true one.

For prices p >= 0, h(p) = sum_b min_s (cost + p . usage) - p . limits is a lower bound on every feasible cost, concave
and piecewise linear in p, and its maximum is the linear program's value (Geoffrion 1974). It is maximised by cutting
planes (Kelley 1960): every evaluation yields an assignment whose cost and usage are one linear piece. With one limit
the master problem is the crossing of two lines; with more it is a linear program of M + 1 variables, re-centred on the
best prices and rescaled by the remaining gap so that it keeps its accuracy. The master's own dual mixes the assignments
into a solution of the linear program: what rounding starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import linprog

from allocator.problem import Floats, Ints, Problem, cheapest

_MOST_ROUNDS = 200
_BOX = 1e4  # the master looks this many (scaled) units around the best prices
_ROUNDING = (
    64 * np.finfo(np.float64).eps
)  # pairwise sums of 1e5 terms err by less than this times the sum of magnitudes


class Oracle(Protocol):
    """Minimises cost_weight * cost + prices . usage over the assignments; returns the value (limits not subtracted) and
    the assignment.
    """

    def __call__(self, problem: Problem, prices: Floats, cost_weight: float) -> tuple[float, Ints]:
        """The value and the assignment."""
        ...


def independent(problem: Problem, prices: Floats, cost_weight: float) -> tuple[float, Ints]:
    """The oracle when each item chooses for itself."""
    priced = problem.charge(prices)
    if cost_weight:
        priced += problem.cost if cost_weight == 1.0 else cost_weight * problem.cost
    else:
        priced[np.isinf(problem.cost)] = np.inf
    best, where = cheapest(priced)
    return float(best.sum()), where


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One assignment [B] as a linear piece of the dual: cost + prices . excess, excess [M] = (used - limits) / unit."""

    assignment: Ints
    cost: float
    excess: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Dual:
    """bound: a valid lower bound on cost. prices: float64 [M], per unit of usage. mixture: cuts and their weights (sum
    1).
    """

    bound: float
    prices: Floats
    mixture: tuple[tuple[Cut, float], ...]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """No mixture of assignments meets every limit: prices [M] (sum of price * unit = 1) under which even the cheapest
    exceeds them.
    """

    excess: float
    prices: Floats


class Ascent:
    """Cutting planes for h over prices (scaled by span), with or without the cost in it."""

    def __init__(
        self, problem: Problem, oracle: Oracle, *, cost_weight: float, on_simplex: bool, units: Floats
    ) -> None:
        self.problem, self.oracle = problem, oracle
        self.cost_weight, self.on_simplex = cost_weight, on_simplex
        self.spans = units
        self.limits = problem.limits + 0.8 * problem.tolerance()  # with room for what rounding adds here
        self.cuts: list[Cut] = []
        self.seen: dict[bytes, int] = {}
        self.latest = 0  # the cut that the last evaluation reached
        self.best, self.prices = -np.inf, np.zeros(self.limits.size)
        self.unit = 1.0

    def add(self, assignment: Ints) -> bool:
        """Add an assignment's piece; False when it is there already."""
        key = assignment.astype(np.int8).tobytes()
        if key in self.seen:
            self.latest = self.seen[key]
            return False
        self.latest = self.seen[key] = len(self.cuts)
        cost = self.cost_weight * self.problem.cost_of(assignment) if self.cost_weight else 0.0
        excess = (self.problem.used(assignment) - self.limits) / self.spans
        excess[np.abs(excess) <= 1e-13] = 0.0
        self.cuts.append(Cut(assignment=assignment, cost=cost, excess=excess))
        return True

    def visit(self, prices: Floats) -> bool:
        """Evaluate h; True when the evaluation added a new piece."""
        total, assignment = self.oracle(self.problem, prices / self.spans, self.cost_weight)
        share = prices * self.limits / self.spans
        value = total - float(share.sum())
        value -= _ROUNDING * (abs(total) + float(np.abs(share).sum()))
        if value > self.best:
            self.best, self.prices = value, prices
        return self.add(assignment)

    def master(self) -> tuple[Floats, float, Floats]:
        """The next prices [M], how far above the best value the master believes h may go, and the cuts' weights."""
        slopes = np.array([cut.excess for cut in self.cuts])
        height = np.array([cut.cost for cut in self.cuts]) + slopes @ self.prices - self.best
        dims = self.limits.size
        while True:
            low = np.maximum(-self.prices / self.unit, -_BOX)
            bounds = [*zip(low, np.full(dims, _BOX), strict=True), (None, None)]
            sums = np.append(np.ones(dims), 0.0)[None, :] if self.on_simplex else None
            result = linprog(
                np.append(np.zeros(dims), -1.0),
                A_ub=np.column_stack([-slopes, np.ones(len(self.cuts))]),
                b_ub=np.minimum(np.maximum(height, 0.0) / self.unit, 1e9),
                A_eq=sums,
                b_eq=None if sums is None else [0.0],
                bounds=bounds,
                method="highs",
            )
            if result.status != 0 or result.x is None:
                return self.prices, 0.0, np.zeros(len(self.cuts))
            rise = float(result.x[-1]) * self.unit
            step = result.x[:-1]
            boxed = bool((np.abs(step) >= _BOX * 0.999).any())
            if boxed and self.unit < 1e12:
                self.unit *= 100.0
                continue
            weights = np.maximum(-np.asarray(result.ineqlin.marginals), 0.0)
            return np.maximum(self.prices + step * self.unit, 0.0), rise, weights

    def climb(self, *, tolerance: float, stop_above: float, stop_below: float) -> Floats:
        """Run to convergence; returns the last master's weights over the cuts."""
        weights = np.zeros(0)
        scale = max(1.0, abs(self.best))
        for _ in range(_MOST_ROUNDS):
            prices, rise, weights = self.master()
            if self.best > stop_above or self.best + rise < stop_below or rise <= tolerance * scale:
                break
            self.unit = max(rise, 1e-14 * scale)
            if not self.visit(prices):
                break
        return weights


def reach(problem: Problem, oracle: Oracle, units: Floats | None = None) -> Unreachable | list[Ints]:
    """Assignments of which some mixture meets every limit, or the proof that none does.

    Solves min over mixtures of the largest (used - limit) / unit, by its dual over prices that sum to 1. units: float64
    [M], by default each limit's span.
    """
    dims = problem.num_limits
    ascent = Ascent(
        problem, oracle, cost_weight=0.0, on_simplex=True, units=problem.spans() if units is None else units
    )
    for corner in [np.full(dims, 1.0 / dims), *(np.eye(dims) if dims > 1 else [])]:
        ascent.visit(corner)
        if ascent.best > 0:
            break
    if dims > 1 and ascent.best <= 0:
        ascent.climb(tolerance=1e-10, stop_above=0.0, stop_below=-1e-6)
    if ascent.best > 0:
        return Unreachable(excess=ascent.best, prices=ascent.prices / ascent.spans)
    return [cut.assignment for cut in ascent.cuts]


def maximise(problem: Problem, oracle: Oracle, seeds: list[Ints]) -> Dual:
    """The dual's maximum. seeds: assignments of which some mixture meets every limit (from reach)."""
    ascent = Ascent(problem, oracle, cost_weight=1.0, on_simplex=False, units=problem.spans())
    for seed in seeds:
        ascent.add(seed)
    ascent.visit(np.zeros(problem.num_limits))
    free = ascent.cuts[ascent.latest]
    if (free.excess <= 0).all():
        weights = np.array([1.0 if cut is free else 0.0 for cut in ascent.cuts])
    elif problem.num_limits == 1:
        weights = _bracket(ascent)
    else:
        ascent.unit = max(max(cut.cost for cut in ascent.cuts) - ascent.best, 1e-300)
        weights = ascent.climb(tolerance=1e-12, stop_above=np.inf, stop_below=-np.inf)
    weights = np.pad(weights, (0, len(ascent.cuts) - weights.size))
    total = weights.sum()
    if total <= 0:
        weights[int(np.argmin([np.maximum(cut.excess, 0).sum() for cut in ascent.cuts]))] = total = 1.0
    mixture = tuple((cut, float(w / total)) for cut, w in zip(ascent.cuts, weights, strict=True) if w > 1e-9 * total)
    return Dual(bound=ascent.best, prices=ascent.prices / ascent.spans, mixture=mixture, cuts=tuple(ascent.cuts))


def _bracket(ascent: Ascent) -> Floats:
    """One limit: keep the best piece on either side of the limit and visit where they cross, until nothing new appears
    there.
    """
    while True:
        over = [i for i, cut in enumerate(ascent.cuts) if cut.excess[0] > 0]
        under = [i for i, cut in enumerate(ascent.cuts) if cut.excess[0] <= 0]
        price = 0.0
        left, right = over[0], under[0]
        crossings = {
            (i, j): (ascent.cuts[j].cost - ascent.cuts[i].cost) / (ascent.cuts[i].excess[0] - ascent.cuts[j].excess[0])
            for i in over
            for j in under
        }
        heights = {
            pair: ascent.cuts[pair[0]].cost + at * ascent.cuts[pair[0]].excess[0] for pair, at in crossings.items()
        }
        left, right = min(heights, key=lambda pair: heights[pair])
        price = max(crossings[left, right], 0.0)
        if not ascent.visit(np.array([price])) or len(ascent.cuts) > _MOST_ROUNDS:
            weights = np.zeros(len(ascent.cuts))
            a, b = ascent.cuts[left].excess[0], ascent.cuts[right].excess[0]
            weights[left], weights[right] = -b / (a - b), a / (a - b)
            return weights
