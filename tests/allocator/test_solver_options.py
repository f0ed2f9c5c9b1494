"""What solve_arrays can be told: forbidden and pinned schemes, groups, layers, launches, sizes; and what it refuses."""

import itertools
from typing import Any

import numpy as np
import pytest

from allocator import InfeasibleError, solve_arrays
from profiles.errors import SpecError, UserError
from tests.allocator.instances import realistic

BITS = np.array([2.0, 4.0, 8.0])


def some_loss(blocks: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 1.5, (blocks, 1)) * 4.0**-BITS


def test_forbidden_schemes_are_not_used() -> None:
    loss = some_loss(50)
    allowed = np.random.default_rng(1).random(loss.shape) < 0.6
    allowed[:, 0] = True
    by_mask = solve_arrays(loss, BITS, avg_bits=4.0, allowed=allowed)
    by_loss = solve_arrays(np.where(allowed, loss, np.inf), BITS, avg_bits=4.0)
    assert allowed[np.arange(50), by_mask.assignment].all()
    assert by_mask.loss == by_loss.loss


def test_a_scheme_list_forbids_for_all() -> None:
    solution = solve_arrays(some_loss(50), BITS, avg_bits=4.0, allowed=[True, False, True])
    assert set(solution.assignment.tolist()) == {0, 2}


def test_pinned_blocks_keep_their_scheme_and_the_rest_pays() -> None:
    loss = some_loss(50)
    pinned = np.full(50, -1)
    pinned[:10] = 2
    solution = solve_arrays(loss, BITS, avg_bits=4.0, pinned=pinned)
    assert (solution.assignment[:10] == 2).all()
    assert solution.avg_bits <= 4.0
    assert solution.loss > solve_arrays(loss, BITS, avg_bits=4.0).loss


def test_a_scheme_that_cannot_run_is_not_used() -> None:
    latency = np.ones((20, 3, 1))
    latency[:, 2] = np.inf
    solution = solve_arrays(some_loss(20), BITS, avg_bits=8.0, latency_us=latency, max_latency_us=[100.0])
    assert (solution.assignment < 2).all()


def test_groups_get_one_scheme_and_cost_their_sum() -> None:
    loss = some_loss(60)
    groups = np.repeat(np.arange(20), 3)
    tied = solve_arrays(loss, BITS, avg_bits=4.0, groups=groups)
    merged = solve_arrays(loss.reshape(20, 3, 3).sum(axis=1), BITS, avg_bits=4.0)
    assert (tied.assignment.reshape(20, 3) == tied.assignment[::3, None]).all()
    assert tied.loss == pytest.approx(merged.loss, rel=1e-12)


def test_sizes_weigh_the_average() -> None:
    sizes = np.array([1.0, 99.0])
    solution = solve_arrays([[4.0, 0.0], [1.0, 0.0]], [2.0, 4.0], avg_bits=2.5, sizes=sizes)
    assert solution.assignment.tolist() == [1, 0]
    assert solution.avg_bits == pytest.approx((4 + 2 * 99) / 100)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_per_layer_is_each_layer_s_optimum(seed: int) -> None:
    loss, layers = some_loss(90, seed), np.repeat([7, 3, 5], 30)
    solution = solve_arrays(loss, BITS, avg_bits=3.1, layers=layers)
    alone = [solve_arrays(loss[layers == layer], BITS, avg_bits=3.1) for layer in (7, 3, 5)]
    assert solution.loss == pytest.approx(sum(part.loss for part in alone), rel=1e-12)
    for layer in (7, 3, 5):
        assert BITS[solution.assignment[layers == layer]].mean() <= 3.1
    assert solution.gap <= 1e-9


def test_budgets_per_layer_beside_a_latency_limit_of_all() -> None:
    rng = np.random.default_rng(0)
    loss, layers = some_loss(240), np.repeat(np.arange(8), 30)
    latency = rng.random((240, 3, 1)) + BITS[:, None] / 4
    free = solve_arrays(loss, BITS, avg_bits=4.0, layers=layers, latency_us=latency)
    limit = free.latency_us * 0.9
    solution = solve_arrays(loss, BITS, avg_bits=4.0, layers=layers, latency_us=latency, max_latency_us=limit)
    assert (solution.latency_us <= limit * (1 + 1e-12)).all()
    assert max(BITS[solution.assignment[layers == layer]].mean() for layer in range(8)) <= 4.0
    assert free.loss < solution.loss
    assert solution.gap <= 1e-4


