"""Equal to the MILP optimum on instances that a MILP solver can do, the hard classes included."""

import numpy as np
import pytest

from allocator import solve_arrays
from tests.allocator.instances import Instance, by_milp, hard

CASES = [
    (kind, blocks, schemes, scenarios)
    for kind in ("random", "strong", "subset", "real")
    for blocks, schemes, scenarios in ((20, 4, 0), (50, 8, 1), (100, 8, 2), (200, 4, 2), (200, 8, 0), (40, 6, 3))
]


@pytest.mark.parametrize(("kind", "blocks", "schemes", "scenarios"), CASES)
def test_equals_milp(kind: str, blocks: int, schemes: int, scenarios: int) -> None:
    instance = hard(kind, blocks=blocks, schemes=schemes, scenarios=scenarios, seed=blocks + schemes)
    solution = solve_arrays(**instance.arguments())
    expected = by_milp(instance)
    assert instance.holds(solution.assignment, rel=1e-11)
    assert solution.loss <= expected + 1e-9 * abs(expected)
    assert solution.bound <= expected + 1e-9 * abs(expected)
    assert solution.gap <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [300, 1000])
@pytest.mark.parametrize("scenarios", [0, 1, 2])
def test_equals_milp_at_a_layer_s_size(blocks: int, scenarios: int) -> None:
    instance = hard("real", blocks=blocks, schemes=8, scenarios=scenarios, seed=blocks)
    solution = solve_arrays(**instance.arguments())
    assert instance.holds(solution.assignment, rel=1e-11)
    assert solution.loss == pytest.approx(by_milp(instance), rel=1e-8)  # HiGHS has been 1.5e-9 above


def test_identical_blocks_share_the_budget() -> None:
    """20,001 equal blocks, every one tied: the mixture has to be dealt out, to the last block."""
    loss = np.tile([4.0, 1.0, 0.0], (20_001, 1))
    solution = solve_arrays(loss, [2.0, 4.0, 8.0], avg_bits=3.0)
    assert solution.loss == 4.0 * 10_001 + 10_000
    assert solution.gap <= 2e-5  # the odd block's half bit cannot be spent: the bound does not know


def test_losses_of_huge_and_tiny_scale() -> None:
    rng = np.random.default_rng(0)
    for exponent in (-300, 0, 290):
        loss = rng.random((30, 4)) * 10.0**exponent
        instance = Instance(loss=loss / 10.0**exponent, bits=np.array([1.0, 2.0, 3.0, 4.0]), avg_bits=2.3)
        solution = solve_arrays(loss, instance.bits, avg_bits=2.3)
        assert solution.loss / 10.0**exponent == pytest.approx(by_milp(instance), rel=1e-9)


def test_equal_losses_everywhere_and_zero() -> None:
    for value in (0.0, 5.0, -5.0):
        solution = solve_arrays(np.full((100, 3), value), [1.0, 2.0, 3.0], avg_bits=1.5)
        assert solution.loss == value * 100
        assert solution.bound == solution.loss
        assert solution.avg_bits <= 1.5


def test_limits_far_beyond_use_and_uses_of_nothing() -> None:
    loss = np.array([[3.0, 1.0], [2.0, 0.5]])
    latency = np.zeros((2, 2, 3))
    latency[:, 1, 1] = 1e-200
    solution = solve_arrays(loss, [2.0, 4.0], avg_bits=1e12, latency_us=latency, max_latency_us=[0.0, 1e12, 5.0])
    assert solution.assignment.tolist() == [1, 1]
    assert solution.bound == solution.loss == 1.5
