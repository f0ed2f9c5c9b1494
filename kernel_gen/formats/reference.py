"""What a launch should give: the grouped GEMM in plain matrix products, from the same quantised parts.

For tests and for the sweep's check.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernel_gen.formats.activations import dequantize_activations, quantize_activations
from kernel_gen.formats.tolerance import Expected, error_bound
from kernel_gen.formats.weights import QuantizedWeights, dequantize
from kernel_gen.layouts import ActivationKind, activation_kind


def expected_output(
    x: Tensor,
    stacks: Sequence[QuantizedWeights],
    plan: Tensor,
    offsets: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Expected:
    """y[rows of expert e] = x @ W_e^T with W_e dequantised and the tokens quantised as W_e's scheme has it.

    Args:
        x: float tokens [T, K], sorted by expert.
        stacks: slot i's experts, all of one K and N.
        plan: int32 [E, 4], rows (expert, slot, index in the slot's stack, 0) in any order, as the launch reads it.
        offsets: int32 [E + 1]; expert e's tokens are offsets[e] to offsets[e + 1].
        dtype: float32, or float64 where the reference's own rounding should not count. On a GPU, float32 products
            must not be TF32: torch's default.
    """
    n = stacks[0].codes.shape[1]
    y = torch.zeros(x.shape[0], n, dtype=dtype, device=x.device)
    tolerance = torch.zeros_like(y)
    tokens: dict[ActivationKind, Tensor] = {}
    bounds = offsets.tolist()
    for expert, slot, index, _ in plan.tolist():
        rows = slice(bounds[expert], bounds[expert + 1])
        if rows.start == rows.stop:
            continue
        scheme = stacks[slot].scheme
        kind = activation_kind(scheme)
        if kind not in tokens:
            tokens[kind] = dequantize_activations(quantize_activations(x, scheme)).to(dtype)
        left, right = tokens[kind][rows], dequantize(stacks[slot].expert(index))[0].to(dtype)
        y[rows] = left @ right.T
        magnitude = (left.square() @ right.square().T).sqrt()
        tolerance[rows] = error_bound(scheme, x.shape[1], y[rows], magnitude)
    return Expected(y=y, tolerance=tolerance)
