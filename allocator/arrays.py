"""solve_arrays: minimum loss within average bits and latency limits, with a certified bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from allocator.checks import Prepared, prepare
from allocator.dual import Unreachable, independent, reach
from allocator.launches import LaunchOracle
from allocator.methods import solve_any
from allocator.problem import Floats, Ints, Problem, Resource
from allocator.solver import Effort, Outcome, relative_gap
from profiles.errors import SpecError, UserError


class InfeasibleError(UserError):
    """No assignment holds every limit; the text says by how much each is short and what would make it feasible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What solve_arrays found.

    assignment: int64 [blocks], a scheme index each. loss: its total loss. bound: no assignment within the limits has
    less loss (to rounding). gap: (loss - bound) / max(|loss|, |bound|). avg_bits: size-weighted mean. latency_us:
    float64 [scenarios]. prices: the dual's shadow prices, by limit name ("avg_bits", "max_latency_us[name]"), the loss
    that one more unit of it saves; per layer an array.
    """

    assignment: Ints
    loss: float
    bound: float
    gap: float
    avg_bits: float
    latency_us: Floats
    prices: dict[str, float | Floats]


def solve_arrays(
    loss: ArrayLike,
    weight_bits: ArrayLike,
    *,
    avg_bits: ArrayLike | None = None,
    latency_us: ArrayLike | None = None,
    max_latency_us: ArrayLike | None = None,
    sizes: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
    pinned: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    layers: ArrayLike | None = None,
    launches: ArrayLike | None = None,
    max_schemes: int | None = None,
    scenarios: Sequence[str] | None = None,
    effort: Effort | None = None,
) -> Solution:
    """Choose one scheme per block with the least total loss within every limit.

    loss: float [B, S]; +inf forbids a scheme; may be zero or negative. weight_bits: float [S] or [B, S], >= 0.
    avg_bits: the limit on sum(sizes * bits) / sum(sizes); with layers, one number for each layer or one for all, held
    in every layer. latency_us: float [B, S, scenarios] (or [B, S] for one), >= 0, inf forbids; max_latency_us: float
    [scenarios], limits on sums over blocks, inf for none. sizes: float [B], parameters per block, default equal.
    allowed: bool [S] or [B, S]. pinned: int [B], a scheme or -1. groups: int [B], blocks with equal labels get one
    scheme. launches: int [B] with max_schemes: at most that many schemes among the blocks of a launch. scenarios: names
    for messages and prices.

    A limit holds to 1e-12 of the most that all blocks together could use. Raises SpecError for a bad argument,
    InfeasibleError when no assignment fits.
    """
    prepared = prepare(
        loss,
        weight_bits,
        avg_bits=avg_bits,
        latency_us=latency_us,
        max_latency_us=max_latency_us,
        sizes=sizes,
        allowed=allowed,
        pinned=pinned,
        groups=groups,
        layers=layers,
        launches=launches,
        scenarios=scenarios,
    )
    effort = effort or Effort()
    problem = prepared.problem
    oracle = _launch_oracle(prepared, max_schemes)
    outcome = solve_any(problem, oracle, effort)
    if outcome.found.assignment is None:
        raise InfeasibleError(explain_infeasible(problem, oracle, outcome, effort))
    return _solution(prepared, outcome)


def _launch_oracle(prepared: Prepared, max_schemes: int | None) -> LaunchOracle | None:
    if (max_schemes is None) != (prepared.launch is None):
        raise SpecError(
            "launches and max_schemes go together: which blocks share a launch, and how many schemes it may hold"
        )
    if max_schemes is None or prepared.launch is None:
        return None
    if isinstance(max_schemes, bool) or not isinstance(max_schemes, (int, np.integer)) or max_schemes < 1:
        raise SpecError(f"max_schemes must be a whole number of at least 1, not {max_schemes!r}")
    schemes = prepared.problem.num_schemes
    if max_schemes >= schemes:
        return None
    launch = prepared.launch
    return LaunchOracle(
        launch=launch, num_launches=int(launch.max()) + 1, most_schemes=int(max_schemes), num_schemes=schemes
    )


def _solution(prepared: Prepared, outcome: Outcome) -> Solution:
    problem, found = prepared.problem, outcome.found
    assert found.assignment is not None
    items = np.arange(problem.num_items)
    prices: dict[str, float | Floats] = {}
    for resource, place in problem.slots():
        price = np.zeros(resource.limit.size) if outcome.dual is None else outcome.dual.prices[place] * problem.scale
        prices[resource.name] = float(price[0]) if resource.segment is None else price
    latency = prepared.latency_us
    return Solution(
        assignment=found.assignment[prepared.item_of_block],
        loss=problem.loss_of(found.cost),
        bound=min(problem.loss_of(found.bound), problem.loss_of(found.cost)),
        gap=relative_gap(problem, found),
        avg_bits=float(prepared.bits[found.assignment, items].sum()),
        latency_us=np.zeros(0) if latency is None else latency[:, found.assignment, items].sum(axis=1),
        prices=prices,
    )


def explain_infeasible(problem: Problem, oracle: LaunchOracle | None, outcome: Outcome, effort: Effort) -> str:
    """Each limit's least alone; then each one's least while the others are held; then one factor for all of them."""
    alone = []
    for resource, _ in problem.slots():
        closed = np.where(np.isinf(problem.cost), np.inf, resource.amount)
        cheapest_scheme = closed.argmin(axis=0).astype(np.int64)
        least = resource.used(np.arange(problem.num_items), cheapest_scheme)
        for i in np.flatnonzero(least > resource.limit):
            alone.append(
                f"{_name(resource, int(i))} {resource.limit[i]:.6g} is {least[i] - resource.limit[i]:.3g}"
                f" below the least possible, {_up(least[i])}"
            )
    if alone:
        return "the budget cannot be met: " + "; ".join(alone) + "; raise it to that or allow cheaper schemes"
    needs = [need for resource, _ in problem.slots() for need in _needs(problem, resource, oracle, effort)]
    text = "each limit can be met alone but not all together"
    if outcome.dual is not None and not outcome.found.complete:
        text = "no assignment that holds every limit was found, though mixtures hold them"
    together = reach(problem, oracle or independent, np.maximum(problem.limits, 1e-300))
    if isinstance(together, Unreachable):
        needs.append(f"raise every limit by {together.excess * 100:.3g}% or a little more")
    return f"the budget cannot be met: {text}: " + ", or ".join(needs)


def _needs(problem: Problem, resource: Resource, oracle: LaunchOracle | None, effort: Effort) -> list[str]:
    """What this limit would have to be while the others are held (found by minimising its usage)."""
    if resource.segment is not None:
        return []
    others = tuple(other for other in problem.resources if other is not resource)
    cost = np.where(np.isinf(problem.cost), np.inf, resource.amount)
    least = cost.min(axis=0)
    scale = max(float(np.where(np.isinf(cost), 0.0, cost).max()), 1e-300)
    swapped = replace(problem, cost=(cost - least) / scale, resources=others, offset=float(least.sum()), scale=scale)
    if others:
        outcome = solve_any(swapped, oracle, effort)
        assignment = outcome.found.assignment
    else:
        assignment = (oracle or independent)(swapped, np.zeros(0), 1.0)[1]
    if assignment is None:
        return []
    used = float(resource.used(np.arange(problem.num_items), assignment)[0])
    return [f"raise {resource.name} from {resource.limit[0]:.6g} to {_up(used)}"]


def _name(resource: Resource, i: int) -> str:
    return resource.name if resource.segment is None else f"{resource.name} of layer {i}"


def _up(value: float) -> str:
    """A limit that is surely enough: the value rounded up in the sixth digit."""
    text = f"{value:.6g}"
    if float(text) >= value:
        return text
    return f"{value + abs(value) * 5e-6:.6g}"
