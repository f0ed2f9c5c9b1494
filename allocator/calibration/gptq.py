"""GPTQ (Frantar et al. 2022), for a stack of experts at once, each with its own second moment of inputs.

For one expert: minimise tr((W - Q) H (W - Q)^T), H = sum over tokens of w^2 x x^T, column by column; the error of a
rounded column is spread over those not yet rounded, by the Cholesky factor of H's inverse. Columns go in falling order
of H's diagonal; scales and zero points are fixed beforehand (grid.py), so that the order does not touch the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allocator.calibration.grid import choose, lowest_code
from kernel_gen.formats import QuantizedWeights, dequantize
from kernel_gen.formats.weights import E4M3_MAX
from profiles.schemes import NumericType

BLOCK_COLUMNS = 128
MAX_DAMPING = 1e3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """Of the second moments of some experts' inputs.

    Attributes:
        upper: U of each expert, float32 [E, K, K], with U^T U the inverse of the damped moment, columns in `order`.
        order: the columns' order, [E, K].
        damping: what was added to each diagonal, as a share of its mean; more than asked where H would not factorise.
    """

    upper: Tensor
    order: Tensor
    damping: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GptqResult:
    """Rounded weights and what became of them.

    Attributes:
        weights: codes, scales, zero points.
        row_errors: d H d^T of every row's error d, float64 [E, N].
        nearest_objective: their sums, had all rows been rounded to nearest on the first grid, [E].
        rows_kept_nearest: rows of each expert where rounding to nearest was better, [E].
    """

    weights: QuantizedWeights
    row_errors: Tensor
    nearest_objective: Tensor
    rows_kept_nearest: Tensor


def gptq(weights: Tensor, moments: Tensor, starts: Sequence[QuantizedWeights], factors: Factors) -> GptqResult:
    """Round weights [E, N, K], each row on the grid of one of `starts`.

    Args:
        weights: floats.
        moments: H, [E, K, K], symmetric, at least positive semidefinite.
        starts: weights rounded to nearest, whose scales and zero points are the grids.
        factors: of the moments.

    Each row takes what is best in this objective of GPTQ on every grid and of every start itself, so that none is worse
    than rounding to nearest, nor than with fewer grids.
    """
    best, least, is_start = starts[0], row_objective(weights, starts[0], moments), None
    nearest = least
    for start, codes in zip(starts, _codes(weights.float(), starts, factors), strict=True):
        for candidate, plain in ((start, True), (replace(start, codes=codes), False)):
            errors = row_objective(weights, candidate, moments)
            better = errors < least
            best = choose(better.unsqueeze(-1), candidate, best)
            least = torch.minimum(errors, least)
            is_start = torch.ones_like(better) if is_start is None else torch.where(better, plain, is_start)
    assert is_start is not None
    return GptqResult(
        weights=best, row_errors=least, nearest_objective=nearest.sum(-1), rows_kept_nearest=is_start.sum(-1)
    )


def row_objective(weights: Tensor, quantized: QuantizedWeights, moments: Tensor) -> Tensor:
    """d H d^T of every row's error d, float64 [E, N]."""
    values = dequantize(quantized)
    rows = []
    for w, q, h in zip(weights, values, moments, strict=True):  # one expert's float64 at a time
        error = q.double() - w.double()
        rows.append(((error @ h.double()) * error).sum(-1))
    return torch.stack(rows)


def shrunk(moments: Tensor, counts: Sequence[int]) -> Tensor:
    """Moments [E, K, K] shrunk towards their mean diagonal times the identity, the more the fewer tokens are behind
    them: what GPTQ would learn from K columns and as few tokens is mostly chance.

    The share is that of the oracle approximating shrinkage estimator (Chen, Wiesel, Eldar, Hero: Shrinkage algorithms
    for MMSE covariance estimation, IEEE Transactions on Signal Processing 58, 2010, equation 23).
    """
    k = moments.shape[-1]
    n = torch.tensor([float(max(1, count)) for count in counts], device=moments.device, dtype=torch.float64)
    trace = moments.diagonal(dim1=1, dim2=2).double().sum(-1)
    square = torch.stack([moment.double().square().sum() for moment in moments])
    spread = ((n + 1 - 2 / k) * (square - trace.square() / k)).clamp_min(1e-300)
    share = (((1 - 2 / k) * square + trace.square()) / spread).clamp(0, 1).to(moments.dtype).view(-1, 1)
    result = moments * (1 - share).unsqueeze(-1)
    result.diagonal(dim1=1, dim2=2).add_(share * (trace / k).to(moments.dtype).view(-1, 1))
    return result


