"""At most k schemes a launch: each launch also chooses which k schemes its items may use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from allocator.dual import Dual
from allocator.primal import deal
from allocator.problem import Floats, Ints, Problem, cheapest

Bools = NDArray[np.bool_]
_MOST_SUBSETS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOracle:
    """The dual's oracle when items of one launch share at most most_schemes schemes: every subset of that size is
    priced while there are at most 500.

    launch: int64 [B], 0..L-1.
    """

    launch: Ints
    num_launches: int
    most_schemes: int
    num_schemes: int
    subsets: Ints | None = field(init=False)

    def __post_init__(self) -> None:
        size = min(self.most_schemes, self.num_schemes)
        subsets = None
        if comb(self.num_schemes, size) <= _MOST_SUBSETS:
            subsets = np.array(list(combinations(range(self.num_schemes), size)), dtype=np.int64)
        object.__setattr__(self, "subsets", subsets)

    def choose(self, priced: Floats) -> tuple[float, Bools]:
        """A lower bound on the total of priced [S, B], and the schemes to admit in each launch, bool [S, L].

        Exact while the subsets are few enough to price them all; else subsets grow greedily, by the scheme that lowers
        the total most, and the bound is that of launches without a limit.
        """
        if self.subsets is None:
            return float(priced.min(axis=0).sum()), self._grow(priced)
        totals = np.empty((len(self.subsets), self.num_launches))
        for i, subset in enumerate(self.subsets):
            totals[i] = self._per_launch(priced[subset].min(axis=0))
        where = totals.argmin(axis=0)
        admitted = np.zeros((self.num_schemes, self.num_launches), dtype=np.bool_)
        for column in range(self.subsets.shape[1]):
            admitted[self.subsets[where, column], np.arange(self.num_launches)] = True
        return float(totals.min(axis=0).sum()), admitted

    def _per_launch(self, of_item: Floats) -> Floats:
        return np.bincount(self.launch, weights=of_item, minlength=self.num_launches).astype(np.float64)

    def _grow(self, priced: Floats) -> Bools:
        launches = np.arange(self.num_launches)
        admitted = np.zeros((self.num_schemes, self.num_launches), dtype=np.bool_)
        finite = np.where(np.isinf(priced), 0.0, priced)
        # An item without any admitted scheme costs more than all finite choices together, so that subsets cover their
        # items first.
        best = np.full(priced.shape[1], 1.0 + 2.0 * float(np.abs(finite).max(axis=0).sum()))
        for _ in range(self.most_schemes):
            totals = np.array([self._per_launch(np.minimum(best, row)) for row in priced])
            totals[admitted] = np.inf
            chosen = totals.argmin(axis=0)
            admitted[chosen, launches] = True
            best = np.minimum(best, priced[chosen[self.launch], np.arange(best.size)])
        return admitted

    def __call__(self, problem: Problem, prices: Floats, cost_weight: float) -> tuple[float, Ints]:
        """The oracle of allocator.dual."""
        priced = problem.charge(prices)
        closed = np.isinf(problem.cost)
        priced += cost_weight * np.where(closed, 0.0, problem.cost)
        priced[closed] = np.inf
        total, admitted = self.choose(priced)
        priced[~admitted[:, self.launch]] = np.inf
        return total, cheapest(priced)[1]

    def round_mixture(self, dual: Dual) -> Bools:
        """bool [S, L]: each launch takes the schemes of one of the mixture's assignments, dealt out in the mixture's
        proportions.
        """
        admitted = np.zeros((self.num_schemes, self.num_launches), dtype=np.bool_)
        place = deal([weight for _, weight in dual.mixture], self.num_launches)
        for i, (cut, _) in enumerate(dual.mixture):
            mine = place[self.launch] == i
            admitted[cut.assignment[mine], self.launch[mine]] = True
        return admitted

    def restrict(self, problem: Problem, admitted: Bools) -> Problem:
        """The problem in which each launch has settled on its schemes."""
        closed = ~admitted[:, self.launch]
        resources = tuple(replace(r, amount=np.where(closed, 0.0, r.amount)) for r in problem.resources)
        return replace(problem, cost=np.where(closed, np.inf, problem.cost), resources=resources)

    def holds(self, assignment: Ints) -> bool:
        """Whether no launch has more schemes than it may."""
        used = np.zeros((self.num_launches, self.num_schemes), dtype=np.bool_)
        used[self.launch, assignment] = True
        return bool((used.sum(axis=1) <= self.most_schemes).all())
