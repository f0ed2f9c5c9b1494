"""The rows of the paper's table, as data: which scheme each linear gets, and how weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allocator import Budget, Options, Sensitivity, allocate
from allocator.calibration.quantizer import Method, Quantizer
from bench.evaluation import Assignment, average_bits
from profiles import schemes
from profiles.errors import SpecError
from profiles.models import LinearId, MoeShape
from profiles.schemes import QuantScheme

RTN = Quantizer(method=Method.RTN, clip=False)
RTN_CLIP = Quantizer(method=Method.RTN, clip=True)
GPTQ = Quantizer(method=Method.GPTQ, clip=False)
GPTQ_CLIP = Quantizer(method=Method.GPTQ, clip=True)
RTN_ROTATED = Quantizer(method=Method.RTN, clip=False, rotate=True)
GPTQ_ROTATED = Quantizer(method=Method.GPTQ, clip=False, rotate=True)
GPTQ_CLIP_ROTATED = Quantizer(method=Method.GPTQ, clip=True, rotate=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """All linears in one scheme; None: as the checkpoint has them."""

    scheme: QuantScheme | None

    @property
    def name(self) -> str:
        """In the table."""
        return "bf16" if self.scheme is None else self.scheme.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """A blind mix: linears in an order drawn from a seed get `high` until the average is reached, the others `low`."""

    low: QuantScheme
    high: QuantScheme
    avg_bits: float
    seed: int = 0

    @property
    def name(self) -> str:
        """In the table."""
        return f"blind mix of {self.low.name} and {self.high.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """The allocator's choice among some schemes at an average."""

    schemes: tuple[QuantScheme, ...]
    avg_bits: float

    @property
    def name(self) -> str:
        """In the table."""
        return f"mixed of {len(self.schemes)} schemes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row. setting: the rows it stands beside, those of its size. rule: schemes. quantizer: rounding."""

    setting: str
    rule: Uniform | Blend | Mixed
    quantizer: Quantizer

    @property
    def name(self) -> str:
        """Unique in a table."""
        if isinstance(self.rule, Uniform) and self.rule.scheme is None:
            return "bf16"
        return f"{self.setting}, {self.rule.name}, {self.quantizer.name}"


def _parse(*names: str) -> tuple[QuantScheme, ...]:
    return tuple(schemes.parse(name) for name in names)


WEIGHT_ONLY = _parse(
    *(f"w{bits}a16_g{group}_{zero}" for bits in (2, 3, 4, 8) for group in (128, -1) for zero in ("asym", "sym"))
)
"""What a mixed weight-only allocation may use."""
WEIGHT_ACTIVATION = _parse("w4a4_g-1_sym", "w4a4_g128_sym", "w8a8_g-1_sym")
"""Weights and activations of the same bits, so that an average of 5 is one of both."""


def weight_only_variants(bits: int) -> tuple[Variant, ...]:
    """The rows of one size, g128 with zero points: bits + 0.25 on average. Mixed ones with clipping alone, as losses of
    GPTQ with clipping say nothing of per-channel grids at 2 bits without.
    """
    setting, rule = f"W{bits}.25", Uniform(scheme=schemes.parse(f"w{bits}a16_g128_asym"))
    mixed = Mixed(schemes=WEIGHT_ONLY, avg_bits=bits + 0.25)
    rows = tuple(Variant(setting=setting, rule=rule, quantizer=q) for q in (RTN, RTN_CLIP, GPTQ, GPTQ_CLIP))
    return (*rows, Variant(setting=setting, rule=mixed, quantizer=GPTQ_CLIP))


def weight_activation_variants(setting: str, rule: Uniform | Blend) -> tuple[Variant, ...]:
    """The rows of one rule: with and without rotated inputs."""
    quantizers = (RTN, GPTQ, GPTQ_CLIP, RTN_ROTATED, GPTQ_ROTATED, GPTQ_CLIP_ROTATED)
    return tuple(Variant(setting=setting, rule=rule, quantizer=quantizer) for quantizer in quantizers)


_W4A4, _W4A4_G128, _W8A8 = WEIGHT_ACTIVATION
VARIANTS: tuple[Variant, ...] = (
    Variant(setting="bf16", rule=Uniform(scheme=None), quantizer=RTN),
    *(variant for bits in (2, 3, 4) for variant in weight_only_variants(bits)),
    *weight_activation_variants("W4A4", Uniform(scheme=_W4A4)),
    *weight_activation_variants("W4A4 g128", Uniform(scheme=_W4A4_G128)),
    *weight_activation_variants("W5A5", Blend(low=_W4A4_G128, high=_W8A8, avg_bits=5.0)),
    *(
        Variant(setting="W5A5", rule=Mixed(schemes=WEIGHT_ACTIVATION, avg_bits=5.0), quantizer=quantizer)
        for quantizer in (GPTQ_CLIP, GPTQ_CLIP_ROTATED)
    ),
    *weight_activation_variants("W8A8", Uniform(scheme=_W8A8)),
)


def assignment_of(
    rule: Uniform | Blend | Mixed, linears: tuple[LinearId, ...], shape: MoeShape, sensitivity: Sensitivity | None
) -> Assignment:
    """The scheme of each linear. SpecError: a mixed rule without a sensitivity, or one whose average cannot be had."""
    if isinstance(rule, Uniform):
        return {} if rule.scheme is None else dict.fromkeys(linears, rule.scheme)
    if isinstance(rule, Blend):
        return _blended(rule, linears, shape)
    if sensitivity is None:
        raise SpecError("a mixed allocation needs a sensitivity; give --sensitivity FILE")
    offered = tuple(scheme for scheme in rule.schemes if scheme in sensitivity.schemes)
    if not offered:
        raise SpecError(f"the sensitivity has none of {', '.join(scheme.name for scheme in rule.schemes)}")
    return allocate(
        sensitivity, None, Budget(avg_weight_bits=rule.avg_bits), shape=shape, options=Options(schemes=offered)
    ).assignment


def _blended(rule: Blend, linears: tuple[LinearId, ...], shape: MoeShape) -> Assignment:
    order = np.random.default_rng(rule.seed).permutation(len(linears))
    assignment = dict.fromkeys(linears, rule.low)
    for i in order:
        raised = assignment | {linears[i]: rule.high}
        if average_bits(shape, linears, raised) > rule.avg_bits:
            break
        assignment = raised
    return assignment
