"""The decision: which bits every linear of every expert gets, within a budget, with a certified gap.

solve        `python -m allocator.solve`
allocate     Sensitivity, CostTable and Budget -> Allocation
sensitivity, budget, allocation    the nouns and their files
arrays       solve_arrays: the solver on plain arrays; checks reads its arguments
problem      one scheme per item, minimum cost, limits
solver       the steps: dual (prices and bound), primal (rounding), core (exact search), integer (HiGHS); launches (k
schemes)
report*      `python -m allocator.report`: one HTML page; verify: finalists measured
export       `python -m allocator.export`: other engines' forms, and what they lose
robust       `python -m allocator.robust`, over robustness: regret under other loads, the least worst case
tune         `python -m allocator.tune`, over tuning (its stages), stages (their cache), scenarios (loads and latencies)
"""

from profiles.interrupt import end_at_once

end_at_once("allocator")

from allocator.allocate import Options, allocate
from allocator.allocation import Allocation, Granularity
from allocator.arrays import InfeasibleError, Solution, solve_arrays
from allocator.budget import Budget
from allocator.sensitivity import Sensitivity
from allocator.solver import Effort

__all__ = [
    "Allocation",
    "Budget",
    "Effort",
    "Granularity",
    "InfeasibleError",
    "Options",
    "Sensitivity",
    "Solution",
    "allocate",
    "solve_arrays",
]
