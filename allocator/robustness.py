"""Whether an allocation holds up under other loads, and one that is made for several.

A load changes two things. Which experts its tokens go to changes what their errors weigh (`reweighted`); how many they
are changes latency (a scenario of the cost table). Regret is against the best allocation for that load alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog

from allocator.allocate import Options, allocate, blocks_of, groups_of
from allocator.allocation import Allocation
from allocator.arrays import solve_arrays
from allocator.budget import Budget
from allocator.problem import Floats
from allocator.sensitivity import SCHEMA_VERSION, SHARED_EXPERT, Sensitivity
from costmodel.table import CostTable
from profiles.errors import DataError, SpecError
from profiles.loads import TokenLoad
from profiles.models import MoeShape

_MOST_SOLVES = 40
_GOOD_GAP = 1e-3
_HALF_A_TOKEN = 0.5
"""What calibration counts for an expert that no token reached."""

Loads = Mapping[int, TokenLoad]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRegret:
    """Under one load: the allocation's loss, the least within the same budget, and loss / best - 1."""

    load: str
    loss: float
    best: float
    regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRegret:
    """In one scenario: the allocation's latency, the least with no more bits and no more loss, latency / best - 1. The
    least may have any number of schemes a launch, so that the regret is never understated.
    """

    scenario: str
    latency_us: float
    best_us: float
    regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """An allocation made for several loads.

    Attributes:
        allocation: its loss is that of the loads' weighted sum that found it.
        ratios: by load, its loss over the load's own best.
        worst: the largest of them.
        bound: no allocation within the budget has a smaller largest ratio.
    """

    allocation: Allocation
    ratios: Mapping[str, float]
    worst: float
    bound: float

    def to_json(self) -> dict[str, Any]:
        """Without the allocation."""
        return {"ratios": dict(self.ratios), "worst": self.worst, "bound": self.bound}


def reweighted(sensitivity: Sensitivity, calibrated: Loads, other: Loads, name: str) -> Sensitivity:
    """Losses under another load: an expert's is in proportion to its layer's share of tokens that goes to it.

    Args:
        sensitivity: losses that add up over tokens.
        calibrated: the loads, by layer, of the data it was made from.
        other: those of the other data.
        name: what the other load is called; it is in the metric of the result.

    Raises:
        DataError: a trace lacks a layer, has other experts, or a layer without tokens.
    """
    frame = sensitivity.frame()
    factors: dict[int, Floats] = {}
    for layer in sorted(set(frame["layer"].tolist())):
        before, after = (_share(loads, layer, which) for loads, which in ((calibrated, "calibrated"), (other, name)))
        if len(before) != len(after):
            raise DataError(f"load {name}: layer {layer} has {len(after)} experts, the calibrated one {len(before)}")
        factors[layer] = after / before
    rows = zip(frame["layer"], frame["expert"], strict=True)
    try:
        factor = [1.0 if expert == SHARED_EXPERT else factors[layer][expert] for layer, expert in rows]
    except IndexError:
        raise DataError(f"load {name}: the sensitivity has experts that the trace has not") from None
    return Sensitivity(
        frame.assign(
            loss=frame["loss"] * factor,
            metric=f"{sensitivity.metric}, reweighted for {name}",
            schema_version=SCHEMA_VERSION,
        )
    )


def _share(loads: Loads, layer: int, name: str) -> Floats:
    if layer not in loads:
        raise DataError(f"load {name}: its trace has no layer {layer}")
    if not loads[layer].total:
        raise DataError(f"load {name}: layer {layer} of its trace has no tokens")
    tokens = np.maximum(np.asarray(loads[layer].tokens_per_expert, dtype=np.float64), _HALF_A_TOKEN)
    return np.asarray(tokens / tokens.sum(), dtype=np.float64)


def loss_of(allocation: Allocation, sensitivity: Sensitivity) -> float:
    """What an allocation's linears lose by a sensitivity. DataError: it lacks one of the allocation's choices."""
    ids, schemes, losses = sensitivity.arrays()
    column = {scheme: i for i, scheme in enumerate(schemes)}
    total = 0.0
    for row, block in enumerate(ids):
        scheme = allocation.assignment.get(block)
        if scheme is None or scheme not in column or not np.isfinite(losses[row, column[scheme]]):
            raise DataError(
                f"no loss of layer {block.layer} expert {block.expert} {block.linear.value} in"
                f" {'no scheme' if scheme is None else scheme.name}: the sensitivity and the allocation do not match"
            )
        total += float(losses[row, column[scheme]])
    return total


def loss_regrets(
    allocation: Allocation,
    loads: Mapping[str, Sensitivity],
    *,
    cost_table: CostTable | None = None,
    shape: MoeShape | None = None,
    options: Options | None = None,
) -> tuple[LossRegret, ...]:
    """For each load, named, the allocation against the best one for it in the same budget.

    Raises:
        DataError, SpecError: what was given does not fit together.
    """
    options = options or Options(granularity=allocation.granularity)
    found = []
    for name, sensitivity in loads.items():
        loss = loss_of(allocation, sensitivity)
        best = allocate(sensitivity, cost_table, allocation.budget, shape=shape, options=options).predicted_loss
        found.append(LossRegret(load=name, loss=loss, best=best, regret=_ratio(loss, best) - 1))
    return tuple(found)


def _ratio(loss: float, best: float) -> float:
    if best <= 0:
        raise SpecError(f"a regret is relative: the best loss must be positive, it is {best:g}")
    return loss / best


