"""From quantised weights to the bytes the kernels read, and back.

What lies where is kernel_gen.layouts' to say; this only moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kernel_gen.formats.weights import QuantizedWeights, code_type
from kernel_gen.layouts import UNIT_ROWS, CodeForm, Layout, Plane, layout_of
from profiles.errors import DataError
from profiles.schemes import QuantScheme

_INT_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGN_FLIP = {4: -0x77777778, 8: -0x7F7F7F80}
"""0x88888888 and 0x80808080 as int32: u XOR 2^(b-1) is u - 2^(b-1) in two's complement, for every code of a word."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeights:
    """A stack of experts as a launch reads it, contiguous, on one device; padded to whole units.

    blob: int32 [E, k-tiles, N/64, unit words]. scale_strip, zero_strip: int32 [E, groups, N/64, 4, 8], two bf16 a word;
    None where the scheme has none. channel_scales: float32 [E, N padded to 64], or None. n, k: sizes before padding.
    """

    scheme: QuantScheme
    n: int
    k: int
    num_experts: int
    blob: Tensor
    scale_strip: Tensor | None
    zero_strip: Tensor | None
    channel_scales: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Device memory of all parts; equals Layout.packed_bytes."""
        parts = (self.blob, self.scale_strip, self.zero_strip, self.channel_scales)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def to(self, device: torch.device | str) -> PackedWeights:
        """The same weights on another device."""
        return PackedWeights(
            scheme=self.scheme,
            n=self.n,
            k=self.k,
            num_experts=self.num_experts,
            blob=self.blob.to(device),
            scale_strip=None if self.scale_strip is None else self.scale_strip.to(device),
            zero_strip=None if self.zero_strip is None else self.zero_strip.to(device),
            channel_scales=None if self.channel_scales is None else self.channel_scales.to(device),
        )


def pack(weights: QuantizedWeights) -> PackedWeights:
    """Pack a stack for the kernels. UnsupportedError for a scheme without a kernel layout."""
    layout = layout_of(weights.scheme)
    num_experts, n, k = weights.codes.shape
    padded = _padded_codes(weights, layout)
    if layout.code_form is CodeForm.SIGN_MAGNITUDE:
        padded = _to_sign_magnitude(padded, weights.scheme)
    units = (layout.padded_n(n) // UNIT_ROWS, *_sizes(layout.axes.rows), layout.num_k_tiles(k), *_sizes(layout.axes.ks))
    split = padded.view(num_experts, *units)
    blob = torch.cat([_pack_plane(split, plane, layout) for plane in layout.planes], dim=-1).view(torch.int32)
    if layout.code_form is CodeForm.TWOS_COMPLEMENT:
        blob ^= _SIGN_FLIP[layout.weight_bits]
    scales = weights.scales
    return PackedWeights(
        scheme=weights.scheme,
        n=n,
        k=k,
        num_experts=num_experts,
        blob=blob,
        scale_strip=_pack_strip(scales) if layout.has_group_scales and scales is not None else None,
        zero_strip=None if weights.zeros is None else _pack_strip(weights.zeros.to(torch.bfloat16)),
        channel_scales=_pad_rows(scales)[..., 0].contiguous()
        if layout.has_channel_scales and scales is not None
        else None,
    )


def unpack(packed: PackedWeights) -> QuantizedWeights:
    """The weights that `pack` was given, exactly."""
    layout = layout_of(packed.scheme)
    blob = packed.blob
    if layout.code_form is CodeForm.TWOS_COMPLEMENT:
        blob = blob ^ _SIGN_FLIP[layout.weight_bits]
    codes: Tensor | None = None
    sizes = [_plane_elements(plane, layout) for plane in layout.planes]
    parts = torch.split(blob.view(_storage_type(layout)), sizes, dim=-1)
    for part, plane in zip(parts, layout.planes, strict=True):
        bits = _unpack_plane(part, plane, layout)
        codes = bits if codes is None else codes | (bits << plane.low_bit)
    assert codes is not None
    if layout.code_form is CodeForm.SIGN_MAGNITUDE:
        codes = torch.where(codes < 8, codes + 8, 16 - codes)
    num_experts, padded_n = packed.num_experts, layout.padded_n(packed.n)
    codes = codes.view(num_experts, padded_n, layout.padded_k(packed.k))[:, : packed.n, : packed.k].contiguous()
    if packed.channel_scales is not None:
        scales: Tensor | None = packed.channel_scales[:, : packed.n, None].contiguous()
    else:
        scales = None if packed.scale_strip is None else _unpack_strip(packed.scale_strip, packed.n)
    zeros = None if packed.zero_strip is None else _unpack_strip(packed.zero_strip, packed.n).to(torch.uint8)
    return QuantizedWeights(
        scheme=packed.scheme, codes=codes.view(code_type(packed.scheme)), scales=scales, zeros=zeros
    )


def _to_sign_magnitude(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """4-bit u to sign and magnitude of u - 8. DataError for u = 0, which has none."""
    if bool((codes == 0).any()):
        raise DataError(
            f"{scheme.name}: codes of -8 cannot be packed, its kernels hold -7..7: quantise with scales of max|w| / 7"
        )
    return torch.where(codes < 8, 16 - codes, codes - 8)


def _padded_codes(weights: QuantizedWeights, layout: Layout) -> Tensor:
    """Codes as plain integers, [E, N to 64, K to the k-tile]; what is added has the value 0, so u = z."""
    codes = weights.codes.view(_storage_type(layout))
    num_experts, n, k = codes.shape
    shape = (num_experts, layout.padded_n(n), layout.padded_k(k))
    if shape == tuple(codes.shape):
        return codes.contiguous()
    is_float = code_type(weights.scheme) is not torch.uint8
    zero_code = 0 if is_float or layout.has_zero_points else 1 << (layout.weight_bits - 1)
    padded = codes.new_full(shape, zero_code)  # rows past N have zero point and scale 0 in their strips
    padded[:, :n, :k] = codes
    if weights.zeros is not None:
        padded[:, :n, k:] = weights.zeros[:, :, -1:]
    return padded


def _pack_plane(codes: Tensor, plane: Plane, layout: Layout) -> Tensor:
    """One plane of every unit: uint8 [E, k-tiles, N/64, bytes] from codes [E, N/64, *rows, k-tiles, *ks]."""
    names = _axis_names(layout)
    if plane.num_bits < layout.weight_bits:
        codes = (codes >> plane.low_bit) & ((1 << plane.num_bits) - 1)
    # Fold the fields before the permutation, fastest first: long runs are still contiguous, and less is left to move.
    width = plane.num_bits
    for field in reversed(plane.fields):
        axis = names.index(field)
        codes = codes.select(axis, 0) | (codes.select(axis, 1) << width)
        names.remove(field)
        width *= 2
    wide, names, order = _merge_tail(codes, names, ["E", "kt", "nb", *plane.order])
    packed = wide.permute([names.index(name) for name in order]).contiguous()
    return packed.flatten(3).view(torch.uint8)


def _unpack_plane(part: Tensor, plane: Plane, layout: Layout) -> Tensor:
    """The inverse of _pack_plane: plain integers [E, N/64, *rows, k-tiles, *ks], low bits only."""
    sizes = dict((*layout.axes.rows, *layout.axes.ks))
    order = ["E", "kt", "nb", *plane.order]
    names = [name for name in _axis_names(layout) if name not in plane.fields]
    split = part.reshape(*part.shape[:3], *(sizes[name] for name in plane.order))
    codes = split.permute([order.index(name) for name in names]).contiguous()
    width = plane.num_bits << len(plane.fields)
    final = _axis_names(layout)
    for field in plane.fields:
        width //= 2
        names = [name for name in final if name in names or name == field]
        codes = torch.stack((codes & ((1 << width) - 1), codes >> width), dim=names.index(field))
    return codes


def _merge_tail(codes: Tensor, names: list[str], order: list[str]) -> tuple[Tensor, list[str], list[str]]:
    """Axes that end both orders are moved as one wide integer."""
    tail = 0
    while names[-1 - tail] == order[-1 - tail]:
        tail += 1
    if tail == 0:
        return codes, names, order
    kept = codes.dim() - tail
    num_bytes = prod(codes.shape[kept:]) * codes.element_size()
    wide = codes.flatten(kept).view(_INT_OF_BYTES[num_bytes]).squeeze(-1)
    return wide, names[:kept], order[: len(order) - tail]


def _pack_strip(values: Tensor) -> Tensor:
    """int32 [E, groups, N/64, 4, 8] of bf16 pairs (rows g and g + 8 of each m16 block) from bf16 [E, N, groups]."""
    padded = _pad_rows(values)
    num_experts, rows, groups = padded.shape
    split = padded.reshape(num_experts, rows // UNIT_ROWS, 4, 2, 8, groups)
    return split.permute(0, 5, 1, 2, 4, 3).contiguous().view(torch.int32).squeeze(-1)


def _unpack_strip(strip: Tensor, n: int) -> Tensor:
    num_experts, groups = strip.shape[:2]
    split = strip.unsqueeze(-1).view(torch.bfloat16)
    rows = strip.shape[2] * UNIT_ROWS
    return split.permute(0, 2, 3, 5, 4, 1).reshape(num_experts, rows, groups)[:, :n].contiguous()


def _pad_rows(values: Tensor) -> Tensor:
    """Zeros below [E, N, groups] up to whole units."""
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[1] % UNIT_ROWS))


def _axis_names(layout: Layout) -> list[str]:
    return ["E", "nb", *(name for name, _ in layout.axes.rows), "kt", *(name for name, _ in layout.axes.ks)]


def _sizes(axes: Sequence[tuple[str, int]]) -> list[int]:
    return [size for _, size in axes]


def _storage_type(layout: Layout) -> torch.dtype:
    """Integers of a code's bytes: planes are permutations of these."""
    return torch.int16 if layout.weight_bits == 16 else torch.uint8


def _plane_elements(plane: Plane, layout: Layout) -> int:
    return UNIT_ROWS * layout.k_tile * plane.num_bits // (16 if layout.weight_bits == 16 else 8)
