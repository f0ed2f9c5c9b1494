"""Budgets in every layer beside limits of all layers: prices of the latter outside, each layer's own price inside.

With dozens of limits plain cutting planes crawl. Here only the few common limits have cutting planes; for given prices
of these, every layer's budget is one limit of its own, whose best price is found by the same crossing of two lines as
in allocator.dual, for all layers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from allocator.core import Found
from allocator.dual import Ascent, Cut, Dual, Unreachable, independent, reach
from allocator.primal import fill, repair
from allocator.problem import Floats, Ints, Problem, Resource, cheapest
from allocator.segments import solve_segments
from allocator.solver import Effort, Outcome, close, nothing

_MOST_CROSSINGS = 60
_PUSHES = (1.0, 1.01, 1.03, 1.1, 1.3, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inner:
    """The best mixture under each layer's budget. value: its priced cost, a lower bound. left, right: assignments [B]
    mixed by share [L] of left.
    """

    value: float
    prices: Floats
    left: Ints
    right: Ints
    share: Floats


def _inner(own: Resource, priced: Floats, closed: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> _Inner:
    """Minimise priced [S, B] within own's limit of every segment, relaxed to mixtures."""
    segment, limit = own.segment, own.limit
    assert segment is not None
    items = np.arange(priced.shape[1])

    def total(assignment: Ints) -> tuple[Floats, Floats]:
        cost = np.bincount(segment, weights=priced[assignment, items], minlength=limit.size).astype(np.float64)
        return cost, own.used(items, assignment) - limit

    left = cheapest(priced)[1]
    right = cheapest(np.where(closed, np.inf, own.amount))[1]
    (left_cost, left_over), (right_cost, right_over) = total(left), total(right)
    free = left_over <= 0
    value, prices = np.where(free, left_cost, -np.inf), np.zeros(limit.size)
    for _ in range(_MOST_CROSSINGS):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(free, 0.0, (right_cost - left_cost) / (left_over - right_over))
        at = np.maximum(np.nan_to_num(at, posinf=0.0, neginf=0.0), 0.0)
        assignment = cheapest(priced + own.amount * at[segment])[1]
        cost, over = total(assignment)
        height = cost + at * over
        better = (height > value) & ~free
        value, prices = np.where(better, height, value), np.where(better, at, prices)
        below = height < left_cost + at * left_over - 1e-12 * (np.abs(left_cost) + 1e-300)
        moved = below & ~free
        if not moved.any():
            break
        to_left, to_right = moved & (over > 0), moved & (over <= 0)
        left = np.where(to_left[segment], assignment, left)
        right = np.where(to_right[segment], assignment, right)
        left_cost, left_over = np.where(to_left, cost, left_cost), np.where(to_left, over, left_over)
        right_cost, right_over = np.where(to_right, cost, right_cost), np.where(to_right, over, right_over)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(free, 1.0, -right_over / (left_over - right_over))
    share = np.clip(np.nan_to_num(share), 0.0, 1.0)
    return _Inner(value=float(value.sum()), prices=prices, left=left, right=right, share=share)


class _Outer(Ascent):
    """Cutting planes over the common limits' prices; every cut is a mixture that keeps each layer's budget."""

    def __init__(self, common: Problem, own: Resource) -> None:
        super().__init__(common, independent, cost_weight=1.0, on_simplex=False, units=common.spans())
        self.own = own
        self.own_prices = np.zeros(own.limit.size)
        self.closed = np.isinf(common.cost)

    def visit(self, prices: Floats) -> bool:
        """Evaluate at prices (scaled by span)."""
        inner = _inner(self.own, self.problem.priced(prices / self.spans), self.closed)
        paid = prices * self.limits / self.spans
        value = inner.value - float(paid.sum())
        value -= 1e-13 * (abs(inner.value) + float(paid.sum()))
        if value > self.best:
            self.best, self.prices, self.own_prices = value, prices, inner.prices
        self.cuts.append(self._mixture(inner))
        return not any(np.array_equal(self.cuts[-1].excess, cut.excess) for cut in self.cuts[:-1])

    def _mixture(self, inner: _Inner) -> Cut:
        segment = self.own.segment
        assert segment is not None
        items, share = np.arange(segment.size), inner.share[segment]

        def mixed(values: Floats) -> float:
            return float((share * values[inner.left, items] + (1 - share) * values[inner.right, items]).sum())

        used = np.array([mixed(resource.amount) for resource in self.problem.resources])
        return Cut(assignment=inner.right, cost=mixed(self.problem.cost), excess=(used - self.limits) / self.spans)


def solve_mixed(problem: Problem, own: Resource, effort: Effort) -> Outcome:
    """own: the resource with a limit in every segment; all others have one limit."""
    if isinstance(reach(problem, independent), Unreachable):
        return nothing()
    common = replace(problem, resources=tuple(r for r in problem.resources if r is not own))
    outer = _Outer(common, own)
    outer.visit(np.zeros(common.num_limits))
    for push in (1.0, 1e3):
        outer.visit(np.full(common.num_limits, push * max(problem.ceiling(), 1e-300)))
    outer.unit = max(abs(outer.best), 1e-300)
    outer.climb(tolerance=1e-9, stop_above=np.inf, stop_below=-np.inf)
    prices = np.concatenate(
        [outer.own_prices if r is own else outer.prices[[i]] / outer.spans[[i]] for r, i in _places(problem, own)]
    )
    dual = Dual(bound=outer.best, prices=prices, mixture=((outer.cuts[-1], 1.0),), cuts=())
    best = Found(assignment=None, cost=np.inf, bound=outer.best, complete=False)
    for push in _PUSHES:
        assignment = _whole(problem, common, own, outer.prices * push, prices, effort)
        if assignment is not None and problem.cost_of(assignment) < best.cost:
            best = replace(best, assignment=assignment, cost=problem.cost_of(assignment))
    best = replace(best, bound=min(problem.lift(outer.best), best.cost))
    return Outcome(found=close(problem, dual, best, effort.milp_seconds, effort), dual=dual)


def _places(problem: Problem, own: Resource) -> list[tuple[Resource, int]]:
    """Each resource, and its number among the common ones."""
    places, number = [], 0
    for resource in problem.resources:
        places.append((resource, number))
        number += resource is not own
    return places


def _whole(
    problem: Problem, common: Problem, own: Resource, pushed: Floats, prices: Floats, effort: Effort
) -> Ints | None:
    """Each layer solved to a whole assignment at the common prices, then mended where common limits are passed."""
    priced = common.priced(pushed / common.spans())
    least = priced.min(axis=0)
    layers = replace(common, cost=priced - least, resources=(own,), grain=0.0)
    assert own.segment is not None
    quick = replace(effort, narrow=(500, 60), wide=(500, 60), milp_seconds=0.0, small_items=0)
    assignment = solve_segments(layers, own.segment, None, quick).found.assignment
    mended = None if assignment is None else repair(problem, assignment, prices)
    return None if mended is None else fill(problem, mended, prices)
