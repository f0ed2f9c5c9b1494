"""What the kernels read: how a scheme's weights, scales and activations lie in memory. Torch-free.

The rules are ARCHITECTURE.md's "Layouts" section, stated here once as data: kernel_gen.formats writes what these facts
say, the kernels and the legality rules read them. An *order* names the axes of a unit as they lie in memory, slowest
first; the axes are those of `UnitAxes`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.schemes import NumericType, QuantScheme, QuantSpec, Strategy

UNIT_ROWS = 64
LANES = 32
BLOCKS = 4
"""m16 blocks of a unit: 64 rows are four MMA operands of 16 rows."""
STRIP_BYTES = UNIT_ROWS * 2
"""One group's scales (or zero points) of a unit's 64 rows: bf16."""


class ActivationKind(Enum):
    """One way of quantising the tokens. A launch takes at most one of INT4 and INT4_GROUP."""

    BF16 = "bf16"
    INT8 = "int8"
    E4M3 = "e4m3"
    INT4 = "int4"
    INT4_GROUP = "int4_group"


X_K_MULTIPLE = {
    ActivationKind.BF16: 8,
    ActivationKind.INT8: 128,
    ActivationKind.E4M3: 128,
    ActivationKind.INT4: 128,
    ActivationKind.INT4_GROUP: 128,
}
"""Activations are padded with zeros along K to a multiple of this: bf16 rows to the 16 bytes of a cp.async, others to
the k-tile."""

ACTIVATION_ARGUMENT = {
    ActivationKind.BF16: 0,
    ActivationKind.INT8: 1,
    ActivationKind.E4M3: 3,
    ActivationKind.INT4: 5,
    ActivationKind.INT4_GROUP: 5,
}
"""Where a form's address stands among the seven that kernels take; its scales' address follows it (bf16 has none)."""


class CodeForm(Enum):
    """How a code u in [0, 2^b) of an integer scheme is written, with q = u - 2^(b-1)."""

    UNSIGNED = "unsigned"  # u, or a float's own bits
    TWOS_COMPLEMENT = "twos_complement"  # q
    SIGN_MAGNITUDE = "sign_magnitude"  # bit 3 the sign, the rest |q|; q = -8 has no code


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAxes:
    """The axes that a unit's rows and its k positions split into, slowest first: (name, size).

    w is the m16 block, g and t the lane 4g + t; register r of the A fragment is rlo + 2*rhi, where rlo says row + 8 and
    rhi the upper half of the MMA's k. What is left of k is the MMA step (kb or ks: high and low binary digit) and the
    place in the register (h, b, or i in a high and a low digit).
    """

    rows: tuple[tuple[str, int], ...]
    ks: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Some bits of every code of a unit, packed: `num_bits` of them from bit `low_bit` up.

    `order`: the axes that number the bytes (bf16: elements), slowest first. `fields`: the axes of size 2 inside one
    byte, most significant first. Words are little-endian.
    """

    num_bits: int
    low_bit: int = 0
    order: tuple[str, ...]
    fields: tuple[str, ...] = ()

    def words_per_lane(self, k_tile: int) -> int:
        """32-bit words of this plane that one lane holds of one m16 block."""
        return self.num_bits * UNIT_ROWS * k_tile // (32 * LANES * BLOCKS)


_ROWS = (("w", 4), ("rlo", 2), ("g", 8))
_AXES = {
    Math.BF16: UnitAxes(rows=_ROWS, ks=(("kb1", 2), ("kb0", 2), ("rhi", 2), ("t", 4), ("h", 2))),
    Math.INT8: UnitAxes(rows=_ROWS, ks=(("ks1", 2), ("ks0", 2), ("rhi", 2), ("t", 4), ("b", 4))),
    Math.E4M3: UnitAxes(rows=_ROWS, ks=(("ks1", 2), ("ks0", 2), ("rhi", 2), ("t", 4), ("b", 4))),
    Math.INT4: UnitAxes(rows=_ROWS, ks=(("ks0", 2), ("rhi", 2), ("t", 4), ("i1", 4), ("i0", 2))),
}
_K_TILE = {Math.BF16: 64, Math.INT8: 128, Math.E4M3: 128, Math.INT4: 128}
_ACTIVATION_BITS = {Math.BF16: 16, Math.INT8: 8, Math.E4M3: 8, Math.INT4: 4}