def test_budgets_per_layer_beside_latency_limits_at_a_model_s_size() -> None:
    loss, bits, sizes, latency = realistic(layers=24, experts=64, seed=0)
    layers = np.repeat(np.arange(24), 64 * 3)
    limits = solve_arrays(loss, bits, avg_bits=4.25, sizes=sizes, latency_us=latency).latency_us * 0.9
    arguments: dict[str, Any] = {"avg_bits": 4.25, "sizes": sizes, "latency_us": latency, "max_latency_us": limits}
    solution = solve_arrays(loss, bits, layers=layers, **arguments)
    assert (solution.latency_us <= limits * (1 + 1e-12)).all()
    assert max(bits[solution.assignment[layers == layer]].mean() for layer in range(24)) <= 4.25 * (1 + 1e-12)
    assert solve_arrays(loss, bits, **arguments).bound <= solution.bound * (1 + 1e-9)
    assert 0 <= solution.gap <= 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_budgets_per_layer_and_latency_equal_trying_all(seed: int) -> None:
    """Six layers of one block each: the many-limits path, on something that can be tried out."""
    rng = np.random.default_rng(seed)
    loss, bits, latency = rng.random((6, 3)), rng.random((6, 3)) * 4 + 1, rng.random((6, 3, 1))
    limits = bits.min(axis=1) + rng.random(6) * (bits.max(axis=1) - bits.min(axis=1))
    best, most = np.inf, float(latency.mean(axis=1).sum())
    for choice in itertools.product(range(3), repeat=6):
        x = (np.arange(6), np.array(choice))
        if (bits[x] <= limits).all() and latency[x].sum() <= most:
            best = min(best, float(loss[x].sum()))
    arguments: dict[str, Any] = {
        "avg_bits": limits,
        "layers": np.arange(6),
        "latency_us": latency,
        "max_latency_us": [most],
    }
    if np.isinf(best):
        with pytest.raises(InfeasibleError):
            solve_arrays(loss, bits, **arguments)
        return
    solution = solve_arrays(loss, bits, **arguments)
    assert solution.loss == pytest.approx(best)
    assert solution.bound <= best + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_at_most_k_schemes_a_launch_equals_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loss, bits = rng.random((5, 4)), np.array([1.0, 2.0, 3.0, 4.0])
    launches, most = np.array([0, 0, 0, 1, 1]), 1 + seed % 2
    limit = rng.uniform(1.2, 3.5)
    best = np.inf
    for choice in itertools.product(range(4), repeat=5):
        x = np.array(choice)
        if bits[x].mean() <= limit and all(len(set(x[launches == i])) <= most for i in (0, 1)):
            best = min(best, float(loss[np.arange(5), x].sum()))
    solution = solve_arrays(loss, bits, avg_bits=limit, launches=launches, max_schemes=most)
    assert solution.loss == pytest.approx(best)
    assert solution.bound <= best + 1e-9


def test_at_most_k_schemes_a_launch_at_a_model_s_size() -> None:
    loss, bits, sizes, latency = realistic(layers=12, experts=64, seed=0)
    launches = np.repeat(np.arange(12), 64 * 3)
    free = solve_arrays(loss, bits, avg_bits=4.25, sizes=sizes, latency_us=latency)
    limits = free.latency_us * 0.95
    solution = solve_arrays(
        loss,
        bits,
        avg_bits=4.25,
        sizes=sizes,
        latency_us=latency,
        max_latency_us=limits,
        launches=launches,
        max_schemes=3,
    )
    for launch in range(12):
        assert len(set(solution.assignment[launches == launch].tolist())) <= 3
    assert (solution.latency_us <= limits * (1 + 1e-12)).all()
    assert 0 <= solution.gap <= 0.02


def test_with_many_schemes_subsets_grow_and_the_bound_stays_valid() -> None:
    rng = np.random.default_rng(0)
    loss, bits = rng.random((60, 20)), np.linspace(1, 8, 20)
    launches = np.repeat([0, 1], 30)
    solution = solve_arrays(loss, bits, avg_bits=4.0, launches=launches, max_schemes=4)
    assert max(len(set(solution.assignment[launches == i].tolist())) for i in (0, 1)) <= 4
    free = solve_arrays(loss, bits, avg_bits=4.0)
    assert free.loss - 1e-9 <= solution.bound <= solution.loss


def test_shadow_price_bounds_what_more_bits_buy() -> None:
    loss, bits, sizes, _ = realistic(layers=4, experts=16, seed=0)
    now = solve_arrays(loss, bits, avg_bits=4.0, sizes=sizes)
    more = solve_arrays(loss, bits, avg_bits=4.1, sizes=sizes)
    price = now.prices["avg_bits"]
    assert isinstance(price, float)
    assert 0 < now.loss - more.loss <= 0.1 * price + (now.loss - now.bound)


def test_infeasible_bits_say_by_how_much() -> None:
    with pytest.raises(InfeasibleError, match=r"avg_bits 1\.5 is 0\.5 below the least possible, 2;"):
        solve_arrays(some_loss(10), BITS, avg_bits=1.5)


