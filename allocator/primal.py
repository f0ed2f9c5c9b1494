"""From prices to a whole assignment: round the mixture, repair what it exceeds, spend what is left over.

Every step works on all items at once: moves are ranked by cost per usage and the longest prefix that still helps is
taken, so that even thousands of tied items (equal experts) settle in a few rounds.
"""

from __future__ import annotations

import numpy as np

from allocator.dual import Dual
from allocator.problem import Floats, Ints, Problem

_MOST_ROUNDS = 60
_MOST_MOVES = 8192
_GOLDEN = (5**0.5 - 1) / 2


def deal(weights: list[float], count: int) -> Ints:
    """int64 [count]: indices into weights (sum 1), so that any run of them is split in the weights' proportions.

    Follows the golden ratio's fractional parts, whose runs are as even as a sequence's can be.
    """
    place = (np.arange(count) + 0.5) * _GOLDEN % 1.0
    return np.minimum(np.searchsorted(np.cumsum(weights), place), len(weights) - 1).astype(np.int64)


def round_mixture(problem: Problem, dual: Dual) -> Ints:
    """Items on which the mixture's assignments agree keep that choice; the others are dealt out evenly, by weight."""
    assignments = np.array([cut.assignment for cut, _ in dual.mixture])
    disagree = np.flatnonzero((assignments != assignments[0]).any(axis=0))
    rounded: Ints = assignments[0].copy()
    if disagree.size:
        rounded[disagree] = assignments[deal([weight for _, weight in dual.mixture], disagree.size), disagree]
    return rounded


def _take(assignment: Ints, items: Ints, schemes: Ints) -> Ints:
    changed = assignment.copy()
    changed[items] = schemes
    return changed


def _best_moves(ratio: Floats) -> tuple[Ints, Ints]:
    """Each item's best scheme by ratio (lower is better, inf is no move), items in the order of that ratio."""
    schemes = ratio.argmin(axis=0)
    value = ratio[schemes, np.arange(ratio.shape[1])]
    items = np.flatnonzero(np.isfinite(value))
    if items.size > _MOST_MOVES:
        items = items[np.argpartition(value[items], _MOST_MOVES)[:_MOST_MOVES]]
    items = items[np.argsort(value[items], kind="stable")]
    return items, schemes[items]


def repair(problem: Problem, assignment: Ints, prices: Floats) -> Ints | None:
    """Moves items, cheapest priced cost per relief first, until every limit holds; None when no move relieves anything
    any more.
    """
    items_all = np.arange(problem.num_items)
    limits, spans, tolerance = problem.limits, problem.spans(), problem.tolerance()
    prices = prices + 1e-12 / spans
    for _ in range(_MOST_ROUNDS):
        over = problem.used(assignment) - limits
        if (over <= tolerance).all():
            return assignment
        pressure = np.where(over > tolerance, over, 0.0) / spans / spans
        charge = problem.charge(pressure)
        relief = charge[assignment, items_all] - charge
        priced = problem.priced(prices)
        harm = np.maximum(priced - priced[assignment, items_all], 0.0)
        least = float((pressure * np.maximum(over, 0.0)).sum()) * 1e-12
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(relief > least, (harm + 1e-300) / relief, np.inf)
        items, schemes = _best_moves(ratio)
        if not items.size:
            return None
        excess = over + np.cumsum(problem.moves(items, schemes, assignment), axis=0)
        worst = (np.maximum(excess, 0.0) / spans).sum(axis=1)
        enough = np.flatnonzero((excess <= tolerance).all(axis=1))
        count = int(enough[0]) if enough.size else int(worst.argmin())
        if not enough.size and worst[count] >= (np.maximum(over, 0.0) / spans).sum():
            prices = prices * 2.0 + pressure / max(float((pressure * spans).sum()), 1e-300)
            continue
        assignment = _take(assignment, items[: count + 1], schemes[: count + 1])
    return None


def fill(problem: Problem, assignment: Ints, prices: Floats) -> Ints:
    """Spends what the limits leave over on the moves that lower cost most per priced usage."""
    items_all = np.arange(problem.num_items)
    room_edge = problem.limits + problem.tolerance()
    for _ in range(_MOST_ROUNDS):
        room = room_edge - problem.used(assignment)
        gain = problem.cost[assignment, items_all] - problem.cost
        movable = gain > 0
        for resource, place in problem.slots():
            extra = resource.amount - resource.amount[assignment, items_all]
            movable &= extra <= (room[place][0] if resource.segment is None else room[place][resource.segment])
        if not movable.any():
            break
        charge = problem.charge(prices)
        extra_charge = np.maximum(charge - charge[assignment, items_all], 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.where(movable, (extra_charge + 1e-300) / gain, np.inf)
        items, schemes = _best_moves(ratio)
        if not items.size:
            break
        used = np.cumsum(problem.moves(items, schemes, assignment), axis=0)
        blocked = np.flatnonzero((used > room).any(axis=1))
        count = max(1, int(blocked[0]) if blocked.size else items.size)
        assignment = _take(assignment, items[:count], schemes[:count])
    return assignment


def first_solution(problem: Problem, dual: Dual) -> Ints | None:
    """A good assignment that holds every limit, from the dual's rounding and from the cuts that hold them by
    themselves; None if none came up.
    """
    candidates = [repair(problem, round_mixture(problem, dual), dual.prices)]
    fitting = [cut.assignment for cut in dual.cuts if problem.fits(cut.assignment)]
    if fitting:
        candidates.append(min(fitting, key=problem.cost_of))
    elif candidates[0] is None:
        candidates += [repair(problem, cut.assignment, dual.prices) for cut, _ in dual.mixture]
    filled = [fill(problem, candidate, dual.prices) for candidate in candidates if candidate is not None]
    filled = [candidate for candidate in filled if problem.fits(candidate)]
    return min(filled, key=problem.cost_of) if filled else None