def factorise(moments: Tensor, *, damping: float = 0.01, activation_order: bool = True) -> Factors:
    """What every rounding of weights with inputs of these moments [E, K, K] needs.

    Args:
        moments: symmetric, at least positive semidefinite.
        damping: added to the diagonal, as a share of its mean; raised tenfold until a moment factorises.
        activation_order: columns in falling order of the diagonal, else as they are.
    """
    factors, used, orders = [], [], []
    for moment in moments:
        h = moment.double()
        columns = torch.arange(len(h), device=h.device)
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if activation_order else columns
        h = h[order][:, order]
        mean = float(h.diagonal().mean())
        unit = mean if mean > 0 else 1.0
        share = damping
        while (factor := _inverse_factor(h, share * unit)) is None and share <= MAX_DAMPING:
            share = max(share * 10, 1e-6)
        if factor is None:  # inputs so ill-scaled that no damping helps: every column for itself
            factor = torch.eye(len(h), dtype=h.dtype, device=h.device)
        factors.append(factor.float())
        used.append(share)
        orders.append(order)
    return Factors(upper=torch.stack(factors), order=torch.stack(orders), damping=tuple(used))


def _inverse_factor(h: Tensor, added: float) -> Tensor | None:
    """U with U^T U = (h + added)^-1; None if h does not factorise."""
    damped = h.clone()
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(upper.isfinite().all()) else upper


def _codes(weights: Tensor, starts: Sequence[QuantizedWeights], factors: Factors) -> tuple[Tensor, ...]:
    """Codes of all columns on each start's grid, in the weights' own order of columns. Grids are taken side by side, as
    if each made more rows: a column's steps are many and small.
    """
    weights = torch.cat([weights] * len(starts), dim=1)
    experts, n, k = weights.shape
    upper, order = factors.upper, factors.order
    gather = order.unsqueeze(2).expand(experts, k, n)
    work = weights.mT.gather(1, gather)  # [E, K, N]: a column's weights lie side by side
    rounder = _Rounder(starts)
    codes = torch.empty_like(work, dtype=torch.uint8)
    for first in range(0, k, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, k)
        block, errors = work[:, first:last], torch.empty(experts, last - first, n, device=work.device)
        scales, zeros = rounder.grids(order[:, first:last])
        inner = upper[:, first:last, first:last]
        for j in range(last - first):
            column = block[:, j]
            code, value = rounder(column, scales[:, j], None if zeros is None else zeros[:, j])
            codes[:, first + j] = code
            error = torch.sub(column, value, out=errors[:, j]).div_(inner[:, j, j, None])
            block[:, j + 1 :].baddbmm_(inner[:, j, j + 1 :].unsqueeze(2), error.unsqueeze(1), alpha=-1)
        work[:, last:].baddbmm_(upper[:, first:last, last:].mT, errors, alpha=-1)
    back = torch.empty_like(codes).scatter_(1, gather, codes).mT.contiguous().view(starts[0].codes.dtype)
    return torch.split(back, n // len(starts), dim=1)


class _Rounder:
    """Columns in an order of their own, each on its group's grid; all starts are of one scheme."""

    def __init__(self, starts: Sequence[QuantizedWeights]) -> None:
        start = starts[0]
        spec = start.scheme.weights
        assert spec is not None
        self._is_float = spec.type is NumericType.FLOAT
        self._group = spec.group_size or start.codes.shape[-1]
        scales, zeros = (_side_by_side(parts) for parts in zip(*((s.scales, s.zeros) for s in starts), strict=True))
        assert scales is not None
        self._scales, self._zeros = scales, zeros
        self._middle = float(1 << (spec.num_bits - 1))
        self._lowest, self._highest = lowest_code(start.scheme), (1 << spec.num_bits) - 1

    def grids(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scales, zero points) [E, count, N] of some columns, [E, count]; no zero points of a symmetric scheme."""
        groups = (columns // self._group).unsqueeze(2).expand(-1, -1, self._scales.shape[2])
        return self._scales.gather(1, groups), None if self._zeros is None else self._zeros.gather(1, groups)

    def __call__(self, column: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """(codes as bytes, values) [E, N] of the weights [E, N] of one column on its grid."""
        if self._is_float:
            code = (column / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            return code.view(torch.uint8), code.float().mul_(scale)
        middle = self._middle if zero is None else zero
        step = (column / scale).round_().add_(middle).clamp_(self._lowest, self._highest)
        return step.to(torch.uint8), step.sub_(middle).mul_(scale)


def _side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Scales or zero points [E, N, groups] of each start as float32 [E, groups, all N]; None where there are none."""
    present = [part.float().mT for part in parts if part is not None]
    return torch.cat(present, dim=2) if present else None