def test_infeasible_together_says_what_would_do_and_it_does() -> None:
    """Lean schemes are slow here: either limit can be met, both cannot."""
    loss, latency = some_loss(40), np.tile(np.array([9.0, 5.0, 1.0])[None, :, None], (40, 1, 1))
    arguments: dict[str, Any] = {"latency_us": latency, "scenarios": ["decode"]}
    with pytest.raises(InfeasibleError, match="not all together") as caught:
        solve_arrays(loss, BITS, avg_bits=2.5, max_latency_us=[200.0], **arguments)
    text = str(caught.value)
    assert "raise every limit by" in text
    bits = float(text.split("raise avg_bits from 2.5 to ")[1].split(",")[0])
    latency_us = float(text.split("raise max_latency_us[decode] from 200 to ")[1].split(",")[0])
    assert solve_arrays(loss, BITS, avg_bits=bits, max_latency_us=[200.0], **arguments).avg_bits <= bits
    assert solve_arrays(loss, BITS, avg_bits=2.5, max_latency_us=[latency_us], **arguments).latency_us[0] <= latency_us


LOSS = some_loss(4)
LATENCY = np.ones((4, 3, 2))
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"loss": np.ones(3)}, "loss"),
    ({"loss": np.ones((0, 3))}, "loss"),
    ({"loss": np.where(np.arange(3) == 1, np.nan, LOSS)}, "loss has NaN at"),
    ({"loss": np.where(np.arange(3) == 1, -np.inf, LOSS)}, "-inf"),
    ({"loss": [["a", "b", "c"]]}, "loss must be an array of numbers"),
    ({"avg_bits": "3"}, "avg_bits must be an array of numbers"),
    ({"loss": np.ones((4, 3), dtype=complex)}, "loss must be an array of numbers"),
    ({"latency_us": LATENCY, "max_latency_us": [1.0, 1.0], "scenarios": ["a", "a"]}, "scenarios must differ"),
    ({"loss": np.full((4, 3), 1e308)}, "loss is too large"),
    ({"loss": np.full((4, 3), np.inf)}, "no allowed scheme"),
    ({"weight_bits": [2.0, 4.0]}, "weight_bits"),
    ({"weight_bits": [2.0, -4.0, 8.0]}, "weight_bits must not be negative"),
    ({"weight_bits": [2.0, np.nan, 8.0]}, "weight_bits has NaN"),
    ({"weight_bits": [2.0, np.inf, 8.0]}, "weight_bits must be finite"),
    ({"avg_bits": None}, "no budget"),
    ({"avg_bits": -1.0}, "avg_bits must be positive"),
    ({"avg_bits": np.nan}, "avg_bits has NaN"),
    ({"avg_bits": [4.0, 4.0]}, "avg_bits must be one number"),
    ({"latency_us": LATENCY, "max_latency_us": [1.0]}, "max_latency_us must have one entry per scenario"),
    ({"latency_us": LATENCY, "max_latency_us": [1.0, np.nan]}, "max_latency_us has NaN"),
    ({"latency_us": -LATENCY, "max_latency_us": [1.0, 1.0]}, "latency_us must not be negative"),
    ({"latency_us": LATENCY[:2], "max_latency_us": [1.0, 1.0]}, "latency_us must be"),
    ({"max_latency_us": [1.0]}, "max_latency_us needs latency_us"),
    ({"sizes": [1.0, 2.0]}, "sizes"),
    ({"sizes": [1.0, 2.0, 0.0, 1.0]}, "sizes must be positive"),
    ({"allowed": np.ones((4, 2), dtype=bool)}, "allowed"),
    ({"allowed": np.ones((4, 3))}, "allowed must be booleans"),
    ({"allowed": [False, False, False]}, "block 0 has no allowed scheme"),
    ({"pinned": [0, 0, 0, 3]}, "pinned"),
    ({"pinned": [0.0, 0.0, 0.0, 0.0]}, "pinned must be integers"),
    ({"groups": [0, 1]}, "groups"),
    ({"launches": [0, 0, 1, 1]}, "launches and max_schemes"),
    ({"launches": [0, 0, 1, 1], "max_schemes": 0}, "max_schemes"),
    ({"launches": [0, 0, 1, 1], "max_schemes": 2, "groups": [0, 1, 1, 2]}, "groups must not span launches"),
    ({"layers": [0, 0, 1, 1], "groups": [0, 1, 1, 2]}, "groups must not span layers"),
    ({"layers": [0, 0, 1, 1], "avg_bits": [3.0, 3.0, 3.0]}, "avg_bits must be one number or one per layer"),
    ({"latency_us": LATENCY, "max_latency_us": [9.0, 9.0], "scenarios": ["decode"]}, "scenarios"),
]


@pytest.mark.parametrize(("change", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"loss": LOSS, "weight_bits": BITS, "avg_bits": 4.0} | change
    with pytest.raises(SpecError) as caught:
        solve_arrays(arguments.pop("loss"), arguments.pop("weight_bits"), **arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)
