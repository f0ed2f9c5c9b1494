"""Precision schemes: how the weights and the input activations of a linear layer are stored.

A scheme's name is `w16a16` (bf16), else `w{bits}a{bits}_g{group}_{sym|asym}` with `_e4m3` for float8:
`w4a16_g128_asym`, `w8a8_g-1_sym_e4m3`. `g-1` is one scale per output channel of the weights. Activations of 8 bits have
one scale per token; activations of 4 bits have one per token, or one per group of 128 when the weights are grouped so.
"""

from __future__ import annotations

import math as _math
import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

from profiles.errors import SpecError
from profiles.gpus import Math

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8, 16)
GROUP_SIZES = (64, 128)
SCALE_BITS_PER_GROUP = 16  # bf16
SCALE_BITS_PER_CHANNEL = 32  # fp32
ZERO_POINT_BITS = 16  # bf16, exact for 0..255


class NumericType(Enum):
    """What the bits of a value mean."""

    INT = "int"
    FLOAT = "float"  # of 8 bits: e4m3


class Strategy(Enum):
    """What shares one scale."""

    CHANNEL = "channel"
    GROUP = "group"
    TOKEN = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantised.

    Attributes:
        num_bits: bits of one value.
        type: integer, or float (e4m3, 8 bits).
        symmetric: no zero point is stored.
        strategy: what shares a scale: an output channel, a group along the reduction, or a token.
        group_size: values in a group along the reduction; None unless `strategy` is GROUP.
        dynamic: scales are computed at run time (activations) rather than beforehand (weights).
    """

    num_bits: int
    type: NumericType
    symmetric: bool
    strategy: Strategy
    group_size: int | None
    dynamic: bool

    def __post_init__(self) -> None:
        if self.type is NumericType.FLOAT and (self.num_bits != 8 or not self.symmetric):
            raise SpecError("a float tensor is e4m3: 8 bits and symmetric")
        if self.strategy is Strategy.GROUP and self.group_size not in GROUP_SIZES:
            raise SpecError(f"group size {self.group_size} is not one of -1 (per channel), {_listed(GROUP_SIZES)}")
        if self.strategy is not Strategy.GROUP and self.group_size is not None:
            raise SpecError(f"a group size ({self.group_size}) needs the strategy 'group', not {self.strategy.value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """The precision of a linear layer; None means bf16. Every scheme that can be constructed has a name that `parse`
    reads back.
    """

    weights: QuantSpec | None
    input_activations: QuantSpec | None

    def __post_init__(self) -> None:
        problem = _problem(self.weights, self.input_activations)
        if problem:
            raise SpecError(problem)

    @property
    def name(self) -> str:
        """The scheme's one spelling, e.g. `w4a16_g128_asym`."""
        if self.weights is None:
            return "w16a16"
        e4m3 = "_e4m3" if self.math is Math.E4M3 else ""
        symmetry = "sym" if self.weights.symmetric else "asym"
        return f"w{self.weight_bits}a{self.activation_bits}_g{self.group_size}_{symmetry}{e4m3}"

    def __str__(self) -> str:
        return self.name

    @property
    def is_weight_only(self) -> bool:
        """Quantised weights, bf16 activations."""
        return self.weights is not None and self.input_activations is None

    @property
    def weight_bits(self) -> int:
        """Bits of a weight's code; 16 for bf16."""
        return 16 if self.weights is None else self.weights.num_bits

    @property
    def activation_bits(self) -> int:
        """Bits of an activation; 16 for bf16."""
        return 16 if self.input_activations is None else self.input_activations.num_bits

    @property
    def group_size(self) -> int:
        """Weights along the reduction that share a scale; -1 is one scale per output channel."""
        return -1 if self.weights is None or self.weights.group_size is None else self.weights.group_size

    @property
    def is_symmetric(self) -> bool:
        """No zero points are stored (true of bf16)."""
        return self.weights is None or self.weights.symmetric

    @property
    def math(self) -> Math:
        """The tensor cores' input type; the activations decide it."""
        if self.input_activations is None:
            return Math.BF16
        if self.input_activations.num_bits == 4:
            return Math.INT4
        return Math.E4M3 if self.input_activations.type is NumericType.FLOAT else Math.INT8

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a layer that reduces over `in_features`: codes, scales (bf16 per group, fp32 per
        channel), zero points (bf16).

        Padding is not counted.

        Raises:
            SpecError: `in_features` is not positive.
        """
        if in_features < 1:
            raise SpecError(f"in_features is {in_features}; it must be at least 1")
        if self.weights is None:
            return 16.0
        zero_bits = 0 if self.weights.symmetric else ZERO_POINT_BITS
        if self.weights.group_size is None:
            return self.weights.num_bits + (SCALE_BITS_PER_CHANNEL + zero_bits) / in_features
        num_groups = _math.ceil(in_features / self.weights.group_size)
        return self.weights.num_bits + (SCALE_BITS_PER_GROUP + zero_bits) * num_groups / in_features


def _problem(weights: QuantSpec | None, activations: QuantSpec | None) -> str | None:
    """The first rule that a pair of specifications breaks, as a clause."""
    if weights is None:
        return "quantised activations need quantised weights" if activations is not None else None
    if weights.num_bits not in WEIGHT_BITS:
        return f"weights of {weights.num_bits} bits are not known, {_listed(WEIGHT_BITS)} are"
    if weights.strategy is Strategy.TOKEN or weights.dynamic:
        return "weights are quantised beforehand, per channel or per group"
    is_float = weights.type is NumericType.FLOAT
    if is_float and weights.strategy is not Strategy.CHANNEL:
        return "e4m3 weights have one scale per channel (g-1)"
    if activations is None:
        return "e4m3 weights need e4m3 activations" if is_float else None
    if activations.num_bits not in (4, 8):
        return f"activations of {activations.num_bits} bits are not known, {_listed(ACTIVATION_BITS)} are"
    if not weights.symmetric or not activations.symmetric:
        return "quantised activations need symmetric weights and activations (sym)"
    if not activations.dynamic:
        return "activations are quantised at run time (dynamic)"
    if (weights.num_bits == 8 or is_float) and activations.num_bits == 8 and weights.type is not activations.type:
        return "8-bit weights and 8-bit activations are both integers or both e4m3"
    if is_float and activations.type is not NumericType.FLOAT:
        return "e4m3 weights need e4m3 activations"
    if activations.num_bits == 8:
        return None if activations.strategy is Strategy.TOKEN else "8-bit activations have one scale per token"
    return _int4_activation_problem(weights, activations)


def _int4_activation_problem(weights: QuantSpec, activations: QuantSpec) -> str | None:
    if weights.group_size not in (None, 128):
        return "4-bit activations take weights with g-1 or g128"
    expected = Strategy.TOKEN if weights.group_size is None else Strategy.GROUP
    if activations.strategy is not expected or activations.group_size != weights.group_size:
        return "4-bit activations are grouped as the weights are: per token with g-1, per group of 128 with g128"
    return None


_NAME = re.compile(r"w(\d{1,2})a(\d{1,2})_g(-1|\d{1,4})_(sym|asym)(_e4m3)?", re.ASCII)


@cache
def parse(name: str) -> QuantScheme:
    """The scheme of a name; `parse(name).name == name` for every name that is accepted.

    Raises:
        SpecError: the name is malformed, or says what no scheme can be; the sentence says which rule.
    """
    if name == "w16a16":
        return QuantScheme(weights=None, input_activations=None)
    match = _NAME.fullmatch(name)
    if match is None:
        raise SpecError(
            f"unknown scheme {name!r}: a scheme is w16a16 or w{{{_listed(WEIGHT_BITS)}}}a{{{_listed(ACTIVATION_BITS)}}}"
            f"_g{{-1, {_listed(GROUP_SIZES)}}}_{{sym, asym}}, with _e4m3 for float8, as in w4a16_g128_asym"
        )
    try:
        scheme = _build(int(match[1]), int(match[2]), int(match[3]), match[4] == "sym", match[5] is not None)
    except SpecError as error:
        raise SpecError(f"no scheme {name!r}: {error}") from None
    if scheme.name != name:
        raise SpecError(f"no scheme {name!r}: it is spelled {scheme.name!r}")
    return scheme


def _build(weight_bits: int, activation_bits: int, group_size: int, symmetric: bool, e4m3: bool) -> QuantScheme:
    if activation_bits not in ACTIVATION_BITS:
        raise SpecError(f"activations of {activation_bits} bits are not known, {_listed(ACTIVATION_BITS)} are")
    if e4m3 and activation_bits != 8:
        raise SpecError("_e4m3 needs 8-bit activations (a8)")
    grouped = group_size != -1
    weights = QuantSpec(
        num_bits=weight_bits,
        # float8 activations with weights of fewer bits: the weights are integers that are widened to e4m3
        type=NumericType.FLOAT if e4m3 and weight_bits == 8 else NumericType.INT,
        symmetric=symmetric,
        strategy=Strategy.GROUP if grouped else Strategy.CHANNEL,
        group_size=group_size if grouped else None,
        dynamic=False,
    )
    if activation_bits == 16:
        return QuantScheme(weights=weights, input_activations=None)
    grouped_activations = grouped and activation_bits == 4
    activations = QuantSpec(
        num_bits=activation_bits,
        type=NumericType.FLOAT if e4m3 else NumericType.INT,
        symmetric=True,
        strategy=Strategy.GROUP if grouped_activations else Strategy.TOKEN,
        group_size=group_size if grouped_activations else None,
        dynamic=True,
    )
    return QuantScheme(weights=weights, input_activations=activations)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)


KERNEL_SCHEMES: tuple[QuantScheme, ...] = tuple(
    parse(name)
    for name in (
        "w16a16",
        *(f"w{bits}a16_g{group}_{zero}" for bits in (8, 4, 3, 2) for group in (128, -1) for zero in ("sym", "asym")),
        "w8a8_g-1_sym",
        "w8a8_g-1_sym_e4m3",
        "w4a8_g128_sym",
        "w4a8_g-1_sym",
        "w4a8_g128_sym_e4m3",  # the wgmma family's only
        "w4a4_g-1_sym",
        "w4a4_g128_sym",
    )
)
"""Every scheme that some kernel family runs. Formats accept more (group 64, for one)."""
