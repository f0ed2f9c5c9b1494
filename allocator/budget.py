"""Budget: what an allocation may use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from profiles.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of an allocation, at least one.

    Attributes:
        avg_weight_bits: stored bits per weight, scales and zero points counted, over all weights of the allocation.
        weight_bytes: the same limit as bytes; give one of the two.
        max_latency_us: by token-load scenario, the limit on the sum over all layers' launches.
        per_layer: `avg_weight_bits` holds in every layer rather than on average.
    """

    avg_weight_bits: float | None = None
    weight_bytes: int | None = None
    max_latency_us: Mapping[str, float] = field(default_factory=dict)
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.avg_weight_bits is not None and self.weight_bytes is not None:
            raise SpecError("a budget has avg_weight_bits or weight_bytes, not both: one follows from the other")
        limits = {"avg_weight_bits": self.avg_weight_bits, "weight_bytes": self.weight_bytes}
        limits |= {f"max_latency_us[{name}]": value for name, value in self.max_latency_us.items()}
        for name, value in limits.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SpecError(f"{name} is {value}; a budget's limits are positive, finite numbers")
        if all(value is None for value in limits.values()):
            raise SpecError("a budget needs a limit: avg_weight_bits, weight_bytes or max_latency_us")
        if self.per_layer and self.avg_weight_bits is None:
            raise SpecError("a budget per layer needs avg_weight_bits")
        object.__setattr__(self, "max_latency_us", MappingProxyType(dict(self.max_latency_us)))