def latency_regrets(
    allocation: Allocation, sensitivity: Sensitivity, cost_table: CostTable, shape: MoeShape
) -> tuple[LatencyRegret, ...]:
    """For each scenario of the cost table, the allocation against the fastest one that has no more loss and bits.

    Raises:
        DataError, SpecError: what was given does not fit together.
    """
    budget = Budget(avg_weight_bits=allocation.avg_weight_bits)
    blocks = blocks_of(sensitivity, cost_table, shape, budget)
    column = {scheme: i for i, scheme in enumerate(blocks.schemes)}
    chosen = np.array([column[allocation.assignment[block]] for block in blocks.ids])
    rows = np.arange(len(chosen))
    finite = blocks.loss[np.isfinite(blocks.loss)]
    floor = min(0.0, float(finite.min()))
    loss = blocks.loss - floor  # as a limit it must not be negative
    found = []
    for i, scenario in enumerate(blocks.scenarios):
        latency = float(blocks.latency_us[rows, chosen, i].sum())
        if not np.isfinite(latency):
            continue
        best = solve_arrays(
            np.where(np.isfinite(blocks.loss), blocks.latency_us[:, :, i], np.inf),
            blocks.bits,
            avg_bits=allocation.avg_weight_bits * (1 + 1e-9),
            latency_us=loss[:, :, None],
            max_latency_us=[float(loss[rows, chosen].sum()) * (1 + 1e-9)],
            sizes=blocks.sizes,
            groups=groups_of(blocks.ids, allocation.granularity),
            scenarios=["loss"],
        )
        fastest = min(best.loss, latency)
        found.append(
            LatencyRegret(scenario=scenario, latency_us=latency, best_us=fastest, regret=latency / fastest - 1)
        )
    return tuple(found)


def minimise_worst_case(
    loads: Mapping[str, Sensitivity],
    budget: Budget,
    *,
    cost_table: CostTable | None = None,
    shape: MoeShape | None = None,
    options: Options | None = None,
) -> WorstCase:
    """The allocation whose largest loss ratio over the loads (its loss over the load's own best) is least.

    By cutting planes: for any weights of the loads, the least weighted sum of ratios bounds the worst ratio of every
    allocation from below; a linear program over the allocations seen finds the weights that raise the bound most.
    Latency limits of the budget hold in every scenario that they name.

    Raises:
        SpecError: no load. InfeasibleError and others: as `allocate`.
    """
    if not loads:
        raise SpecError("a worst case needs at least one load")
    names = list(loads)
    best = {name: allocate(s, cost_table, budget, shape=shape, options=options) for name, s in loads.items()}
    scale = {name: _ratio(1.0, best[name].predicted_loss) for name in names}
    seen = list(best.values())
    cuts = [[loss_of(one, loads[name]) * scale[name] for name in names] for one in seen]
    bound = 1.0
    for _ in range(_MOST_SOLVES):
        if min(max(cut) for cut in cuts) <= bound * (1 + _GOOD_GAP):
            break
        weights = _weights(np.array(cuts))
        blended = _blend(loads, {name: w * scale[name] for name, w in zip(names, weights, strict=True)})
        found = allocate(blended, cost_table, budget, shape=shape, options=options)
        bound = max(bound, found.bound)
        cut = [loss_of(found, loads[name]) * scale[name] for name in names]
        if any(np.allclose(cut, other, rtol=1e-12) for other in cuts):
            break
        seen.append(found)
        cuts.append(cut)
    chosen = min(range(len(seen)), key=lambda i: max(cuts[i]))
    return WorstCase(
        allocation=seen[chosen],
        ratios=dict(zip(names, cuts[chosen], strict=True)),
        worst=max(cuts[chosen]),
        bound=min(bound, max(cuts[chosen])),
    )


def _weights(cuts: Floats) -> Floats:
    """Of the loads, on the simplex: those whose least weighted sum over the seen ratios [seen, loads] is largest."""
    seen, loads = cuts.shape
    found = linprog(
        c=np.append(np.zeros(loads), -1.0),
        A_ub=np.hstack((-cuts, np.ones((seen, 1)))),
        b_ub=np.zeros(seen),
        A_eq=np.append(np.ones(loads), 0.0)[None, :],
        b_eq=[1.0],
        bounds=[(0.0, 1.0)] * loads + [(None, None)],
    )
    assert found.x is not None  # the simplex is never empty
    weights = np.maximum(found.x[:loads], 0.0)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _blend(loads: Mapping[str, Sensitivity], weights: Mapping[str, float]) -> Sensitivity:
    """The weighted sum of losses. DataError: the loads do not have the same linears and schemes."""
    frames = {name: sensitivity.frame() for name, sensitivity in loads.items()}
    first = next(iter(frames.values()))
    keys = ["layer", "expert", "linear", "scheme"]
    total = np.zeros(len(first))
    for name, frame in frames.items():
        if not frame[keys].equals(first[keys]):
            raise DataError(f"load {name}: it has losses of other linears or schemes than the first load")
        total += weights[name] * frame["loss"].to_numpy()
    return Sensitivity(first.assign(loss=total, metric=f"worst case of {', '.join(loads)}"))


def summary(
    losses: tuple[LossRegret, ...], latencies: tuple[LatencyRegret, ...], worst: WorstCase | None
) -> dict[str, Any]:
    """For JSON."""
    return {
        "loss": [asdict(one) for one in losses],
        "latency": [asdict(one) for one in latencies],
        "worst_case": None if worst is None else worst.to_json(),
    }
