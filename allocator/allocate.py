"""allocate: Sensitivity, CostTable and Budget -> Allocation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from allocator.allocation import Allocation, Granularity, LaunchKernel, Uniform
from allocator.arrays import InfeasibleError, Solution, solve_arrays
from allocator.budget import Budget
from allocator.problem import Floats, Ints
from allocator.sensitivity import SHARED_EXPERT, Sensitivity
from allocator.solver import Effort
from costmodel.table import CostTable
from profiles import kernels
from profiles.errors import DataError, SpecError
from profiles.models import LinearId, MoeShape
from profiles.models import model as find_model
from profiles.schemes import QuantScheme

MAX_SCHEMES_PER_LAUNCH = 4
"""A launch has four slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an allocation may look like.

    Attributes:
        granularity: what gets one scheme.
        schemes: those that may be used; None: all that the sensitivity has.
        pinned: linears whose scheme is decided.
        max_schemes: most schemes that a launch may hold.
    """

    granularity: Granularity = Granularity.LINEAR
    schemes: tuple[QuantScheme, ...] | None = None
    pinned: Mapping[LinearId, QuantScheme] = field(default_factory=dict)
    max_schemes: int = MAX_SCHEMES_PER_LAUNCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The problem as arrays, one row a linear.

    loss, bits: [B, S]; latency_us: [B, S, scenarios] (inf: no kernel); sizes: parameters [B].
    """

    ids: tuple[LinearId, ...]
    schemes: tuple[QuantScheme, ...]
    scenarios: tuple[str, ...]
    loss: Floats
    bits: Floats
    latency_us: Floats
    sizes: Floats


def allocate(
    sensitivity: Sensitivity,
    cost_table: CostTable | None,
    budget: Budget,
    *,
    shape: MoeShape | None = None,
    options: Options | None = None,
    effort: Effort | None = None,
) -> Allocation:
    """The schemes of least total loss within the budget.

    Args:
        sensitivity: losses; a (linear, scheme) without one is not offered.
        cost_table: latencies and kernels, needed by a latency limit; a scheme that it does not have is not offered. A
            launch's latency in one scheme is shared out evenly among its experts.
        budget: the limits.
        shape: the model's shape; by default the known model that the sensitivity names.
        options: granularity, schemes, pinned linears, schemes a launch.
        effort: how long to search.

    Raises:
        SpecError, DataError: what was given does not fit together. InfeasibleError: nothing holds the budget.
    """
    options = options or Options()
    shape = shape or find_model(sensitivity.model)
    blocks = blocks_of(sensitivity, cost_table, shape, budget)
    total_weights = float(blocks.sizes.sum())
    avg_bits = budget.avg_weight_bits
    if budget.weight_bytes is not None:
        avg_bits = budget.weight_bytes * 8 / total_weights
    layers = np.array([i.layer for i in blocks.ids])
    mask = _allowed(blocks, options)
    _require_choice(blocks, mask, options)
    limits = np.array([budget.max_latency_us.get(name, np.inf) for name in blocks.scenarios])
    limited = np.isfinite(limits)
    at_most = options.max_schemes if options.granularity is not Granularity.LAYER else None
    try:
        solution = solve_arrays(
            blocks.loss,
            blocks.bits,
            avg_bits=avg_bits,
            latency_us=blocks.latency_us[:, :, limited] if limited.any() else None,
            max_latency_us=limits[limited] if limited.any() else None,
            sizes=blocks.sizes,
            allowed=mask,
            pinned=_pins(blocks, options.pinned),
            groups=groups_of(blocks.ids, options.granularity),
            layers=layers if budget.per_layer else None,
            launches=None if at_most is None else _launches(blocks.ids, options.granularity),
            max_schemes=at_most,
            scenarios=[name for name, is_limited in zip(blocks.scenarios, limited, strict=True) if is_limited],
            effort=effort,
        )
    except InfeasibleError as error:
        if budget.weight_bytes is None:
            raise
        raise InfeasibleError(f"{error} (avg_bits of 1 is {total_weights / 8:,.0f} bytes here)") from error
    return _allocation(sensitivity, cost_table, budget, options, blocks, solution)


