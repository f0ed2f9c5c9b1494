"""Weights: from floats to codes and scales, and back to floats. The kernels' byte order is packing.py's.

value = (u - z) * scale. Symmetric schemes: z = 2^(b-1), scale = max|w| / (2^(b-1) - 1). Asymmetric ones: the range
includes 0, scale = (max - min) / (2^b - 1), z = round(-min / scale). e4m3: value = code * scale, scale = max|w| / 448.
Codes are computed against the scale as it is stored. A scale is at least 2^-126, so that rows of zeros and of
subnormals need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from profiles.errors import DataError, SpecError
from profiles.schemes import NumericType, QuantScheme, QuantSpec

E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126
"""The smallest normal float32 and bf16: a smaller one could be flushed to 0 and divided by."""
WEIGHTS_AT_ONCE = 1 << 26
"""Quantisation's temporaries are some float32 copies of this many weights, not of the whole stack."""
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeights:
    """A stack of experts [E, N, K] in one scheme.

    codes: [E, N, K], uint8 u in [0, 2^b), or float8_e4m3fn, or bfloat16 (w16a16). scales: bf16 [E, N, groups] where the
    scheme has groups (the last may be shorter), float32 [E, N, 1] per channel, None for w16a16. zeros: uint8, shaped as
    the scales; None for symmetric schemes.
    """

    scheme: QuantScheme
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None

    def expert(self, index: int) -> QuantizedWeights:
        """A stack of one."""
        one = slice(index, index + 1)
        return QuantizedWeights(
            scheme=self.scheme,
            codes=self.codes[one],
            scales=None if self.scales is None else self.scales[one],
            zeros=None if self.zeros is None else self.zeros[one],
        )


def code_type(scheme: QuantScheme) -> torch.dtype:
    """What a scheme's codes are held in before packing."""
    if scheme.weights is None:
        return torch.bfloat16
    return torch.float8_e4m3fn if scheme.weights.type is NumericType.FLOAT else torch.uint8


def quantize(weights: Tensor, scheme: QuantScheme) -> QuantizedWeights:
    """Quantise float weights [E, N, K], or [N, K] as a stack of one, in float32.

    Raises:
        SpecError: not a dense tensor with values, not floats of 16 bits or more, not two or three dimensions, or a
            size of 0.
        DataError: NaN or infinity; the sentence names the expert and row.
    """
    require_weights(weights, dims=(2, 3))
    stack = weights if weights.dim() == 3 else weights.unsqueeze(0)
    _refuse_not_finite(stack)
    experts_at_once = max(1, WEIGHTS_AT_ONCE // stack[0].numel())
    parts = [_quantize(experts, scheme) for experts in torch.split(stack, experts_at_once)]
    codes, scales, zeros = (_joined(tensors) for tensors in zip(*parts, strict=True))
    assert codes is not None
    return QuantizedWeights(scheme=scheme, codes=codes, scales=scales, zeros=zeros)


def require_weights(weights: Tensor, *, dims: tuple[int, ...] = (3,)) -> None:
    """SpecError unless these can be quantised, as far as it can be told without reading them."""
    is_dense = weights.layout is torch.strided and not weights.is_meta
    is_wide = weights.is_floating_point() and weights.element_size() >= 2
    if not is_dense or not is_wide or weights.dim() not in dims or 0 in weights.shape:
        stacks = "[experts, N, K] or [N, K]" if 2 in dims else "[E, N, K]"
        odd = "" if weights.layout is torch.strided else f", {weights.layout},"
        raise SpecError(
            f"weights: expected a tensor of floats {stacks}, dense, of 16 bits or more, no size of them 0, got "
            f"{weights.dtype} {[*weights.shape]}{odd} on {weights.device}"
        )


def dequantize(weights: QuantizedWeights) -> Tensor:
    """The values [E, N, K] in float32; beyond its range they saturate."""
    if weights.scales is None:
        return weights.codes.float()
    k, spec = weights.codes.shape[-1], weights.scheme.weights
    assert spec is not None
    values = _grouped(weights.codes.float(), spec.group_size or k)
    if weights.zeros is not None:
        values -= weights.zeros.unsqueeze(-1)
    elif spec.type is NumericType.INT:
        values -= 1 << (spec.num_bits - 1)
    values *= weights.scales.unsqueeze(-1)
    return values.clamp_(-_FLOAT32_MAX, _FLOAT32_MAX).flatten(2)[..., :k]


def quotient(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded once on every device: by a plain number, CUDA multiplies by a rounded reciprocal."""
    return values / torch.full_like(values, divisor)


def _quantize(stack: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(codes, scales, zeros) of finite weights [E, N, K]."""
    spec = scheme.weights
    if spec is None:
        limit = torch.finfo(torch.bfloat16).max
        return stack.clamp(-limit, limit).to(torch.bfloat16), None, None
    if spec.type is NumericType.FLOAT:
        return _quantize_e4m3(stack.float())
    return _quantize_int(stack.float(), spec)


def _quantize_int(stack: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    k = stack.shape[-1]
    groups = _grouped(stack, spec.group_size or k)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    num_steps = (1 << spec.num_bits) - 1
    if spec.symmetric:
        exact = quotient(torch.maximum(-low, high), num_steps >> 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        exact = quotient(high, num_steps) - quotient(low, num_steps)  # the difference first could overflow
    stored_type = torch.float32 if spec.group_size is None else torch.bfloat16
    scales = exact.clamp(MIN_SCALE, torch.finfo(stored_type).max).to(stored_type)
    used = scales.float()
    zeros = None if spec.symmetric else torch.round(-low / used).clamp_(0, num_steps)
    steps = (groups / used.unsqueeze(-1)).round_()
    steps += (num_steps + 1) >> 1 if zeros is None else zeros.unsqueeze(-1)
    codes = steps.clamp_(0, num_steps).to(torch.uint8).flatten(2)[..., :k].contiguous()
    return codes, scales, None if zeros is None else zeros.to(torch.uint8)


def _quantize_e4m3(stack: Tensor) -> tuple[Tensor, Tensor, None]:
    largest = torch.maximum(-stack.amin(dim=-1, keepdim=True), stack.amax(dim=-1, keepdim=True))
    scales = quotient(largest, E4M3_MAX).clamp_(MIN_SCALE)
    # Past 464 the cast gives NaN, and a rounded quotient may pass 448.
    return (stack / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales, None


def _refuse_not_finite(stack: Tensor) -> None:
    """A row's extremes tell; float64 that overflows float32 counts as infinite."""
    finite = stack.amin(dim=-1).float().isfinite() & stack.amax(dim=-1).float().isfinite()
    if not bool(finite.all()):
        expert, row = (~finite).nonzero()[0].tolist()
        raise DataError(
            f"the weights of expert {expert} have a NaN or an infinity in row {row}; they must be finite in float32"
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return torch.cat(present)


def _grouped(values: Tensor, group_size: int) -> Tensor:
    """[E, N, K] as [E, N, groups, group_size]; zeros fill up the last group and change no range that includes 0."""
    padding = -values.shape[-1] % group_size
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    return values.reshape(*values.shape[:-1], values.shape[-1] // group_size, group_size)
