"""Exact search near the dual: which few items must deviate from their priced best choice, and how.

At the dual's prices an assignment costs bound + sum of reduced costs + prices . slack, so anything better than the
incumbent uses only choices whose reduced cost is below the gap: the core (Balas and Zemel 1980). The core is enumerated
item by item, most likely first, as lists of (usage, cost) states with dominance, as Pisinger's minimal algorithm for
the multiple-choice knapsack does (1995), pruned by the relaxation under several price vectors. Complete, it proves the
optimum; cut short, it is a beam search that still returns a valid bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.dual import Dual
from allocator.primal import round_mixture
from allocator.problem import Floats, Ints, Problem, cheapest

_PRICE_FACTORS = (0.5, 0.9, 1.1, 2.0)
_CHAMPIONS = 24  # states that every other state is compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best assignment [B] known (None: none fits), its cost, a valid lower bound, and whether the search left
    nothing out.
    """

    assignment: Ints | None
    cost: float
    bound: float
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """Every item's priced-best choice, and the choices that could still improve on the incumbent.

    base: int64 [B]. items: int64 [C], most likely to deviate first. choices[i]: schemes of items[i], base first.
    left_out: the least reduced cost among the alternatives that were not admitted for want of room (inf when none was).
    """

    base: Ints
    items: Ints
    choices: tuple[Ints, ...]
    left_out: float


def make_core(problem: Problem, dual: Dual, gap: float, most_items: int) -> Core:
    """The core for a gap in cost: choices with a smaller reduced cost, of at most most_items items."""
    priced = problem.priced(dual.prices)
    low, base = cheapest(priced)
    reduced = priced - low
    everyone = np.arange(problem.num_items)
    rounded = round_mixture(problem, dual)
    tied = reduced[rounded, everyone] <= 1e-13 * max(1.0, gap)
    base = np.where(tied, rounded, base)
    alternatives = reduced.copy()
    alternatives[base, everyone] = np.inf
    second = alternatives.min(axis=0)
    items = np.flatnonzero(second < gap)
    items = items[np.argsort(second[items], kind="stable")]
    left_out = float(second[items[most_items]]) if items.size > most_items else np.inf
    items = items[:most_items]
    choices = tuple(np.append(base[b], np.flatnonzero(alternatives[:, b] < gap)) for b in items)
    return Core(base=base, items=items, choices=choices, left_out=left_out)


def _price_vectors(prices: Floats) -> Floats:
    """float64 [J, M]: the dual's prices first, then each price moved by itself, then all together."""
    vectors = [prices]
    for factor in _PRICE_FACTORS:
        vectors.append(prices * factor)
        if prices.size > 1:
            for limit in np.flatnonzero(prices):
                moved = prices.copy()
                moved[limit] *= factor
                vectors.append(moved)
    return np.unique(np.array(vectors), axis=0)


