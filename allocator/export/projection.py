"""The best allocation that a target can be told, within the same budget, and what it loses against the native one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allocator.allocate import Options, allocate
from allocator.allocation import Allocation, Granularity
from allocator.arrays import InfeasibleError
from allocator.export.targets import Target
from allocator.sensitivity import Sensitivity
from costmodel.table import CostTable
from profiles.errors import DataError, SpecError
from profiles.models import MoeShape
from profiles.schemes import QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A native allocation and the one that is exported in its place.

    Attributes:
        target: form and engine.
        native: as it was solved.
        exported: the least loss that the target can be told within native's budget; native itself where it can.
        refused: schemes that the target cannot have, with the reasons.
    """

    target: Target
    native: Allocation
    exported: Allocation
    refused: Mapping[QuantScheme, tuple[str, ...]]

    @property
    def loss_ratio(self) -> float | None:
        """Exported loss over native; None where the native one has none."""
        return self.exported.predicted_loss / self.native.predicted_loss if self.native.predicted_loss > 0 else None

    def price(self) -> dict[str, Any]:
        """For JSON: what the projection costs against the native allocation."""
        native, exported = self.native, self.exported
        latency = {
            name: {"native_us": us, "exported_us": exported.predicted_latency_us[name]}
            for name, us in native.predicted_latency_us.items()
            if name in exported.predicted_latency_us
        }
        return {
            "target": self.target.name,
            "granularity": exported.granularity.value,
            "native": {"loss": native.predicted_loss, "avg_weight_bits": native.avg_weight_bits},
            "exported": {"loss": exported.predicted_loss, "avg_weight_bits": exported.avg_weight_bits},
            "loss_ratio": self.loss_ratio,
            "latency_us": latency,
            "refused": {scheme.name: list(why) for scheme, why in self.refused.items()},
        }


def project(
    native: Allocation,
    target: Target,
    sensitivity: Sensitivity,
    cost_table: CostTable | None = None,
    *,
    shape: MoeShape | None = None,
) -> Projection:
    """The least loss that a target can be told, within the native allocation's budget.

    Args:
        native: an allocation, whose budget is kept.
        target: form and engine.
        sensitivity: the losses that `native` was made from.
        cost_table: the latencies; a budget with latency limits needs them.
        shape: the model's; by default that of its name.

    Raises:
        SpecError: the target can have none of the sensitivity's schemes. InfeasibleError: none of those that it
            can have holds the budget. DataError: the sensitivity is of another model.
    """
    if sensitivity.model != native.model:
        raise DataError(f"the sensitivity is of {sensitivity.model}, the allocation of {native.model}")
    possible, refused = target.split(sensitivity.schemes)
    used = set(native.assignment.values())
    if _is_said(native, target) and any(used <= set(schemes) for schemes in target.alternatives(possible)):
        return Projection(target=target, native=native, exported=native, refused=refused)
    if not possible:
        why = [f"{scheme.name}: {'; '.join(reasons)}" for scheme, reasons in refused.items()]
        raise SpecError(
            f"{target.name} can have none of the sensitivity's schemes ({' | '.join(why)}); calibrate some that it can"
        )
    found: list[Allocation] = []
    problems: list[InfeasibleError] = []
    for schemes in target.alternatives(possible):
        options = Options(granularity=target.granularity, schemes=schemes)
        try:
            found.append(allocate(sensitivity, cost_table, native.budget, shape=shape, options=options))
        except InfeasibleError as error:
            problems.append(error)
    if not found:
        names = ", ".join(scheme.name for scheme in possible)
        raise InfeasibleError(f"{target.name}, which can have {names}: {problems[0]}")
    best = min(found, key=lambda allocation: allocation.predicted_loss)
    return Projection(target=target, native=native, exported=best, refused=refused)


def _is_said(allocation: Allocation, target: Target) -> bool:
    """Linears that the target ties together have one scheme."""
    if target.granularity is Granularity.LINEAR:
        return True
    schemes: dict[int, set[QuantScheme]] = {}
    for block, scheme in allocation.assignment.items():
        schemes.setdefault(block.layer, set()).add(scheme)
    return all(len(some) == 1 for some in schemes.values())