def blocks_of(sensitivity: Sensitivity, cost_table: CostTable | None, shape: MoeShape, budget: Budget) -> Blocks:
    """What the solver is given: losses (inf: not offered), bits, latencies. It raises what `allocate` does."""
    ids, schemes, loss = sensitivity.arrays()
    bits, sizes = np.empty_like(loss), np.empty(len(ids))
    for i, block in enumerate(ids):
        if block.expert >= shape.num_experts:
            raise DataError(
                f"sensitivity: expert {block.expert} of layer {block.layer}, but {shape.name} has {shape.num_experts}"
            )
        n, k = shape.shared_gemm(block.linear) if block.expert == SHARED_EXPERT else shape.gemm(block.linear)
        sizes[i], bits[i] = n * k, [scheme.bits_per_weight(k) for scheme in schemes]
    scenarios, latency = _latencies(ids, schemes, cost_table, shape, budget)
    runnable = np.ones_like(loss, dtype=np.bool_) if cost_table is None else np.isfinite(latency).any(axis=2)
    loss = np.where(runnable, loss, np.inf)
    return Blocks(ids=ids, schemes=schemes, scenarios=scenarios, loss=loss, bits=bits, latency_us=latency, sizes=sizes)


def _latencies(
    ids: tuple[LinearId, ...],
    schemes: tuple[QuantScheme, ...],
    cost_table: CostTable | None,
    shape: MoeShape,
    budget: Budget,
) -> tuple[tuple[str, ...], Floats]:
    """Scenarios, and each linear's share of its launch [B, S, scenarios]; inf where the table has no row."""
    if cost_table is None:
        if budget.max_latency_us:
            raise SpecError("a latency limit needs a cost table")
        return (), np.zeros((len(ids), len(schemes), 0))
    rows = cost_table.frame()
    rows = rows[rows["model"] == shape.name]
    if rows.empty:
        have = ", ".join(sorted(cost_table.frame()["model"].unique()))
        raise DataError(f"the cost table has no rows of {shape.name}; it has {have}")
    scenarios = tuple(sorted(rows["scenario"].unique()))
    for name in budget.max_latency_us:
        if name not in scenarios:
            raise SpecError(f"the cost table has no scenario {name!r} for {shape.name}; it has {', '.join(scenarios)}")
    columns = [rows[name].tolist() for name in ("linear", "scheme", "scenario", "latency_us")]
    price = {(linear, scheme, scenario): us for linear, scheme, scenario, us in zip(*columns, strict=True)}
    launches = {_launch_name(block): (1 if block.expert == SHARED_EXPERT else shape.num_experts) for block in ids}
    by_launch = {
        linear: np.array([[price.get((linear, s.name, name), np.inf) / experts for name in scenarios] for s in schemes])
        for linear, experts in launches.items()
    }
    return scenarios, np.array([by_launch[_launch_name(block)] for block in ids])


def _launch_name(block: LinearId) -> str:
    """A linear's name in a cost table."""
    return f"shared_{block.linear.value}" if block.expert == SHARED_EXPERT else block.linear.value