def _plane(num_bits: int, order: str, fields: str = "", low_bit: int = 0) -> Plane:
    return Plane(num_bits=num_bits, low_bit=low_bit, order=tuple(order.split()), fields=tuple(fields.split()))


_BYTES_OF_8_BIT_MATH = (_plane(8, "w ks1 ks0 g t rhi rlo b"),)
_NIBBLES_OF_8_BIT_MATH = (_plane(4, "w ks1 g t ks0 rhi b", "rlo"),)
_PLANES: dict[tuple[Math, int], tuple[Plane, ...]] = {
    (Math.BF16, 16): (_plane(16, "w kb1 kb0 g t rhi rlo h"),),
    (Math.BF16, 8): (_plane(8, "w kb1 g t kb0 rhi rlo h"),),
    (Math.BF16, 4): (_plane(4, "w g t kb1 kb0 h rhi", "rlo"),),
    (Math.BF16, 3): (_plane(2, "w g t kb1 h kb0", "rhi rlo"), _plane(1, "w g t h kb1", "kb0 rhi rlo", low_bit=2)),
    (Math.BF16, 2): (_plane(2, "w g t kb1 h kb0", "rhi rlo"),),
    (Math.INT8, 8): _BYTES_OF_8_BIT_MATH,
    (Math.INT8, 4): _NIBBLES_OF_8_BIT_MATH,
    (Math.E4M3, 8): _BYTES_OF_8_BIT_MATH,
    (Math.E4M3, 4): _NIBBLES_OF_8_BIT_MATH,
    (Math.INT4, 4): (_plane(4, "w ks0 g t rhi rlo i1", "i0"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one scheme's tensors lie in memory. n and k are a linear's out and in features before padding."""

    scheme: QuantScheme
    math: Math
    weight_bits: int
    k_tile: int
    group_size: int
    """Weights a scale covers along K; -1: one scale a row."""
    has_group_scales: bool
    has_zero_points: bool
    code_form: CodeForm
    activation: ActivationKind
    axes: UnitAxes
    planes: tuple[Plane, ...]

    @property
    def unit_bytes(self) -> int:
        """Packed weights of 64 rows x one k-tile."""
        return self.weight_bits * UNIT_ROWS * self.k_tile // 8

    @property
    def unit_words(self) -> int:
        """The same in 32-bit words, what the blob's last axis counts."""
        return self.unit_bytes // 4

    @property
    def words_per_lane(self) -> int:
        """32-bit words that one lane holds of one m16 block and k-tile, all planes together."""
        return self.unit_words // (LANES * BLOCKS)

    @property
    def has_channel_scales(self) -> bool:
        """One fp32 scale a row."""
        return self.group_size == -1 and self.weight_bits != 16

    @property
    def scale_strip_bytes(self) -> int:
        """Scales of 64 rows and one group; 0 without group scales."""
        return STRIP_BYTES if self.has_group_scales else 0

    @property
    def zero_strip_bytes(self) -> int:
        """Zero points of 64 rows and one group; 0 for symmetric schemes."""
        return STRIP_BYTES if self.has_zero_points else 0

    @property
    def k_tiles_per_group(self) -> int:
        """k-tiles that one scale covers; 0: all of them (one scale a row)."""
        return 0 if self.group_size == -1 else self.group_size // self.k_tile

    @property
    def x_row_bytes(self) -> int:
        """One token's activations of one k-tile."""
        return self.k_tile * _ACTIVATION_BITS[self.math] // 8

    @property
    def activation_groups(self) -> bool:
        """The tokens' scales change along K: one per token and 128 k."""
        return self.activation is ActivationKind.INT4_GROUP

    def padded_n(self, n: int) -> int:
        """Rows of the blob: n rounded up to 64."""
        return round_up(n, UNIT_ROWS)

    def padded_k(self, k: int) -> int:
        """Columns of the blob: k rounded up to the k-tile."""
        return round_up(k, self.k_tile)

    def num_k_tiles(self, k: int) -> int:
        """Iterations of the main loop."""
        return -(-k // self.k_tile)

    def num_groups(self, k: int) -> int:
        """Scales a row has; 1 for one scale a row."""
        return 1 if self.group_size == -1 else -(-k // self.group_size)

    def x_stride_bytes(self, k: int) -> int:
        """Bytes from one token's activations to the next's."""
        return round_up(k, X_K_MULTIPLE[self.activation]) * _ACTIVATION_BITS[self.math] // 8

    def num_x_scales(self, k: int) -> int:
        """fp32 scales of one token: none for bf16, one, or one per group of 128."""
        if self.activation is ActivationKind.BF16:
            return 0
        return self.num_k_tiles(k) if self.activation_groups else 1

    def packed_bytes(self, n: int, k: int, num_experts: int) -> int:
        """Everything a stack of experts takes on the GPU: blob, strips and channel scales, padding included."""
        row_blocks = self.padded_n(n) // UNIT_ROWS
        strips = self.num_groups(k) * (self.scale_strip_bytes + self.zero_strip_bytes)
        channel_scales = 4 * UNIT_ROWS if self.has_channel_scales else 0
        return num_experts * row_blocks * (self.num_k_tiles(k) * self.unit_bytes + strips + channel_scales)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


@functools.cache
def layout_of(scheme: QuantScheme) -> Layout:
    """The layout kernels read for a scheme. UnsupportedError, with every reason, where there is none."""
    reasons = tuple(_reasons(scheme))
    if reasons:
        raise UnsupportedError(f"a kernel layout of {scheme.name}", reasons)
    weights, math = scheme.weights, scheme.math
    return Layout(
        scheme=scheme,
        math=math,
        weight_bits=scheme.weight_bits,
        k_tile=_K_TILE[math],
        group_size=scheme.group_size,
        has_group_scales=scheme.group_size != -1,
        has_zero_points=not scheme.is_symmetric,
        code_form=_code_form(weights, math),
        activation=activation_kind(scheme),
        axes=_AXES[math],
        planes=_PLANES[math, scheme.weight_bits],
    )


def _code_form(weights: QuantSpec | None, math: Math) -> CodeForm:
    """What the decoding in the kernel starts from: e4m3 is sign and magnitude itself, and holds |q| <= 7 of 4-bit codes
    in its low bits.
    """
    if weights is None or weights.type is NumericType.FLOAT or math is Math.BF16:
        return CodeForm.UNSIGNED
    return CodeForm.SIGN_MAGNITUDE if math is Math.E4M3 else CodeForm.TWOS_COMPLEMENT


def activation_kind(scheme: QuantScheme) -> ActivationKind:
    """How the tokens of a scheme are quantised; defined for every scheme, with a kernel layout or without."""
    activations = scheme.input_activations
    if activations is not None and activations.strategy is Strategy.GROUP:
        return ActivationKind.INT4_GROUP
    return {
        Math.BF16: ActivationKind.BF16,
        Math.INT8: ActivationKind.INT8,
        Math.E4M3: ActivationKind.E4M3,
        Math.INT4: ActivationKind.INT4,
    }[scheme.math]


def _reasons(scheme: QuantScheme) -> Iterator[str]:
    """Why no kernel layout exists; what cannot even be a scheme is profiles.schemes' to refuse."""
    math, bits, group = scheme.math, scheme.weight_bits, scheme.group_size
    if (math, bits) not in _PLANES:
        known = sorted(b for kind, b in _PLANES if kind is math)
        yield f"{bits}-bit weights have no packing for {math.name} tensor cores, {', '.join(map(str, known))} have"
    if group != -1 and group % _K_TILE[math]:
        yield f"group {group} is not a multiple of the {math.name} k-tile, {_K_TILE[math]}"
