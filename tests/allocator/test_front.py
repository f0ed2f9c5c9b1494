"""The Pareto front, and the product of loss and latency."""

import itertools

import numpy as np
import pytest

from allocator import solve_arrays
from allocator.front import pareto_front, solve_product
from profiles.errors import SpecError

BITS = np.array([2.25, 3.25, 4.25, 8.0])


def block(size: int, seed: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], ...]:
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 1.5, (size, 1)) * 4.0**-BITS * rng.lognormal(0, 0.2, (size, 4))
    return loss, rng.random((size, 4)) * BITS + 0.1


def test_a_front_falls_and_no_uniform_scheme_beats_it() -> None:
    loss, _ = block(200, 0)
    front = pareto_front(loss, BITS, num_points=9)
    bits, losses = np.array([p.avg_bits for p in front]), np.array([p.loss for p in front])
    assert (np.diff(bits) > 0).all()
    assert (np.diff(losses) < 0).all()
    assert bits[0] == pytest.approx(2.25)
    assert bits[-1] == pytest.approx(8.0)
    for scheme in range(4):
        assert solve_arrays(loss, BITS, avg_bits=BITS[scheme]).loss <= loss[:, scheme].sum()
    assert max(point.gap for point in front) <= 1e-6


def test_a_front_keeps_the_other_limits() -> None:
    loss, latency = block(50, 1)
    limit = latency.min(axis=1).sum() * 2
    front = pareto_front(loss, BITS, num_points=5, latency_us=latency, max_latency_us=[limit])
    assert len(front) > 2
    assert all(point.latency_us[0] <= limit * (1 + 1e-12) for point in front)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_product_equals_trying_all(seed: int, weight: float) -> None:
    loss, latency = block(5, seed)
    best = min(
        float(loss[np.arange(5), x].sum() ** weight * latency[np.arange(5), x].sum() ** (1 - weight))
        for x in map(np.array, itertools.product(range(4), repeat=5))
        if BITS[x].mean() <= 4.0
    )
    found = solve_product(loss, BITS, latency_us=latency, loss_weight=weight, avg_bits=4.0)
    assert best * (1 - 1e-12) <= found.value <= best * (1 + 1e-4)
    assert found.bound <= best * (1 + 1e-12)


def test_the_product_of_a_layer_is_certified() -> None:
    loss, latency = block(180, 0)
    found = solve_product(loss, BITS, latency_us=latency, loss_weight=0.75, avg_bits=5.0)
    rows = np.arange(180)
    assignment = found.solution.assignment
    assert found.value == pytest.approx(loss[rows, assignment].sum() ** 0.75 * latency[rows, assignment].sum() ** 0.25)
    assert BITS[assignment].mean() <= 5.0
    assert 0 <= found.gap <= 1e-4


def test_what_cannot_be_is_refused() -> None:
    loss, latency = block(5, 0)
    with pytest.raises(SpecError, match="loss_weight"):
        solve_product(loss, BITS, latency_us=latency, loss_weight=1.5, avg_bits=4.0)
    with pytest.raises(SpecError, match="positive totals"):
        solve_product(-loss, BITS, latency_us=latency, loss_weight=0.5, avg_bits=4.0)
    with pytest.raises(SpecError, match="num_points"):
        pareto_front(loss, BITS, num_points=1)
    with pytest.raises(SpecError, match="avg_bits"):
        pareto_front(loss, BITS, avg_bits=3.0)
