"""What a report shows, computed: the Pareto front around an allocation, where time goes, what more bits would buy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from allocator.allocate import Options, allocate
from allocator.allocation import Allocation
from allocator.arrays import InfeasibleError
from allocator.budget import Budget
from allocator.sensitivity import SHARED_EXPERT, Sensitivity
from allocator.verify import Verification
from costmodel.table import CostTable
from profiles.errors import DataError
from profiles.models import Linear, LinearId, MoeShape
from profiles.schemes import QuantScheme

BITS_STEP = 0.1
FRONT_POINTS = 13


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """The least loss at some average bits, within the allocation's latency limits; `bound`: nothing there is below."""

    avg_weight_bits: float
    loss: float
    bound: float
    latency_us: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBits:
    """What BITS_STEP more average bits would buy: the allocation solved again with them.

    loss_by_price: as the shadow price of the relaxed problem has it. changed: linears whose scheme differs, by layer.
    """

    extra_bits: float
    loss_saved: float
    loss_by_price: float | None
    changed: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShare:
    """What one scheme's linears take of a scenario's latency, all layers together."""

    scenario: str
    linear: str
    scheme: str
    num_linears: int
    latency_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report shows. front, next_bits: empty, None without a sensitivity; time: without a cost table.

    layer_bits: stored bits per weight of each layer. source: whether the cost table was measured, predicted or both.
    """

    allocation: Allocation
    layer_bits: Mapping[int, float]
    linears_per_scheme: Mapping[str, int]
    front: tuple[FrontPoint, ...] = ()
    next_bits: NextBits | None = None
    time: tuple[TimeShare, ...] = ()
    source: str | None = None
    verification: Verification | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints; the assignment itself stays in the allocation's file."""
        content = self.allocation.to_json()
        del content["assignment"], content["kernel_configs"]
        return {
            "allocation": content,
            "layer_bits": {str(layer): bits for layer, bits in self.layer_bits.items()},
            "linears_per_scheme": dict(self.linears_per_scheme),
            "front": [asdict(point) for point in self.front],
            "next_bits": None if self.next_bits is None else asdict(self.next_bits),
            "time": [asdict(share) for share in self.time],
            "latency_source": self.source,
            "verification": None if self.verification is None else self.verification.to_json(),
        }


def collect(
    allocation: Allocation,
    shape: MoeShape,
    *,
    sensitivity: Sensitivity | None = None,
    cost_table: CostTable | None = None,
    options: Options | None = None,
    verification: Verification | None = None,
    num_points: int = FRONT_POINTS,
) -> ReportData:
    """A report's numbers.

    Args:
        allocation: what is reported.
        shape: its model's.
        sensitivity: the losses it was made from; the front and the worth of more bits need them.
        cost_table: the latencies it was made from.
        options: as the allocation was made with; by default its granularity and all schemes.
        verification: what was measured of it.
        num_points: of the front.

    Raises:
        DataError: the sensitivity or the table is of another model than the allocation.
    """
    for name, other in (("sensitivity", sensitivity and sensitivity.model), ("model's shape", shape.name)):
        if other is not None and other != allocation.model:
            raise DataError(f"the {name} is of {other}, the allocation of {allocation.model}")
    options = options or Options(granularity=allocation.granularity)
    front: tuple[FrontPoint, ...] = ()
    following = None
    if sensitivity is not None:
        front = pareto(sensitivity, cost_table, allocation, shape, options, num_points)
        following = next_bits(sensitivity, cost_table, allocation, shape, options)
    return ReportData(
        allocation=allocation,
        layer_bits=layer_bits(allocation.assignment, shape),
        linears_per_scheme=dict(Counter(scheme.name for scheme in allocation.assignment.values()).most_common()),
        front=front,
        next_bits=following,
        time=() if cost_table is None else time_shares(allocation, cost_table, shape),
        source=None if cost_table is None else latency_source(cost_table, allocation.model),
        verification=verification,
    )


def gemm_of(block: LinearId, shape: MoeShape) -> tuple[int, int]:
    """(n, k) of a linear."""
    return shape.shared_gemm(block.linear) if block.expert == SHARED_EXPERT else shape.gemm(block.linear)


def stored_bits(block: LinearId, scheme: QuantScheme, shape: MoeShape) -> float:
    """Stored bits per weight, scales and zero points counted."""
    return scheme.bits_per_weight(gemm_of(block, shape)[1])


def layer_bits(assignment: Mapping[LinearId, QuantScheme], shape: MoeShape) -> dict[int, float]:
    """Average stored bits per weight of each layer."""
    bits: dict[int, float] = {}
    weights: dict[int, float] = {}
    for block, scheme in assignment.items():
        n, k = gemm_of(block, shape)
        bits[block.layer] = bits.get(block.layer, 0.0) + n * k * scheme.bits_per_weight(k)
        weights[block.layer] = weights.get(block.layer, 0.0) + n * k
    return {layer: bits[layer] / weights[layer] for layer in sorted(bits)}


