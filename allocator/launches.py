"""At most k schemes a launch: each launch also chooses which k schemes its items may use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from allocator.dual import Dual
from allocator.primal import deal
from allocator.problem import Floats, Ints, Problem, cheapest

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOracle:
    """The dual's oracle when items of one launch share at most most_schemes schemes: every subset of that size is priced, exactly.

    launch: int64 [B], 0..L-1.
    """

    launch: Ints
    num_launches: int
    most_schemes: int
    num_schemes: int
    subsets: Ints = field(init=False)

    def __post_init__(self) -> None:
        size = min(self.most_schemes, self.num_schemes)
        object.__setattr__(self, "subsets", np.array(list(combinations(range(self.num_schemes), size)), dtype=np.int64))

    def choose(self, priced: Floats) -> tuple[float, Bools]:
        """The least total of priced [S, B], and the schemes its subsets admit, bool [S, L]."""
        totals = np.empty((len(self.subsets), self.num_launches))
        for i, subset in enumerate(self.subsets):
            least = priced[subset].min(axis=0)
            totals[i] = np.bincount(self.launch, weights=least, minlength=self.num_launches)
        where = totals.argmin(axis=0)
        admitted = np.zeros((self.num_schemes, self.num_launches), dtype=np.bool_)
        for column in range(self.subsets.shape[1]):
            admitted[self.subsets[where, column], np.arange(self.num_launches)] = True
        return float(totals.min(axis=0).sum()), admitted

    def __call__(self, problem: Problem, prices: Floats, cost_weight: float) -> tuple[float, Ints]:
        priced = problem.charge(prices)
        closed = np.isinf(problem.cost)
        priced += cost_weight * np.where(closed, 0.0, problem.cost)
        priced[closed] = np.inf
        total, admitted = self.choose(priced)
        priced[~admitted[:, self.launch]] = np.inf
        return total, cheapest(priced)[1]

    def round_mixture(self, dual: Dual) -> Bools:
        """bool [S, L]: each launch takes the schemes of one of the mixture's assignments, dealt out in the mixture's proportions."""
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
