"""More than one answer: the Pareto front of loss against average bits, and the paper's product of loss and latency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from allocator.arrays import Solution, solve_arrays
from allocator.checks import check_bits, check_latency, check_loss, check_sizes
from allocator.problem import Floats
from profiles.errors import SpecError

_MOST_SOLVES = 60


def pareto_front(loss: ArrayLike, weight_bits: ArrayLike, *, num_points: int = 17, **limits: Any) -> list[Solution]:
    """Solutions of least loss at average bits from the least possible to where more bits no longer help.

    limits: solve_arrays's other arguments, but avg_bits. num_points: at least 2, evenly spaced in bits. Every point has
    its own bound; a point that another one equals or beats in both loss and bits is left out. Raises what solve_arrays
    raises.
    """
    if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 2:
        raise SpecError(f"num_points must be a whole number of at least 2, not {num_points!r}")
    if "avg_bits" in limits:
        raise SpecError("avg_bits is what a front runs over; give the other limits alone")
    losses = check_loss(loss)
    shape = (losses.shape[0], losses.shape[1])
    bits = check_bits(weight_bits, shape)
    most = solve_arrays(losses, bits, avg_bits=max(float(bits.max()), 1e-300) * (1 + 1e-9), **limits)
    # Bits as the loss, and the same limits: the leanest assignment that they admit.
    weight = check_sizes(limits.get("sizes"), shape[0])
    cost = np.where(np.isinf(losses), np.inf, bits * (weight / weight.sum())[:, None])
    least = solve_arrays(cost, bits, avg_bits=max(float(bits.max()), 1e-300) * (1 + 1e-9), **limits)
    points = [most]
    for limit in np.linspace(most.avg_bits, least.avg_bits, num_points)[1:]:
        point = solve_arrays(losses, bits, avg_bits=max(limit * (1 + 1e-12), 1e-300), **limits)
        if point.loss > points[-1].loss and point.avg_bits < points[-1].avg_bits:
            points.append(point)
    return points[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductSolution:
    """solution: the assignment; its own bound and gap are those of the weighted sum that found it. value: loss^r *
    latency^(1 - r). bound: no assignment within the limits has a smaller value. gap: (value - bound) / value.
    """

    solution: Solution
    latency_us: float
    value: float
    bound: float
    gap: float


def solve_product(
    loss: ArrayLike,
    weight_bits: ArrayLike,
    *,
    latency_us: ArrayLike,
    loss_weight: float,
    good_gap: float = 1e-4,
    **limits: Any,
) -> ProductSolution:
    """Least L^r * T^(1-r) within average bits: MxMoE's objective for one MoE block (arXiv 2505.05799), r = loss_weight.

    loss: float [B, S], with positive totals. latency_us: float [B, S], one scenario. limits: solve_arrays's other
    arguments. The product is quasi-concave in (L, T), so its least value over the attainable pairs is at a corner of
    their convex hull, and a corner minimises some weighted sum a * L + b * T. Corners are found from the outside in:
    every weighted solve also bounds the hull by a line; between two known corners the lines' crossing bounds the
    product there, and the lowest crossing is refined first, until the best corner is within good_gap of it.
    """
    if isinstance(loss_weight, bool) or not isinstance(loss_weight, (int, float)) or not 0 <= loss_weight <= 1:
        raise SpecError(f"loss_weight must be a number from 0 to 1, not {loss_weight!r}")
    losses = check_loss(loss)
    times = check_latency(latency_us, (losses.shape[0], losses.shape[1]))
    if times is None or times.shape[2] != 1:
        raise SpecError("latency_us must be [blocks, schemes]: the product takes one scenario")
    hull = _Hull(losses, times[:, :, 0], weight_bits, float(loss_weight), limits)
    return hull.refine(good_gap)


class _Hull:
    """The lower left hull of (loss, latency), as far as it is known: corners, and a line under all pairs for each."""

    def __init__(
        self, loss: Floats, time: Floats, weight_bits: ArrayLike, power: float, limits: dict[str, Any]
    ) -> None:
        self.weight_bits, self.power, self.limits = weight_bits, power, limits
        self.loss, self.time = np.where(np.isinf(time), np.inf, loss), np.where(np.isinf(loss), np.inf, time)
        self.best: ProductSolution | None = None
        self.corners: list[tuple[float, float]] = []
        self.lines: list[tuple[float, float, float]] = []  # a * L + b * T >= c

    def visit(self, a: float, b: float) -> None:
        """Minimise a * L + b * T; remember the pair it finds and the line it proves."""
        finite = np.isfinite(self.loss)
        mixed = np.where(finite, a * np.where(finite, self.loss, 0.0) + b * np.where(finite, self.time, 0.0), np.inf)
        solution = solve_arrays(mixed, self.weight_bits, **self.limits)
        rows = np.arange(self.loss.shape[0])
        pair = float(self.loss[rows, solution.assignment].sum()), float(self.time[rows, solution.assignment].sum())
        if min(pair) <= 0:
            raise SpecError(
                f"the product needs positive totals, but an assignment has loss {pair[0]:g} and latency {pair[1]:g}"
            )
        self.corners.append(pair)
        self.lines.append((a, b, solution.bound))
        value = self.value(*pair)
        if self.best is None or value < self.best.value:
            self.best = ProductSolution(solution=solution, latency_us=pair[1], value=value, bound=0.0, gap=1.0)

    def value(self, loss: float, time: float) -> float:
        """The product of one pair."""
        return float(max(loss, 0.0) ** self.power * max(time, 0.0) ** (1 - self.power))

    def crossings(self) -> list[tuple[float, float, float]]:
        """Corners of the region above all lines, each with its product: nothing attainable has less than the least of
        them.
        """
        found = []
        for i, (a, b, c) in enumerate(self.lines):
            for d, e, f in self.lines[:i]:
                det = a * e - b * d
                if abs(det) <= 1e-15 * (abs(a * e) + abs(b * d)):
                    continue
                loss, time = (c * e - b * f) / det, (a * f - c * d) / det
                if all(p * loss + q * time >= r - 1e-12 * (abs(r) + abs(p * loss)) for p, q, r in self.lines):
                    found.append((self.value(loss, time), loss, time))
        return sorted(found)

    def refine(self, good_gap: float) -> ProductSolution:
        """Visit the direction of the lowest crossing until the best corner is that good, or nothing new is found."""
        self.visit(1.0, 0.0)
        self.visit(0.0, 1.0)
        asked: set[tuple[float, float]] = set()
        for _ in range(_MOST_SOLVES):
            assert self.best is not None
            crossings = self.crossings()
            if not crossings or self.best.value - crossings[0][0] <= good_gap * self.best.value:
                break
            loss = crossings[0][1]
            left = max(
                (corner for corner in self.corners if corner[0] <= loss * (1 + 1e-12)), default=min(self.corners)
            )
            right = min(
                (corner for corner in self.corners if corner[0] >= left[0] and corner[1] < left[1]), default=left
            )
            a, b = left[1] - right[1], right[0] - left[0]
            if (a, b) in asked or a <= 0 or b <= 0:
                break
            asked.add((a, b))
            self.visit(a, b)
        return self._result()

    def _result(self) -> ProductSolution:
        best = self.best
        assert best is not None
        crossings = self.crossings()
        bound = min(crossings[0][0] if crossings else best.value, best.value)
        return ProductSolution(
            solution=best.solution,
            latency_us=best.latency_us,
            value=best.value,
            bound=bound,
            gap=(best.value - bound) / best.value,
        )
