"""The decision: which bits every block of weights gets, within a budget, with a certified gap.

solve_arrays is the solver on plain arrays.
"""

from allocator.arrays import InfeasibleError, Solution, solve_arrays
from allocator.search import Effort

__all__ = ["Effort", "InfeasibleError", "Solution", "solve_arrays"]