class _States:
    """Partial assignments of the core: cost and usage relative to all items at base, with the way back."""

    def __init__(self, problem: Problem, dual: Dual, core: Core) -> None:
        self.problem, self.core = problem, core
        self.edge = problem.limits + problem.tolerance()
        self.start = problem.used(core.base)
        self.spans = problem.spans()
        self.base_cost = problem.cost_of(core.base)
        self.cost, self.use = np.zeros(1), np.zeros((1, self.start.size))
        self.history: list[tuple[Ints, Ints]] = []
        self.vectors = _price_vectors(dual.prices)
        self.steps = [self._step(i) for i in range(core.items.size)]
        # What the items still to come can save at best, under each price vector, and in usage of each limit.
        save = np.array([(cost[:, None] + use @ self.vectors.T).min(axis=0) for cost, use in self.steps])
        thrift = np.array([use.min(axis=0) for _, use in self.steps])
        self.save = _suffix_sums(save.reshape(len(self.steps), len(self.vectors)))
        self.thrift = _suffix_sums(thrift.reshape(len(self.steps), self.start.size))

    def _step(self, i: int) -> tuple[Floats, Floats]:
        """Cost [n] and usage [n, M] of each choice of core item i, relative to its base."""
        item, choices = self.core.items[i], self.core.choices[i]
        cost = self.problem.cost[choices, item] - self.problem.cost[choices[0], item]
        return cost, self.problem.moves(np.full(choices.size, item), choices, self.core.base)

    def extend(self, i: int, best: float) -> Floats:
        """Decide core item i in every state, drop what cannot beat best; returns the survivors' bounds."""
        cost, use = self.steps[i]
        parents = np.tile(np.arange(self.cost.size), cost.size)
        picks = np.repeat(np.arange(cost.size), self.cost.size)
        self.cost, self.use = (
            (cost[:, None] + self.cost).ravel(),
            (use[:, None, :] + self.use).reshape(-1, self.use.shape[1]),
        )
        bounds = self._bounds(i + 1)
        keep = np.flatnonzero(bounds < best)
        keep = keep[(self.start + self.use[keep] + self.thrift[i + 1] <= self.edge).all(axis=1)]
        self._keep(keep)
        keep, bounds = self._undominated(keep, bounds)
        self.history.append((parents[keep], picks[keep]))
        return bounds

    def _keep(self, which: Ints) -> None:
        self.cost, self.use = self.cost[which], self.use[which]

    def _bounds(self, decided: int) -> Floats:
        excess = self.start - self.problem.limits
        fixed = self.base_cost + self.vectors @ excess + self.save[decided]
        bounds = np.full(self.cost.size, -np.inf)
        for vector, constant in zip(self.vectors, fixed, strict=True):
            np.maximum(bounds, self.cost + self.use @ vector + constant, out=bounds)
        return bounds

    def _undominated(self, keep: Ints, bounds: Floats) -> tuple[Ints, Floats]:
        """Drop states that another beats in cost and in every usage. Complete for one limit, and for equal usage of all
        but the last.
        """
        bounds = bounds[keep]
        if self.cost.size < 2:
            return keep, bounds
        grid = np.rint(self.use / (self.spans * 1e-13)).astype(np.int64)
        order = np.lexsort([self.cost, *grid.T[::-1]])
        sorted_grid = grid[order]
        rank = np.empty(order.size, dtype=np.int64)
        rank[np.argsort(self.cost[order], kind="stable")] = np.arange(order.size)
        fresh = np.append(False, (sorted_grid[1:, :-1] != sorted_grid[:-1, :-1]).any(axis=1))
        level = rank - np.cumsum(fresh) * order.size
        alive = np.append(True, level[1:] < np.minimum.accumulate(level)[:-1])
        which = np.sort(order[alive])
        if self.use.shape[1] > 1 and which.size > 64:
            which = which[~self._beaten(which, bounds, grid)]
        self._keep(which)
        return keep[which], bounds[which]

    def _beaten(self, which: Ints, bounds: Floats, grid: Ints) -> NDArray[np.bool_]:
        """Which states one of the champions (the most promising states) beats outright."""
        beaten = np.zeros(which.size, dtype=np.bool_)
        for champion in which[np.argpartition(bounds[which], _CHAMPIONS)[:_CHAMPIONS]]:
            worse = (self.cost[which] >= self.cost[champion]) & (grid[which] >= grid[champion]).all(axis=1)
            beaten |= worse & (which != champion)
        return beaten

    def truncate(self, bounds: Floats, most: int) -> float:
        """Keep the most promising states; returns the least bound among those dropped."""
        order = np.argpartition(bounds, most)
        keep = np.sort(order[:most])
        self._keep(keep)
        parents, picks = self.history[-1]
        self.history[-1] = (parents[keep], picks[keep])
        return float(bounds[order[most:]].min())

    def best_fitting(self) -> tuple[float, int]:
        """The cheapest state that holds every limit when all later items stay at base; (inf, -1) when none does."""
        fitting = np.flatnonzero((self.start + self.use <= self.edge).all(axis=1))
        if not fitting.size:
            return np.inf, -1
        state = int(fitting[self.cost[fitting].argmin()])
        return self.base_cost + float(self.cost[state]), state

    def trace(self, state: int) -> Ints:
        assignment: Ints = self.core.base.copy()
        for i in range(len(self.history) - 1, -1, -1):
            parents, picks = self.history[i]
            assignment[self.core.items[i]] = self.core.choices[i][picks[state]]
            state = int(parents[state])
        return assignment


def _suffix_sums(rows: Floats) -> Floats:
    """[n + 1, k]: row i is the sum of rows i..n-1."""
    return np.vstack([np.cumsum(rows[::-1], axis=0)[::-1], np.zeros((1, rows.shape[1]))])


def search(
    problem: Problem, dual: Dual, incumbent: Ints | None, *, most_states: int, most_items: int, keep_gap: float = 0.0
) -> Found:
    """Search the core; stops early once cost - bound <= keep_gap."""
    cost = np.inf if incumbent is None else problem.cost_of(incumbent)
    top = problem.ceiling() if incumbent is None else problem.improves_on(cost)
    core = make_core(problem, dual, max(top - dual.bound, 0.0), most_items)
    states = _States(problem, dual, core)
    dropped = dual.bound + core.left_out
    best, assignment = cost, incumbent
    for i in range(-1, core.items.size):
        if i >= 0:
            bounds = states.extend(i, top if np.isinf(best) else problem.improves_on(best))
            if not bounds.size:
                break
            if bounds.size > most_states:
                dropped = min(dropped, states.truncate(bounds, most_states))
        value, state = states.best_fitting()
        if value < best:
            candidate = states.trace(state)
            if problem.fits(candidate):
                best, assignment = problem.cost_of(candidate), candidate
        if best - dual.bound <= keep_gap:
            return Found(assignment=assignment, cost=best, bound=min(dual.bound, best), complete=False)
    dropped = problem.lift(dropped)
    complete = dropped >= best
    bound = max(dual.bound, min(best, dropped))
    return Found(assignment=assignment, cost=best, bound=min(bound, best), complete=complete)