def _labels(keys: Iterable[object]) -> Ints:
    """Equal keys, equal integers."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def groups_of(ids: tuple[LinearId, ...], granularity: Granularity) -> Ints | None:
    """Which linears get one scheme, as equal integers; None: each its own."""
    if granularity is Granularity.LINEAR:
        return None
    if granularity is Granularity.PROJECTION:
        return _labels((i.layer, _launch_name(i)) for i in ids)
    if granularity is Granularity.EXPERT:
        return _labels((i.layer, i.expert) for i in ids)
    return _labels(i.layer for i in ids)


def _launches(ids: tuple[LinearId, ...], granularity: Granularity) -> Ints:
    """Which linears share a launch; with one scheme an expert, both launches of a layer hold the same schemes and count
    as one.
    """
    if granularity is Granularity.EXPERT:
        return _labels((i.layer, i.expert == SHARED_EXPERT) for i in ids)
    return _labels((i.layer, _launch_name(i)) for i in ids)


def _allowed(blocks: Blocks, options: Options) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None:
    if options.schemes is None:
        return None
    unknown = [scheme.name for scheme in options.schemes if scheme not in blocks.schemes]
    if unknown:
        raise SpecError(
            f"the sensitivity has no losses for {', '.join(unknown)};"
            f" it has {', '.join(scheme.name for scheme in blocks.schemes)}"
        )
    return np.array([scheme in options.schemes for scheme in blocks.schemes])


def _require_choice(
    blocks: Blocks, allowed: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] | None, options: Options
) -> None:
    """DataError: a linear with no scheme that is allowed, has a loss, and has a kernel in every limited scenario."""
    open_ = np.isfinite(blocks.loss) & (True if allowed is None else allowed)
    if open_.any(axis=1).all():
        return
    block = blocks.ids[int(np.argmin(open_.any(axis=1)))]
    raise DataError(
        f"layer {block.layer} expert {block.expert} {block.linear.value} has no scheme left: none"
        + (" of those allowed" if options.schemes is not None else "")
        + " has both a loss in the sensitivity and, where there is a cost table, a latency in it"
    )


def _pins(blocks: Blocks, pinned: Mapping[LinearId, QuantScheme]) -> Ints | None:
    if not pinned:
        return None
    index = {block: i for i, block in enumerate(blocks.ids)}
    pins = np.full(len(blocks.ids), -1, dtype=np.int64)
    for block, scheme in pinned.items():
        if block not in index or scheme not in blocks.schemes:
            raise SpecError(
                f"layer {block.layer} expert {block.expert} {block.linear.value} is pinned to {scheme.name},"
                " which the sensitivity does not have"
            )
        pins[index[block]] = blocks.schemes.index(scheme)
    return pins


def _allocation(
    sensitivity: Sensitivity,
    cost_table: CostTable | None,
    budget: Budget,
    options: Options,
    blocks: Blocks,
    solution: Solution,
) -> Allocation:
    rows = np.arange(len(blocks.ids))
    latency = blocks.latency_us[rows, solution.assignment].sum(axis=0)
    bits = float(solution.avg_bits)
    return Allocation(
        model=sensitivity.model,
        gpu=None if cost_table is None else cost_table.gpu.name,
        cost_model_version=None if cost_table is None else cost_table.model_version,
        sensitivity=sensitivity.provenance,
        budget=budget,
        granularity=options.granularity,
        assignment={block: blocks.schemes[s] for block, s in zip(blocks.ids, solution.assignment, strict=True)},
        kernel_configs=() if cost_table is None else _kernels(cost_table, blocks, solution, sensitivity.model),
        avg_weight_bits=bits,
        weight_bytes=round(bits * float(blocks.sizes.sum()) / 8),
        predicted_latency_us={n: float(us) for n, us in zip(blocks.scenarios, latency, strict=True) if np.isfinite(us)},
        predicted_loss=solution.loss,
        bound=solution.bound,
        gap=solution.gap,
        shadow_prices=_prices(solution),
        uniform=tuple(_uniforms(blocks, budget)),
    )


def _prices(solution: Solution) -> dict[str, float]:
    prices = {}
    for name, price in solution.prices.items():
        if isinstance(price, float):
            prices[name] = price
        else:
            prices |= {f"{name}[{i}]": float(value) for i, value in enumerate(price)}
    return prices


def _kernels(cost_table: CostTable, blocks: Blocks, solution: Solution, model: str) -> tuple[LaunchKernel, ...]:
    used = {(_launch_name(block), blocks.schemes[s]) for block, s in zip(blocks.ids, solution.assignment, strict=True)}
    rows = cost_table.frame()
    columns = ["scenario", "linear", "scheme", "config"]
    names = {(linear, scheme.name): scheme for linear, scheme in used}
    return tuple(
        LaunchKernel(scenario=scenario, linear=linear, scheme=names[linear, scheme], config=kernels.parse(config))
        for scenario, linear, scheme, config in rows.loc[rows["model"] == model, columns]
        .astype(str)
        .to_numpy()
        .tolist()
        if (linear, scheme) in names
    )


def _uniforms(blocks: Blocks, budget: Budget) -> Iterable[Uniform]:
    share = blocks.sizes / blocks.sizes.sum()
    layers = np.array([i.layer for i in blocks.ids])
    for s, scheme in enumerate(blocks.schemes):
        if not np.isfinite(blocks.loss[:, s]).all():
            continue
        bits = float((blocks.bits[:, s] * share).sum())
        latency = blocks.latency_us[:, s].sum(axis=0)
        by_scenario = {name: float(us) for name, us in zip(blocks.scenarios, latency, strict=True) if np.isfinite(us)}
        limit = budget.avg_weight_bits
        if budget.weight_bytes is not None:
            limit = budget.weight_bytes * 8 / float(blocks.sizes.sum())
        worst = bits
        if budget.per_layer:
            worst = max(
                float(np.average(blocks.bits[layers == i, s], weights=blocks.sizes[layers == i]))
                for i in set(layers.tolist())
            )
        within = limit is None or worst <= limit * (1 + 1e-12)
        within = within and all(by_scenario.get(n, np.inf) <= us for n, us in budget.max_latency_us.items())
        yield Uniform(
            scheme=scheme,
            avg_weight_bits=bits,
            loss=float(blocks.loss[:, s].sum()),
            latency_us=by_scenario,
            within_budget=within,
        )
