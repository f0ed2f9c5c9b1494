"""How far from the reference a right kernel may be, and the check that says so in words.

With S = sum_k x_k w_k and M = sqrt(sum_k (x_k w_k)^2), the errors of one output are:
- bf16 output: at most 2^-8 |S| (8 significant bits, round to nearest).
- bf16 operands, where a group's scale is multiplied into the weight: each w_k is off by e_k w_k, |e_k| <= 2^-8. The
  mean of the e_k scales S, at most 2^-8 |S|; about it the terms x_k w_k e_k are bounded and taken as independent: by
  Hoeffding's inequality they sum to more than 6 * 2^-8 M with a probability below 2 exp(-18) = 3e-8.
- sums: every partial sum is within |S| + 6 M in the same sense, and an addition loses at most one unit of that: 2^-23
  for float32 (tensor cores truncate), per k; 2^-13 for e4m3, whose accumulators keep some 14 bits (DeepSeek-V3
  technical report, 3.3.2), per MMA of 32 k. Integer sums are exact, but not their scaling: a few units of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from profiles.gpus import Math
from profiles.schemes import QuantScheme

BF16_ROUNDING = 2.0**-8
FLOAT32_UNIT = 2.0**-23
E4M3_ACCUMULATOR_UNIT = 2.0**-13
E4M3_MMA_K = 32
DEVIATIONS = 6.0
SCALING_STEPS = 8
"""Float32 operations beside the sum: scales of the weights and tokens, split-K's partial sums."""
SMALLEST = 2.0**-126
"""Below this, hardware may flush."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Expected:
    """What a launch should give: y [T, N] and how far off each value may be, the same shape and dtype."""

    y: Tensor
    tolerance: Tensor


def error_bound(scheme: QuantScheme, k: int, y: Tensor, magnitude: Tensor) -> Tensor:
    """The bound of the module's docstring for outputs y = S with M = magnitude, both [T, N], reduced over k."""
    spread = y.abs() + DEVIATIONS * magnitude
    relative = (k + SCALING_STEPS) * FLOAT32_UNIT
    if scheme.math is Math.E4M3:
        relative += -(-k // E4M3_MMA_K) * E4M3_ACCUMULATOR_UNIT
    if scheme.math is Math.BF16 and scheme.group_size != -1:
        relative += BF16_ROUNDING
    return relative * spread + BF16_ROUNDING * y.abs() + SMALLEST


def check_output(y: Tensor, expected: Expected) -> str | None:
    """None if every value of y [T, N] is within its tolerance, else a sentence about the worst; NaN never is within."""
    if y.shape != expected.y.shape:
        return f"output is {list(y.shape)}, expected {list(expected.y.shape)}"
    difference = (y.to(expected.y.dtype) - expected.y).abs()
    wrong = ~(difference <= expected.tolerance)
    num_wrong = int(wrong.sum())
    if num_wrong == 0:
        return None
    excess = torch.where(wrong, (difference / expected.tolerance).nan_to_num(nan=torch.inf), -1.0)
    row, column = divmod(int(excess.argmax()), y.shape[1])
    return (
        f"y[{row}, {column}] is {y[row, column].item():.6g}, expected {expected.y[row, column].item():.6g} "
        f"within {expected.tolerance[row, column].item():.2g}; {num_wrong} of {y.numel()} values are off"
    )
