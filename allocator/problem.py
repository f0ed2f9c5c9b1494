"""The problem as the solver sees it: one scheme per item, minimum cost, a few resources with limits.

Arrays are scheme-major, [S, B], so that a minimum over schemes is S passes over contiguous rows. A forbidden (scheme,
item) pair has cost inf and usage 0. Items are the caller's blocks after tied blocks were merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: A limit holds when used <= limit + FEASIBLE * (the most that all items together could use).
FEASIBLE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What every choice uses of one thing, and how much of it there is.

    amount: float64 [S, B]. limit: float64 [L]: L = 1 for one limit over all items, else one limit per segment.
    segment: int64 [B], the limit an item counts against; None when there is one limit.
    """

    name: str
    amount: Floats
    limit: Floats
    segment: Ints | None = None

    def used(self, items: Ints, assignment: Ints) -> Floats:
        """float64 [L]: what these items, so assigned, use of each limit."""
        chosen = self.amount[assignment, items]
        if self.segment is None:
            return np.array([chosen.sum()])
        return np.bincount(self.segment[items], weights=chosen, minlength=self.limit.size).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Minimise the sum of cost[x_b, b] subject to every resource's limits.

    cost: float64 [S, B], shifted so that each item's best choice costs 0; the caller's loss is offset + scale * cost.
    grain: every cost is a multiple of it (integer losses); 0 when no such step is known.
    """

    cost: Floats
    resources: tuple[Resource, ...]
    offset: float
    scale: float
    grain: float = 0.0

    @property
    def num_schemes(self) -> int:
        """S."""
        return int(self.cost.shape[0])

    @property
    def num_items(self) -> int:
        """B."""
        return int(self.cost.shape[1])

    @property
    def num_limits(self) -> int:
        """M."""
        return sum(resource.limit.size for resource in self.resources)

    @property
    def limits(self) -> Floats:
        """float64 [M]: every resource's limits, one after the other."""
        return np.concatenate([resource.limit for resource in self.resources])

    def slots(self) -> Sequence[tuple[Resource, slice]]:
        """Each resource with its place among the M limits."""
        places, start = [], 0
        for resource in self.resources:
            places.append((resource, slice(start, start + resource.limit.size)))
            start += resource.limit.size
        return places

    def spans(self) -> Floats:
        """float64 [M]: the most that the items of each limit could use; what a usage is small or large against."""
        spans = []
        for resource in self.resources:
            most = resource.amount.max(axis=0)
            spans.append(
                np.array([most.sum()])
                if resource.segment is None
                else np.bincount(resource.segment, weights=most, minlength=resource.limit.size)
            )
        most_used = np.concatenate(spans)
        return np.where(most_used > 0, most_used, 1.0)

    def tolerance(self) -> Floats:
        """float64 [M]: how far a sum may pass a limit through rounding alone."""
        return FEASIBLE * self.spans()

    def charge(self, prices: Floats) -> Floats:
        """float64 [S, B]: what every choice's usage costs at these prices [M]."""
        total = np.zeros_like(self.cost)
        for resource, place in self.slots():
            price = prices[place]
            if not price.any():
                continue
            total += resource.amount * (price[0] if resource.segment is None else price[resource.segment])
        return total

    def priced(self, prices: Floats) -> Floats:
        """float64 [S, B]: cost plus charge; inf where forbidden."""
        return self.cost + self.charge(prices)

    def cost_of(self, assignment: Ints) -> float:
        """The total cost of an assignment [B]."""
        return float(self.cost[assignment, np.arange(self.num_items)].sum())

    def used(self, assignment: Ints) -> Floats:
        """float64 [M]: what an assignment [B] uses of every limit."""
        items = np.arange(self.num_items)
        return np.concatenate([resource.used(items, assignment) for resource in self.resources])

    def moves(self, items: Ints, schemes: Ints, assignment: Ints) -> Floats:
        """float64 [n, M]: how usage changes when item items[i] goes from its assigned scheme to schemes[i]."""
        change = np.zeros((items.size, self.num_limits))
        for resource, place in self.slots():
            delta = resource.amount[schemes, items] - resource.amount[assignment[items], items]
            column = place.start if resource.segment is None else place.start + resource.segment[items]
            change[np.arange(items.size), column] = delta
        return change

    def fits(self, assignment: Ints) -> bool:
        """Whether an assignment [B] holds every limit, to the tolerance."""
        return bool((self.used(assignment) <= self.limits + self.tolerance()).all())

    def ceiling(self) -> float:
        """What no assignment costs more than."""
        return float(np.where(np.isfinite(self.cost), self.cost, 0.0).max(axis=0).sum()) * (1 + 1e-9)

    def improves_on(self, cost: float) -> float:
        """What an assignment cheaper than this one costs at most."""
        return cost - max(self.grain * (1 - 1e-6), 1e-14 * (1.0 + abs(cost)))

    def lift(self, bound: float) -> float:
        """A lower bound raised to the next value that a cost can take."""
        return bound if not self.grain else max(bound, float(np.ceil(bound / self.grain - 1e-6)) * self.grain)

    def loss_of(self, cost: float) -> float:
        """A cost in the caller's units."""
        return float(self.offset + self.scale * cost)


def cheapest(priced: Floats) -> tuple[Floats, Ints]:
    """Column minima [B] and where they are [B] of a [S, B] array (first of equals), faster than argmin over a short
    axis.
    """
    best = priced[0].copy()
    where = np.zeros(priced.shape[1], dtype=np.int64)
    for scheme in range(1, priced.shape[0]):
        better = priced[scheme] < best
        np.copyto(best, priced[scheme], where=better)
        where[better] = scheme
    return best, where
