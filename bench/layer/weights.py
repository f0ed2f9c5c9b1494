"""A model's experts on the GPU, packed once a scheme; allocations pick their experts' entries from that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.formats import PackedWeights, dequantize, unpack
from kernel_gen.measure import COLD_L2_FACTOR, make_stack
from profiles.models import Linear, MoeShape
from profiles.schemes import QuantScheme


class LayerWeights:
    """Random weights of a shape: the same floats, whatever the scheme.

    Args:
        shape: the model.
        device: where.
    """

    def __init__(self, shape: MoeShape, device: str) -> None:
        self.shape, self.device = shape, device
        self._stacks: dict[tuple[Linear, QuantScheme, bool], PackedWeights] = {}

    def experts(self, linear: Linear, per_expert: Sequence[QuantScheme], *, interleaved: bool = False) -> Experts:
        """One linear, each expert in its scheme, in memory of its own."""
        distinct = list(dict.fromkeys(per_expert))
        members = [[e for e, scheme in enumerate(per_expert) if scheme == wanted] for wanted in distinct]
        stacks = [
            _picked(self._stack(linear, scheme, interleaved), indices)
            for scheme, indices in zip(distinct, members, strict=True)
        ]
        return Experts(stacks, members, is_interleaved=interleaved)

    def dense(self, linear: Linear, scheme: QuantScheme) -> Tensor:
        """bf16 [E, N, K], as the bf16 scheme has them."""
        return unpack(self._stack(linear, scheme, False)).codes

    def real(self, linear: Linear, scheme: QuantScheme, expert: int) -> Tensor:
        """One expert's weights [N, K] as they are after quantising, float32."""
        return dequantize(unpack(_picked(self._stack(linear, scheme, False), [expert])))[0]

    def _stack(self, linear: Linear, scheme: QuantScheme, interleaved: bool) -> PackedWeights:
        key = (linear, scheme, interleaved)
        if key not in self._stacks and interleaved:
            plain = Experts([self._stack(linear, scheme, False)], [range(self.shape.num_experts)])
            self._stacks[key] = plain.interleaved().stacks[0]
        elif key not in self._stacks:
            n, k = self.shape.gemm(linear)
            seed = list(Linear).index(linear)
            self._stacks[key] = make_stack(scheme, self.shape.num_experts, n, k, seed, self.device)
        return self._stacks[key]


def num_sets(touched_bytes: float, l2_bytes: int) -> int:
    """How many layers in turn keep L2 cold, if one reads so many bytes of weights."""
    return 1 + math.ceil(COLD_L2_FACTOR * l2_bytes / max(1.0, touched_bytes))


class SchemeShare(Experts):
    """The experts of one scheme of a linear, to be launched alone: a plan that lists them only, over the offsets of
    all.

    Args:
        whole: the linear.
        index: which of its stacks.
    """

    def __init__(self, whole: Experts, index: int) -> None:
        self.stacks, self.members = (whole.stacks[index],), (whole.members[index],)
        self.n, self.k, self.num_experts, self.device = whole.n, whole.k, whole.num_experts, whole.device
        self.is_interleaved = whole.is_interleaved
        self._bindings = {}

    @property
    def scheme_of_expert(self) -> tuple[QuantScheme, ...]:
        """One scheme, as often as there are experts here."""
        return self.schemes * len(self.members[0])


def _picked(stack: PackedWeights, indices: Sequence[int]) -> PackedWeights:
    at = torch.tensor(indices, device=stack.blob.device)

    def picked(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.index_select(0, at)

    return dataclasses.replace(
        stack,
        num_experts=len(indices),
        blob=stack.blob.index_select(0, at),
        scale_strip=picked(stack.scale_strip),
        zero_strip=picked(stack.zero_strip),
        channel_scales=picked(stack.channel_scales),
    )
