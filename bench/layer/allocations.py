"""Which scheme each expert of a linear has: bf16, one scheme for all, or a mix of at most 4.25 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from profiles import schemes
from profiles.errors import SpecError
from profiles.schemes import QuantScheme

MIX_BITS = 4.25


class Group(Enum):
    """What a contender is compared as."""

    BF16 = "bf16"
    UNIFORM = "uniform"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Experts' schemes by share. `fixed`: these shares; `high`: as many as keep the average at MIX_BITS or below; the
    rest is `middle`.
    """

    name: str
    middle: QuantScheme
    high: QuantScheme | None = None
    fixed: tuple[tuple[QuantScheme, float], ...] = ()

    @property
    def group(self) -> Group:
        """By what it holds."""
        if self.high is not None:
            return Group.MIXED
        return Group.BF16 if self.middle.weight_bits == 16 else Group.UNIFORM

    def per_expert(self, num_experts: int, k: int, seed: int) -> tuple[QuantScheme, ...]:
        """One scheme an expert, in an order drawn from the seed."""
        found: list[QuantScheme] = []
        for scheme, share in self.fixed:
            found += [scheme] * round(share * num_experts)
        left = num_experts - len(found)
        if self.high is not None:
            spare = MIX_BITS * num_experts - total_bits(found, k) - left * self.middle.bits_per_weight(k)
            step = self.high.bits_per_weight(k) - self.middle.bits_per_weight(k)
            count = max(0, min(left, math.floor(spare / step + 1e-9)))
            found += [self.high] * count
        found += [self.middle] * (num_experts - len(found))
        order = np.random.default_rng(seed).permutation(num_experts)
        return tuple(found[index] for index in order)


def total_bits(per_expert: Sequence[QuantScheme], k: int) -> float:
    """Bits of one weight of each expert, added."""
    return sum(scheme.bits_per_weight(k) for scheme in per_expert)


def _one(name: str) -> Allocation:
    return Allocation(name=name, middle=schemes.parse(name))


def _mix(name: str, middle: str, high: str, **fixed: float) -> Allocation:
    """`fixed` by the width of a 2- or 3-bit scheme with bf16 tokens."""
    low = {"w2": "w2a16_g128_asym", "w3": "w3a16_g128_asym"}
    return Allocation(
        name=name,
        middle=schemes.parse(middle),
        high=schemes.parse(high),
        fixed=tuple((schemes.parse(low[width]), share) for width, share in fixed.items()),
    )


BF16 = _one("w16a16")
UNIFORM = tuple(
    _one(name)
    for name in (
        "w8a16_g-1_sym",
        "w4a16_g128_sym",
        "w4a16_g128_asym",
        "w2a16_g128_asym",
        "w8a8_g-1_sym",
        "w8a8_g-1_sym_e4m3",
        "w4a8_g128_sym_e4m3",
    )
)
MIXED = (
    _mix("w2/w4/w8 a16", "w4a16_g128_sym", "w8a16_g-1_sym", w2=0.3),
    _mix("w2/w3/w4/w8 a16", "w4a16_g128_sym", "w8a16_g-1_sym", w2=0.15, w3=0.3),
    _mix("w2a16/w4a16/w8a8 fp8", "w4a16_g128_sym", "w8a8_g-1_sym_e4m3", w2=0.3),
    _mix("w2a16/w4a8/w8a8 fp8", "w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3", w2=0.1),
    _mix("w4a8/w8a8 fp8", "w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"),
    _mix("w4a8/w8a8 int8 by row", "w4a8_g-1_sym", "w8a8_g-1_sym"),
    _mix("w2a16/w4a8/w8a8 int8", "w4a8_g128_sym", "w8a8_g-1_sym", w2=0.1),
)
ALLOCATIONS = (BF16, *UNIFORM, *MIXED)


def allocation(name: str) -> Allocation:
    """By name. SpecError lists the known ones."""
    for found in ALLOCATIONS:
        if found.name == name:
            return found
    raise SpecError(f"allocation {name!r}: known are {', '.join(found.name for found in ALLOCATIONS)}")
