"""The grid that weights are rounded to: each group's scale and zero point, from its range or from a narrower one.

Clipping search: for each group (or channel), ranges of decreasing share of the full one; the share whose rounding
error changes the output least, other groups aside: d H d^T for the group's error d and its block H of the inputs'
second moment. Scales, zero points and codes are kernel_gen.formats' own, so that what is chosen here is what a
kernel reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernel_gen.formats import QuantizedWeights, dequantize, quantize
from profiles.gpus import Math
from profiles.schemes import NumericType, QuantScheme

CLIP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)


def nearest(weights: Tensor, scheme: QuantScheme, moments: Tensor | None = None, *, clip: bool) -> QuantizedWeights:
    """Weights [E, N, K] rounded to nearest.

    Args:
        weights: floats, finite.
        scheme: what to round to; w16a16 and e4m3 are not clipped (their range is not what limits them).
        moments: second moments of the inputs, [E, K, K], whose blocks weigh the errors of a group; None: the identity.
        clip: search for narrower ranges.
    """
    best = quantize(weights, scheme)
    spec = scheme.weights
    if not clip or spec is None or spec.type is NumericType.FLOAT or best.scales is None:
        return best
    group = spec.group_size or weights.shape[-1]
    blocks = _blocks(weights, moments, group)
    low, high = _ranges(weights, group)
    least = _group_errors(weights, best, blocks)
    for share in CLIP_SHARES[1:]:
        clipped = weights.clamp(_spread(low * share, weights, group), _spread(high * share, weights, group))
        trial = quantize(clipped, scheme)
        errors = _group_errors(weights, trial, blocks)
        better = errors < least
        least = torch.where(better, errors, least)
        best = choose(better, trial, best)
    return best


def choose(where: Tensor, first: QuantizedWeights, second: QuantizedWeights) -> QuantizedWeights:
    """`first` where true, else `second`. where: bool [E, N, groups], or [E, N, 1] for whole rows."""
    assert first.scales is not None
    assert second.scales is not None
    group = first.scheme.group_size if first.scheme.group_size != -1 else first.codes.shape[-1]
    where = where.expand_as(first.scales)
    return replace(
        first,
        codes=torch.where(_spread(where, first.codes, group), first.codes, second.codes)
        if first.codes.dtype is torch.uint8
        else _where_e4m3(_spread(where, first.codes, group), first.codes, second.codes),
        scales=torch.where(where, first.scales, second.scales),
        zeros=None if first.zeros is None or second.zeros is None else torch.where(where, first.zeros, second.zeros),
    )


def lowest_code(scheme: QuantScheme) -> int:
    """The least integer code that the kernels hold: int4 weights widened to e4m3 are sign and magnitude."""
    return 1 if scheme.weight_bits == 4 and scheme.math is Math.E4M3 else 0


def _where_e4m3(where: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(where, first.view(torch.uint8), second.view(torch.uint8)).view(first.dtype)


def _ranges(weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of each group, 0 included, [E, N, groups]."""
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % group))
    groups = padded.reshape(*weights.shape[:-1], -1, group)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _spread(of_groups: Tensor, like: Tensor, group: int) -> Tensor:
    """[E, N, groups] to every weight of the group, [E, N, K]."""
    return of_groups.repeat_interleave(group, dim=-1)[..., : like.shape[-1]]


def _blocks(weights: Tensor, moments: Tensor | None, group: int) -> Tensor:
    """The moments' diagonal blocks, [E, groups, group, group]; zeros where the last group is a short one."""
    experts, _, k = weights.shape
    if moments is None:
        moments = torch.eye(k, device=weights.device, dtype=weights.dtype).expand(experts, k, k)
    padding = -k % group
    padded = torch.nn.functional.pad(moments.to(weights), (0, padding, 0, padding))
    number = (k + padding) // group
    split = padded.reshape(experts, number, group, number, group)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def _group_errors(weights: Tensor, quantized: QuantizedWeights, blocks: Tensor) -> Tensor:
    """d H d^T of each group's rounding error d, [E, N, groups]."""
    errors = dequantize(quantized).to(weights) - weights
    experts, n, k = errors.shape
    _, number, group, _ = blocks.shape
    padded = torch.nn.functional.pad(errors, (0, number * group - k)).view(experts, n, number, group).transpose(1, 2)
    return ((padded @ blocks) * padded).sum(-1).transpose(1, 2)
