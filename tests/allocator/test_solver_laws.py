"""What must hold of every solution, on instances small enough to try every assignment."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocator import InfeasibleError, solve_arrays
from tests.allocator.instances import Instance, brute_force


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Up to 5 blocks, 4 schemes, 4 limits: whole or real, ties, negative and zero losses, scales of 1e-8 to 1e8."""
    blocks, schemes, scenarios = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = draw(st.booleans())
    loss = rng.integers(-3, 4, (blocks, schemes)).astype(float) if whole else rng.normal(0, 1, (blocks, schemes))
    if draw(st.booleans()):
        loss = loss * 10.0 ** rng.integers(-8, 9, (blocks, 1))
    if draw(st.booleans()):
        loss[rng.random(loss.shape) < 0.2] = np.inf
        loss[:, 0] = np.where(np.isinf(loss).all(axis=1), 1.0, loss[:, 0])
    bits = rng.integers(1, 5, schemes).astype(float) if draw(st.booleans()) else rng.random((blocks, schemes)) * 4
    latency = (
        rng.integers(0, 4, (blocks, schemes, scenarios)).astype(float)
        if whole
        else rng.random((blocks, schemes, scenarios))
    )
    tight = draw(st.floats(0, 1))
    every = np.broadcast_to(bits, loss.shape)
    least, most = every.min(axis=1).mean(), every.max(axis=1).mean()
    limits = latency.min(axis=1).sum(axis=0) + tight * (latency.max(axis=1) - latency.min(axis=1)).sum(axis=0)
    return Instance(
        loss=loss,
        bits=bits,
        avg_bits=float(max(least + draw(st.floats(0, 1)) * (most - least), 0.01)),
        latency_us=latency if scenarios else None,
        max_latency_us=limits if scenarios else None,
    )


@given(instances())
@settings(max_examples=300)
def test_the_optimum_is_found_and_bounded(instance: Instance) -> None:
    """budget holds; bound <= optimum <= loss; and at this size loss = optimum. Infeasible exactly when nothing fits."""
    best = brute_force(instance)
    try:
        solution = solve_arrays(**instance.arguments())
    except InfeasibleError:
        assert best == np.inf
        return
    tolerance = 1e-9 * max(1.0, float(np.abs(instance.loss[np.isfinite(instance.loss)]).max()))
    assert instance.holds(solution.assignment, rel=1e-11)
    assert solution.bound <= best + tolerance
    assert solution.loss == pytest.approx(best, abs=tolerance)
    rows = np.arange(len(instance.loss))
    assert solution.loss == pytest.approx(float(instance.loss[rows, solution.assignment].sum()), abs=tolerance)
    assert solution.avg_bits == pytest.approx(float(instance.all_bits()[rows, solution.assignment].mean()))
    assert solution.gap >= 0


@given(instances(), st.floats(0, 2))
@settings(max_examples=100)
def test_more_bits_never_hurt(instance: Instance, more: float) -> None:
    roomy = Instance(
        loss=instance.loss,
        bits=instance.bits,
        avg_bits=instance.avg_bits + more,
        latency_us=instance.latency_us,
        max_latency_us=instance.max_latency_us,
    )
    try:
        tight = solve_arrays(**instance.arguments())
    except InfeasibleError:
        return
    assert solve_arrays(**roomy.arguments()).loss <= tight.loss + 1e-9 * max(1.0, abs(tight.loss))


@given(instances(), st.floats(-5, 5), st.floats(1e-6, 1e6))
@settings(max_examples=100)
def test_a_common_offset_and_unit_of_loss_change_nothing(instance: Instance, offset: float, unit: float) -> None:
    changed = Instance(
        loss=instance.loss * unit + offset,
        bits=instance.bits,
        avg_bits=instance.avg_bits,
        latency_us=instance.latency_us,
        max_latency_us=instance.max_latency_us,
    )
    try:
        solution = solve_arrays(**instance.arguments())
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve_arrays(**changed.arguments())
        return
    scale = float(np.abs(instance.loss[np.isfinite(instance.loss)]).max()) * unit + abs(offset)
    expected = solution.loss * unit + offset * len(instance.loss)
    assert solve_arrays(**changed.arguments()).loss == pytest.approx(expected, abs=1e-9 * max(scale, 1e-9))


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 6))
@settings(max_examples=60)
def test_the_bound_and_the_budget_hold_where_trying_all_is_too_much(seed: int, blocks: int, schemes: int) -> None:
    """Against the bound of the linear program's prices: any p >= 0 bounds every feasible loss from below."""
    rng = np.random.default_rng(seed)
    loss, bits = rng.lognormal(0, 2, (blocks, schemes)), rng.random((blocks, schemes)) * 8
    sizes = rng.integers(1, 100, blocks).astype(float)
    share = sizes / sizes.sum()
    least, most = (bits.min(axis=1) * share).sum(), (bits.max(axis=1) * share).sum()
    limit = float(rng.uniform(least, most))
    solution = solve_arrays(loss, bits, avg_bits=limit, sizes=sizes)
    used = float((bits[np.arange(blocks), solution.assignment] * share).sum())
    assert used <= limit * (1 + 1e-12)
    price = solution.prices["avg_bits"]
    assert isinstance(price, float)
    relaxed = (loss + price * bits * share[:, None]).min(axis=1).sum() - price * limit
    assert relaxed <= solution.bound + 1e-9 * abs(solution.bound)
    assert solution.bound <= solution.loss
    assert solution.gap <= 1e-9
