"""What solve_arrays accepts: every argument checked, with one sentence that names it, then merged into a Problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allocator.problem import Floats, Ints, Problem, Resource
from profiles.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked problem over items (merged blocks), with the way back to the caller's blocks.

    item_of_block: int64 [blocks]. bits: float64 [S, items], weighted so that a column sum over items is the average
    bits. latency_us: float64 [scenarios, S, items] or None. launch: int64 [items] or None.
    """

    problem: Problem
    item_of_block: Ints
    bits: Floats
    latency_us: Floats | None
    launch: Ints | None


def floats(value: ArrayLike, name: str) -> Floats:
    """float64 of anything numeric without NaN."""
    try:
        given = np.asarray(value)
        if given.dtype.kind in "SUcMm":  # numpy would read "4" as 4, and a complex number's real part
            raise TypeError
        array = given.astype(np.float64)
    except (TypeError, ValueError):
        raise SpecError(f"{name} must be an array of numbers") from None
    if np.isnan(array).any():
        at = ", ".join(str(int(i)) for i in np.argwhere(np.isnan(array))[0])
        raise SpecError(f"{name} has NaN" + (f" at [{at}]" if at else "") + "; every value must be a number")
    return array


def integers(value: ArrayLike, name: str, blocks: int) -> Ints:
    """int64 [blocks]."""
    array = np.asarray(value)
    if array.shape != (blocks,):
        raise SpecError(f"{name} must have one entry per block, shape ({blocks},), not {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise SpecError(f"{name} must be integers, not {array.dtype}")
    return array.astype(np.int64)


def _non_negative(array: Floats, name: str) -> Floats:
    if (array < 0).any():
        raise SpecError(f"{name} must not be negative; the least value is {array.min():g}")
    return array


def _finite(array: Floats, name: str) -> Floats:
    if not np.isfinite(array).all():
        raise SpecError(f"{name} must be finite")
    return array


def check_loss(loss: ArrayLike) -> Floats:
    """float64 [blocks, schemes]; +inf forbids."""
    array = floats(loss, "loss")
    if array.ndim != 2 or 0 in array.shape:
        raise SpecError(f"loss must be [blocks, schemes] with at least one of each, not of shape {array.shape}")
    if np.isneginf(array).any():
        raise SpecError("loss must not be -inf; +inf marks a forbidden scheme")
    return array


def check_bits(weight_bits: ArrayLike, shape: tuple[int, int]) -> Floats:
    """float64 [blocks, schemes], finite and not negative."""
    array = _non_negative(_finite(floats(weight_bits, "weight_bits"), "weight_bits"), "weight_bits")
    if array.shape not in ((shape[1],), shape):
        raise SpecError(
            f"weight_bits must be [schemes] ({shape[1]},) or [blocks, schemes] {shape}, not of shape {array.shape}"
        )
    return np.broadcast_to(array, shape)


def check_sizes(sizes: ArrayLike | None, blocks: int) -> Floats:
    """float64 [blocks], positive; ones by default."""
    if sizes is None:
        return np.ones(blocks)
    array = _finite(floats(sizes, "sizes"), "sizes")
    if array.shape != (blocks,):
        raise SpecError(f"sizes must have one entry per block, shape ({blocks},), not {array.shape}")
    if (array <= 0).any():
        raise SpecError(f"sizes must be positive parameter counts; the least is {array.min():g}")
    return array


def check_latency(latency_us: ArrayLike | None, shape: tuple[int, int]) -> Floats | None:
    """float64 [blocks, schemes, scenarios]; inf marks a scheme that cannot run in that scenario."""
    if latency_us is None:
        return None
    array = _non_negative(floats(latency_us, "latency_us"), "latency_us")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[:2] != shape or array.shape[2] == 0:
        raise SpecError(
            f"latency_us must be [blocks, schemes, scenarios] ({shape[0]}, {shape[1]}, n), not of shape {array.shape}"
        )
    return array


def check_limits(max_latency_us: ArrayLike | None, latency: Floats | None) -> Floats:
    """float64 [scenarios]; inf where there is no limit."""
    if max_latency_us is None:
        return np.full(0 if latency is None else latency.shape[2], np.inf)
    if latency is None:
        raise SpecError("max_latency_us needs latency_us: what each scheme of each block takes")
    array = np.atleast_1d(_non_negative(floats(max_latency_us, "max_latency_us"), "max_latency_us"))
    if array.shape != (latency.shape[2],):
        raise SpecError(
            f"max_latency_us must have one entry per scenario, shape ({latency.shape[2]},), not {array.shape}"
        )
    return array


def check_allowed(allowed: ArrayLike | None, pinned: ArrayLike | None, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [blocks, schemes]: what allowed and pinned leave."""
    blocks, schemes = shape
    mask = np.ones(shape, dtype=np.bool_)
    if allowed is not None:
        given = np.asarray(allowed)
        if given.shape not in ((schemes,), shape) or given.dtype != np.bool_:
            raise SpecError(
                f"allowed must be booleans [schemes] or [blocks, schemes] {shape},"
                f" not {given.dtype} of shape {given.shape}"
            )
        mask &= given
    if pinned is not None:
        pins = integers(pinned, "pinned", blocks)
        if ((pins < -1) | (pins >= schemes)).any():
            raise SpecError(f"pinned must be a scheme index in 0..{schemes - 1}, or -1 for a free block")
        held = pins >= 0
        mask[held] &= np.arange(schemes) == pins[held, None]
    return mask


def prepare(
    loss: ArrayLike,
    weight_bits: ArrayLike,
    *,
    avg_bits: ArrayLike | None,
    latency_us: ArrayLike | None,
    max_latency_us: ArrayLike | None,
    sizes: ArrayLike | None,
    allowed: ArrayLike | None,
    pinned: ArrayLike | None,
    groups: ArrayLike | None,
    layers: ArrayLike | None,
    launches: ArrayLike | None,
    scenarios: Sequence[str] | None,
) -> Prepared:
    """Every argument of solve_arrays, checked and merged. Raises SpecError."""
    losses = check_loss(loss)
    shape = (losses.shape[0], losses.shape[1])
    bits, weight = check_bits(weight_bits, shape), check_sizes(sizes, shape[0])
    latency = check_latency(latency_us, shape)
    latency_limits = check_limits(max_latency_us, latency)
    mask = check_allowed(allowed, pinned, shape) & np.isfinite(losses)
    if latency is not None:
        mask &= np.isfinite(latency).all(axis=2)
    item = np.arange(shape[0]) if groups is None else _dense(integers(groups, "groups", shape[0]))
    open_ = np.ones((shape[1], item.max() + 1), dtype=np.bool_)
    np.logical_and.at(open_.T, item, mask)
    if not open_.any(axis=0).all():
        block = int(np.flatnonzero(item == int(np.flatnonzero(~open_.any(axis=0))[0]))[0])
        cause = "it" if groups is None else "its group"
        raise SpecError(
            f"block {block} has no allowed scheme left:"
            f" allowed, pinned, infinite loss and latency together forbid all of {cause}"
        )
    layer = None if layers is None else _dense(integers(layers, "layers", shape[0]))
    share = weight / (weight.sum() if layer is None else np.bincount(layer, weights=weight)[layer])
    merged_bits = _merge(np.where(mask, bits, 0.0) * share[:, None], item, open_)
    resources = []
    if avg_bits is not None:
        resources.append(_bits_resource(avg_bits, merged_bits, item, layer))
    merged_latency = None
    if latency is not None:
        finite = np.where(mask[:, :, None], latency, 0.0)
        merged_latency = np.array([_merge(finite[:, :, i], item, open_) for i in range(latency.shape[2])])
        names = _scenario_names(scenarios, latency.shape[2])
        resources += [
            Resource(name=f"max_latency_us[{name}]", amount=merged_latency[i], limit=latency_limits[i : i + 1])
            for i, name in enumerate(names)
            if np.isfinite(latency_limits[i])
        ]
    if not resources:
        raise SpecError("no budget: give avg_bits, or latency_us with a finite max_latency_us")
    resources = [_within_reach(resource) for resource in resources]
    problem = _shifted(_merge(np.where(mask, losses, 0.0), item, open_), open_, tuple(resources))
    total = _merge(np.where(mask, bits, 0.0) * (weight / weight.sum())[:, None], item, open_)
    launch = None if launches is None else _launch_of_items(integers(launches, "launches", shape[0]), item)
    return Prepared(problem=problem, item_of_block=item, bits=total, latency_us=merged_latency, launch=launch)


def _dense(labels: Ints) -> Ints:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64).reshape(-1)


def _merge(values: Floats, item: Ints, open_: NDArray[np.bool_]) -> Floats:
    """[blocks, S] summed over each item's blocks, as [S, items]; 0 where closed."""
    merged = np.array(
        [np.bincount(item, weights=values[:, s], minlength=open_.shape[1]) for s in range(values.shape[1])]
    )
    return np.where(open_, merged, 0.0)


def _bits_resource(avg_bits: ArrayLike, amount: Floats, item: Ints, layer: Ints | None) -> Resource:
    limit = _finite(floats(avg_bits, "avg_bits"), "avg_bits")
    if (limit <= 0).any():
        raise SpecError(f"avg_bits must be positive, not {limit.min():g}")
    if layer is None:
        if limit.ndim:
            raise SpecError(f"avg_bits must be one number unless layers is given, not of shape {limit.shape}")
        return Resource(name="avg_bits", amount=amount, limit=limit.reshape(1))
    num_layers = int(layer.max()) + 1
    if limit.ndim and limit.shape != (num_layers,):
        raise SpecError(f"avg_bits must be one number or one per layer ({num_layers},), not of shape {limit.shape}")
    of_item = np.zeros(amount.shape[1], dtype=np.int64)
    of_item[item] = layer
    if (of_item[item] != layer).any():
        raise SpecError("groups must not span layers when each layer has its own budget")
    return Resource(name="avg_bits", amount=amount, limit=np.broadcast_to(limit, (num_layers,)).copy(), segment=of_item)


def _within_reach(resource: Resource) -> Resource:
    """A limit beyond what all items together could use never binds: lowered to that, numbers stay in scale."""
    most = resource.amount.max(axis=0)
    if resource.segment is None:
        return replace(resource, limit=np.minimum(resource.limit, most.sum()))
    reach = np.bincount(resource.segment, weights=most, minlength=resource.limit.size)
    return replace(resource, limit=np.minimum(resource.limit, reach))


def _scenario_names(scenarios: Sequence[str] | None, count: int) -> Sequence[str]:
    if scenarios is None:
        return [str(i) for i in range(count)]
    if len(set(scenarios)) < len(scenarios):
        raise SpecError(f"scenarios must differ, not be {', '.join(map(str, scenarios))}")
    if len(scenarios) != count:
        raise SpecError(f"scenarios must name each of latency_us's {count} scenarios, not {len(scenarios)}")
    return scenarios


def _shifted(loss: Floats, open_: NDArray[np.bool_], resources: tuple[Resource, ...]) -> Problem:
    """Each item's best choice at cost 0, and the largest cost 1, so that neither a common offset nor a unit costs
    accuracy.
    """
    least = np.where(open_, loss, np.inf).min(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        cost = np.where(open_, loss - least, np.inf)
        scale = float(np.where(open_, cost, 0.0).max())
        total = np.abs(least).sum() + scale * least.size
    if not np.isfinite(total):
        raise SpecError("loss is too large: sums over blocks pass the largest float64")
    scale = scale if scale > 0 else 1.0
    steps = cost[open_ & (cost > 0)]
    whole = steps.size > 0 and scale < 2**40 and bool((steps == np.rint(steps)).all())
    grain = float(np.gcd.reduce(steps.astype(np.int64))) / scale if whole else 0.0
    return Problem(cost=cost / scale, resources=resources, offset=float(least.sum()), scale=scale, grain=grain)


def _launch_of_items(launch: Ints, item: Ints) -> Ints:
    dense = _dense(launch)
    of_item = np.zeros(int(item.max()) + 1, dtype=np.int64)
    of_item[item] = dense
    if (of_item[item] != dense).any():
        block = int(np.flatnonzero(of_item[item] != dense)[0])
        raise SpecError(f"groups must not span launches: block {block} is tied to a block of another launch")
    return of_item
