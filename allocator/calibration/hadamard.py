"""Rotation of a linear's inputs by a randomised Hadamard matrix, which spreads outliers before they are quantised.

W x = (W R) (R^T x) for an orthogonal R. With R = D H / sqrt(b): D random signs, H the Hadamard matrix of size b, the
largest power of two that divides K, block by block along K (QuaRot, Ashkboos et al. 2024, rotates so; a K such as
1408 = 11 * 128 has no Hadamard matrix of its own made by doubling). Weights are rotated beforehand; inputs at run time,
which for a down-projection is the only way, since the gated product lies between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """An orthogonal matrix of size k, drawn from a seed."""

    k: int
    seed: int = 0

    @property
    def block(self) -> int:
        """Inputs that are mixed with each other: the largest power of two that divides k."""
        return self.k & -self.k

    def signs(self, like: Tensor) -> Tensor:
        """D: +-1, [k]."""
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(0, 2, (self.k,), generator=generator)
        return (2 * bits - 1).to(device=like.device, dtype=like.dtype)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., k] times R: for inputs, and for the rows of a weight matrix."""
        return _transform((x * self.signs(x)).reshape(*x.shape[:-1], -1, self.block)).flatten(-2)

    def apply_both(self, h: Tensor) -> Tensor:
        """R^T h R for h [..., k, k]: the second moment of rotated inputs from that of inputs."""
        return self.apply(self.apply(h).mT).mT


def _transform(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform along the last axis, whose size is a power of two."""
    size = x.shape[-1]
    width = 1
    while width < size:
        low, high = x.reshape(*x.shape[:-1], size // (2 * width), 2, width).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        width *= 2
    return x * torch.tensor(size**-0.5, dtype=x.dtype)
