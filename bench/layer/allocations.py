"""Which scheme each expert's linears have: bf16, one scheme for all, or a mix, by one rule for all models.

The rule: experts are ordered by how often the router takes them, as calibration would count it. An expert's loss weighs
by its tokens, so the least taken get the schemes of fewest bits; all others `middle`; from the most taken on, `down`
before `gate_up`, linears get `high` while the average stays within the bits. No time is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from profiles import schemes
from profiles.errors import SpecError
from profiles.models import Linear, MoeShape
from profiles.schemes import QuantScheme

MIX_BITS = 4.25
DECODE_TOKENS = 64
"""Up to here a load counts as decode."""
UPGRADED = (Linear.DOWN, Linear.GATE_UP)

Schemes = dict[Linear, tuple[QuantScheme, ...]]
"""Each linear's experts' schemes."""


class Group(Enum):
    """What a contender is compared as."""

    BF16 = "bf16"
    UNIFORM = "uniform"
    MIXED = "mixed"


class Loads(Enum):
    """Where an allocation is worth timing."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Experts' schemes by share. `low`: (scheme, share of the experts), the least taken first; `high`: as many as keep
    the average at `max_bits` or below; the rest is `middle`.
    """

    name: str
    middle: QuantScheme
    high: QuantScheme | None = None
    low: tuple[tuple[QuantScheme, float], ...] = ()
    max_bits: float = 16.0
    loads: Loads = Loads.ALL

    @property
    def group(self) -> Group:
        """By what it holds."""
        if self.high is not None or self.low:
            return Group.MIXED
        return Group.BF16 if self.middle.weight_bits == 16 else Group.UNIFORM

    @property
    def has_8bit_tokens(self) -> bool:
        """Whether every expert reads tokens of 8 bits."""
        named = [self.middle, *([self.high] if self.high else []), *(scheme for scheme, _ in self.low)]
        return all(scheme.activation_bits == 8 for scheme in named)

    def serves(self, tokens: int) -> bool:
        """Whether it is timed at so many tokens."""
        return self.loads is Loads.ALL or (self.loads is Loads.DECODE) == (tokens <= DECODE_TOKENS)

    def schemes(self, shape: MoeShape, popularity: Sequence[float]) -> Schemes:
        """By the rule, for experts that the router takes so often."""
        order = sorted(range(shape.num_experts), key=lambda expert: popularity[expert])
        chosen = [self.middle] * shape.num_experts
        place = 0
        for scheme, share in self.low:
            count = round(share * shape.num_experts)
            for expert in order[place : place + count]:
                chosen[expert] = scheme
            place += count
        found = {linear: list(chosen) for linear in Linear}
        if self.high is not None:
            spare = (self.max_bits - average_bits(found, shape)) * shape.num_experts * sum(_sizes(shape).values())
            for expert in reversed(order[place:]):
                for linear in UPGRADED:
                    k = shape.gemm(linear)[1]
                    cost = _sizes(shape)[linear] * (self.high.bits_per_weight(k) - self.middle.bits_per_weight(k))
                    if cost <= spare:
                        found[linear][expert], spare = self.high, spare - cost
        return {linear: tuple(each) for linear, each in found.items()}


def average_bits(found: dict[Linear, list[QuantScheme]] | Schemes, shape: MoeShape) -> float:
    """Bits of a weight, scales counted, over both linears."""
    sizes = _sizes(shape)
    bits = sum(
        sizes[linear] * sum(scheme.bits_per_weight(shape.gemm(linear)[1]) for scheme in each)
        for linear, each in found.items()
    )
    return bits / (shape.num_experts * sum(sizes.values()))


def _sizes(shape: MoeShape) -> dict[Linear, int]:
    """One expert's weights."""
    return {linear: shape.gemm(linear)[0] * shape.gemm(linear)[1] for linear in Linear}


def _one(name: str, loads: Loads = Loads.ALL) -> Allocation:
    return Allocation(name=name, middle=schemes.parse(name), loads=loads)


def _mix(
    name: str, middle: str, high: str | None, bits: float = MIX_BITS, loads: Loads = Loads.ALL, **low: float
) -> Allocation:
    """`low` by the short name of a scheme."""
    short = {"w2": "w2a16_g128_asym", "w4": "w4a16_g128_sym", "w4f": W4A8_FP8}
    return Allocation(
        name=name,
        middle=schemes.parse(middle),
        high=None if high is None else schemes.parse(high),
        low=tuple((schemes.parse(short[each]), share) for each, share in low.items()),
        max_bits=bits,
        loads=loads,
    )


W4A8_FP8, W8A8_FP8 = "w4a8_g128_sym_e4m3", "w8a8_g-1_sym_e4m3"
W4A8_INT8, W4A8_BY_ROW, W8A8_INT8 = "w4a8_g128_sym", "w4a8_g-1_sym", "w8a8_g-1_sym"
BF16 = _one("w16a16")
UNIFORM = (
    _one("w4a16_g128_sym"),
    _one(W4A8_FP8),
    _one(W4A8_INT8),
    _one(W4A8_BY_ROW),
    _one(W8A8_FP8),
    _one(W8A8_INT8),
)
MIXED = (
    _mix("w2/w4/w8 a16", "w4a16_g128_sym", "w8a16_g-1_sym", loads=Loads.DECODE, w2=0.3),
    _mix("w2a16/w4a8/w8a8 fp8", W4A8_FP8, W8A8_FP8, w2=0.1),
    _mix("w2a16/w4a16/w4a8/w8a8 fp8", W4A8_FP8, W8A8_FP8, loads=Loads.DECODE, w2=0.1, w4=0.2),
    _mix("w4a8/w4a16 fp8", "w4a16_g128_sym", None, loads=Loads.DECODE, w4f=0.75),
    _mix("w4a8/w8a8 fp8", W4A8_FP8, W8A8_FP8),
    _mix("w4a8/w8a8 int8", W4A8_INT8, W8A8_INT8),
    _mix("w4a8/w8a8 int8 by row", W4A8_BY_ROW, W8A8_INT8),
    _mix("w4a8/w8a8 fp8, 5 bits", W4A8_FP8, W8A8_FP8, 5.0, Loads.PREFILL),
    _mix("w4a8/w8a8 fp8, 6 bits", W4A8_FP8, W8A8_FP8, 6.0, Loads.PREFILL),
    _mix("w4a8/w8a8 int8, 6 bits", W4A8_INT8, W8A8_INT8, 6.0, Loads.PREFILL),
    _mix("w4a8/w8a8 int8 by row, 6 bits", W4A8_BY_ROW, W8A8_INT8, 6.0, Loads.PREFILL),
)
ALLOCATIONS = (BF16, *UNIFORM, *MIXED)


def allocation(name: str) -> Allocation:
    """By name. SpecError lists the known ones."""
    for found in ALLOCATIONS:
        if found.name == name:
            return found
    raise SpecError(f"allocation {name!r}: known are {'; '.join(found.name for found in ALLOCATIONS)}")
