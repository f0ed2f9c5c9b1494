"""From a choice to the assignment that a trial is judged by: the inner problem's, moved until its launches, not shares
of latency, are at the budget's limits, and the slack that is left spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from allocator.problem import Ints
from allocator.study.evaluate import Evaluator, Inner
from allocator.study.menu import Choice
from allocator.study.objective import LATENCY_WEIGHTS, Goal, Objective

MOVES = 4
CAP_MARGIN = 0.9995
"""A cap aims this near to a limit: launches move in steps."""
PRICE_POWER = 8.0
"""A price grows by this power of how far launches are over a limit: 1.1 times too long, twice the price."""
SPENDINGS = 3
FINEST = 128
"""Moves are tried to this part of all there are: every try prices all launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """rank: how far limits are broken, then the goal's value (of two objectives their product); least is best."""

    rank: tuple[float, float]
    choice: Choice
    inner: Inner
    over: Mapping[str, float]


def assigned(evaluator: Evaluator, choice: Choice, goal: Goal) -> tuple[Choice, Inner]:
    """The choice, with the caps or prices that it ended with, and its assignment.

    With limits, caps are scaled by the limit over what the launches take, or without caps prices of latency raised
    where launches are over it, some times over. Of all assignments that hold every limit, `choice.start` among them,
    the best is taken, else the one that breaks them least.
    """
    limits = evaluator.problem.budget.max_latency_us
    if not limits and choice.start is None:
        return choice, evaluator.solve(choice)
    tries, moved = [], choice
    for _ in range(MOVES if limits else 1):
        tries.append(_tried(evaluator, goal, moved, evaluator.solve(moved)))
        moved = _moved(moved, tries[-1].over, limits)
    if choice.start is not None:
        start = evaluator.at(choice, np.array(choice.start, dtype=np.int64), tries[0].inner.bound)
        tries.append(_tried(evaluator, goal, choice, start))
    best = min(tries, key=lambda one: one.rank)
    if limits and goal.objective is Objective.LOSS and best.rank[0] == 0:
        best = _spent(evaluator, goal, best)
    return best.choice, best.inner


def _tried(evaluator: Evaluator, goal: Goal, choice: Choice, inner: Inner) -> _Try:
    problem = evaluator.problem
    latency = {
        name: evaluator.launches_us(choice, inner.assignment, name)
        for name in problem.scenarios
        if goal.objective is not Objective.LOSS or name in problem.budget.max_latency_us
    }
    over = {name: latency[name] / limit for name, limit in problem.budget.max_latency_us.items()}
    broken = max(0.0, inner.excess_bits, *(ratio - 1 for ratio in over.values()))
    value = float(np.prod(goal.values(inner.loss, evaluator.relative_latency(latency))))
    return _Try(rank=(broken, value), choice=choice, inner=inner, over=over)


def _moved(choice: Choice, over: Mapping[str, float], limits: Mapping[str, float]) -> Choice:
    if choice.latency_caps_us:
        caps = dict(limits) | dict(choice.latency_caps_us)
        return replace(choice, latency_caps_us={name: caps[name] / over[name] * CAP_MARGIN for name in limits})
    weights = dict(choice.latency_weights)
    for name, ratio in over.items():
        weights[name] = float(np.clip(weights[name] * ratio**PRICE_POWER, *LATENCY_WEIGHTS))
    return replace(choice, latency_weights=weights)


def _spent(evaluator: Evaluator, goal: Goal, held: _Try) -> _Try:
    """What the limits leave, spent on less loss: each block's best move by loss saved for bits and latency added, as
    many of them, best first, as the launches hold.
    """
    for _ in range(SPENDINGS):
        moves, order = _moves(evaluator, held)
        low, high = 0, len(order)
        while high - low > len(order) // FINEST:  # the most that hold, were latency to grow with each; all are checked
            middle = (low + high + 1) // 2
            assignment = held.inner.assignment.copy()
            assignment[order[:middle]] = moves[order[:middle]]
            found = _tried(evaluator, goal, held.choice, evaluator.at(held.choice, assignment, held.inner.bound))
            if found.rank[0] == 0 and found.rank[1] < held.rank[1]:
                low, best = middle, found
            else:
                high = middle - 1
        if low == 0:
            break
        held = best
    return held


def _moves(evaluator: Evaluator, held: _Try) -> tuple[Ints, Ints]:
    """Each block's best scheme to move to, and the blocks that gain by it, best first."""
    problem = evaluator.problem
    loss, bits, latency, columns = evaluator.arrays(held.choice)
    rows = np.arange(len(problem.ids))
    now = (columns == held.inner.assignment[:, None]).argmax(axis=1)
    gain = loss[rows, now][:, None] - loss
    limits = [problem.budget.max_latency_us.get(name, np.inf) for name in problem.scenarios]
    price = ((latency - latency[rows, now][:, None]) / np.array(limits)).sum(axis=2)
    price += (bits - bits[rows, now][:, None]) * (problem.sizes / problem.sizes.sum() / problem.bits_limit)[:, None]
    worth = np.where(gain > 0, gain / np.maximum(price, 1e-12), 0.0)
    best = worth.argmax(axis=1)
    order = np.argsort(-worth[rows, best], kind="stable")
    return columns[rows, best], order[worth[order, best[order]] > 0]