def pareto(
    sensitivity: Sensitivity,
    cost_table: CostTable | None,
    allocation: Allocation,
    shape: MoeShape,
    options: Options,
    num_points: int,
) -> tuple[FrontPoint, ...]:
    """Least losses from the leanest average bits to the richest; points that the latency limits forbid are left out."""
    ids, schemes, loss = sensitivity.arrays()
    sizes = np.array([float(np.prod(gemm_of(block, shape))) for block in ids])
    bits = np.array([[stored_bits(block, scheme, shape) for scheme in schemes] for block in ids])
    offered = np.isfinite(loss)
    if options.schemes is not None:
        offered &= np.array([scheme in options.schemes for scheme in schemes])[None, :]
    least, most = (
        float(np.average(bound, weights=sizes))
        for bound in (np.where(offered, bits, np.inf).min(1), np.where(offered, bits, -np.inf).max(1))
    )
    targets = {*np.linspace(least * (1 + 1e-9), most, num_points).tolist(), allocation.avg_weight_bits * (1 + 1e-12)}
    points: list[FrontPoint] = []
    for target in sorted(targets):
        budget = Budget(
            avg_weight_bits=target,
            max_latency_us=allocation.budget.max_latency_us,
            per_layer=allocation.budget.per_layer,
        )
        try:
            found = allocate(sensitivity, cost_table, budget, shape=shape, options=options)
        except InfeasibleError:
            continue
        if points and found.predicted_loss >= points[-1].loss:
            continue
        points.append(
            FrontPoint(
                avg_weight_bits=found.avg_weight_bits,
                loss=found.predicted_loss,
                bound=found.bound,
                latency_us=found.predicted_latency_us,
            )
        )
    return tuple(points)


def next_bits(
    sensitivity: Sensitivity,
    cost_table: CostTable | None,
    allocation: Allocation,
    shape: MoeShape,
    options: Options,
) -> NextBits | None:
    """The allocation with BITS_STEP more; None where its budget has no bits."""
    budget = allocation.budget
    if budget.avg_weight_bits is None and budget.weight_bytes is None:
        return None
    limit = allocation.avg_weight_bits if budget.avg_weight_bits is None else budget.avg_weight_bits
    richer = Budget(avg_weight_bits=limit + BITS_STEP, max_latency_us=budget.max_latency_us, per_layer=budget.per_layer)
    found = allocate(sensitivity, cost_table, richer, shape=shape, options=options)
    changed = Counter(b.layer for b, scheme in found.assignment.items() if scheme != allocation.assignment.get(b))
    price = allocation.shadow_prices.get("avg_bits")
    return NextBits(
        extra_bits=BITS_STEP,
        loss_saved=allocation.predicted_loss - found.predicted_loss,
        loss_by_price=None if price is None else price * BITS_STEP,
        changed=dict(sorted(changed.items())),
    )


def launch_name(block: LinearId) -> str:
    """A linear's name in a cost table."""
    return f"shared_{block.linear.value}" if block.expert == SHARED_EXPERT else block.linear.value


def time_shares(allocation: Allocation, cost_table: CostTable, shape: MoeShape) -> tuple[TimeShare, ...]:
    """By scenario, linear and scheme: each expert is charged an even share of its launch in one scheme, as in
    `allocate`.
    """
    counts = Counter((launch_name(block), scheme) for block, scheme in allocation.assignment.items())
    rows = cost_table.frame()
    rows = rows[rows["model"] == allocation.model]
    columns = [rows[name].tolist() for name in ("linear", "scheme", "scenario", "latency_us")]
    price = {(linear, scheme, scenario): us for linear, scheme, scenario, us in zip(*columns, strict=True)}
    experts = {linear.value: shape.num_experts for linear in Linear}
    return tuple(
        TimeShare(
            scenario=scenario,
            linear=linear,
            scheme=scheme.name,
            num_linears=count,
            latency_us=count * price[linear, scheme.name, scenario] / experts.get(linear, 1),
        )
        for scenario in sorted(set(rows["scenario"].tolist()))
        for (linear, scheme), count in sorted(counts.items(), key=lambda item: (item[0][0], item[0][1].name))
        if (linear, scheme.name, scenario) in price
    )


def latency_source(cost_table: CostTable, model: str) -> str:
    """`measured`, `predicted`, or both, of a model's rows."""
    rows = cost_table.frame()
    return " and ".join(sorted(set(rows.loc[rows["model"] == model, "source"].astype(str).tolist())))
