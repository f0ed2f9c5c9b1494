"""Activations: tokens quantised at run time, one scale a token (int4 also: one per token and 128 k), symmetric.

scale = max|x| / 127 (int8), / 448 (e4m3), / 7 (int4), at least 2^-126; value = code * scale. Nothing here waits for the
GPU, so that a CUDA graph can hold it: a token with a NaN or an infinity is not refused but gets a scale that is not
finite, and its whole output row shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_gen.formats.weights import E4M3_MAX, MIN_SCALE, quotient
from kernel_gen.layouts import X_K_MULTIPLE, ActivationKind, activation_kind, round_up
from profiles.errors import SpecError
from profiles.schemes import QuantScheme

_LARGEST_CODE = {
    ActivationKind.INT8: 127.0,
    ActivationKind.E4M3: E4M3_MAX,
    ActivationKind.INT4: 7.0,
    ActivationKind.INT4_GROUP: 7.0,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedActivations:
    """Tokens as a launch reads them; Kp is K padded with zeros to kernel_gen.layouts.X_K_MULTIPLE.

    codes: bfloat16, int8 or float8_e4m3fn [T, Kp]; int4: uint8 [T, Kp/2], even k in the low nibble, two's complement.
    scales: float32 [T, 1], or [T, Kp/128] for INT4_GROUP; None for bf16. k: K before padding.
    """

    kind: ActivationKind
    codes: Tensor
    scales: Tensor | None
    k: int


def quantize_activations(x: Tensor, scheme: QuantScheme) -> QuantizedActivations:
    """Quantise float tokens [T, K]; T may be 0. SpecError for other shapes and types."""
    if not x.is_floating_point() or x.dim() != 2 or x.shape[1] == 0:
        raise SpecError(f"activations are floats [tokens, K] with K >= 1, got {x.dtype} {list(x.shape)}")
    kind = activation_kind(scheme)
    k = x.shape[1]
    padding = round_up(k, X_K_MULTIPLE[kind]) - k
    if kind is ActivationKind.BF16:
        codes = x.to(torch.bfloat16)
        codes = torch.nn.functional.pad(codes, (0, padding)) if padding else codes.contiguous()
        return QuantizedActivations(kind=kind, codes=codes, scales=None, k=k)
    values = torch.nn.functional.pad(x.float(), (0, padding))
    group_size = X_K_MULTIPLE[kind] if kind is ActivationKind.INT4_GROUP else values.shape[1]
    groups = values.view(x.shape[0], values.shape[1] // group_size, group_size)
    limit = _LARGEST_CODE[kind]
    scales = quotient(groups.abs().amax(dim=-1), limit).clamp_(min=MIN_SCALE)
    steps = (groups / scales.unsqueeze(-1)).clamp_(-limit, limit).flatten(1)
    if kind is ActivationKind.E4M3:
        codes = steps.to(torch.float8_e4m3fn)
    else:
        codes = steps.round_().nan_to_num_(nan=0.0).to(torch.int8)
        if kind is not ActivationKind.INT8:
            codes = _pack_nibbles(codes)
    return QuantizedActivations(kind=kind, codes=codes, scales=scales, k=k)


def dequantize_activations(x: QuantizedActivations) -> Tensor:
    """The values [T, K] in float32."""
    if x.scales is None:
        return x.codes[:, : x.k].float()
    codes = _unpack_nibbles(x.codes) if x.codes.dtype is torch.uint8 else x.codes
    num_tokens, num_groups = x.scales.shape
    values = codes.float().view(num_tokens, num_groups, codes.shape[1] // num_groups) * x.scales.unsqueeze(-1)
    return values.flatten(1)[:, : x.k]


def _pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [T, Kp] in -8..7 to uint8 [T, Kp/2]: even k in the low nibble."""
    unsigned = codes.view(torch.uint8)
    return (unsigned[:, 0::2] & 15) | (unsigned[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse, int8."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return (nibbles ^ 8).view(torch.int8) - 8
