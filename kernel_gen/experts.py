"""The experts of one linear on a device: quantised, packed, and bound to the slots of a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_gen.formats import PackedWeights, pack, quantize, require_weights, unpack
from profiles.errors import SpecError
from profiles.schemes import QuantScheme

SWIGLU_ROWS = 8
"""Rows of gate, then of up, that an epilogue takes together: half an MMA's 16."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Binding:
    """What a launch reads to find the weights. plan: int32 [E, 4] rows (expert, slot, index in its stack, 0); weights:
    int64 [slots, 4] device addresses.
    """

    plan: Tensor
    weights: Tensor


class Experts:
    """All experts' weights [E, N, K] of one linear, each expert in one scheme; experts of one scheme are one packed
    stack.

    Args:
        stacks: one packed stack a scheme; every stack has the same N and K and lies on the same device.
        members: for each stack, the expert each of its entries is. Together they name every expert exactly once.
        is_interleaved: rows are as `interleaved` puts them.
    """

    def __init__(
        self, stacks: Sequence[PackedWeights], members: Sequence[Sequence[int]], *, is_interleaved: bool = False
    ) -> None:
        _check_stacks(stacks, members)
        self.stacks = tuple(stacks)
        self.members = tuple(tuple(experts) for experts in members)
        self.n, self.k = stacks[0].n, stacks[0].k
        self.num_experts = sum(len(experts) for experts in members)
        self.device = stacks[0].blob.device
        self.is_interleaved = is_interleaved
        self._bindings: dict[tuple[QuantScheme, ...], Binding] = {}

    @classmethod
    def from_weights(cls, weights: Tensor, schemes: QuantScheme | Sequence[QuantScheme]) -> Experts:
        """Quantise (round to nearest) and pack float weights [E, N, K], on their device; one scheme for all experts, or
        one each. SpecError for other shapes and types, DataError for weights that are not finite.
        """
        if not isinstance(weights, Tensor):
            raise SpecError(f"weights: expected a tensor of floats [E, N, K], got a {type(weights).__name__}")
        require_weights(weights)
        if not isinstance(schemes, Iterable | QuantScheme):
            raise SpecError(f"schemes: expected those of profiles.schemes.parse, got {schemes!r}")
        per_expert = [schemes] * len(weights) if isinstance(schemes, QuantScheme | str) else list(schemes)
        if other := [scheme for scheme in per_expert if not isinstance(scheme, QuantScheme)]:
            raise SpecError(f"schemes: expected those of profiles.schemes.parse, got {other[0]!r}")
        if len(per_expert) != len(weights):
            raise SpecError(f"schemes: expected one, or one for each of {len(weights)} experts, got {len(per_expert)}")
        distinct = list(dict.fromkeys(per_expert))
        members = [[e for e, scheme in enumerate(per_expert) if scheme == wanted] for wanted in distinct]
        stacks = [pack(quantize(weights[experts], scheme)) for scheme, experts in zip(distinct, members, strict=True)]
        return cls(stacks, members)

    def interleaved(self) -> Experts:
        """The same weights [E, 2 * I, K] for a kernel with SwiGLU in its epilogue: eight rows of gate, which are I rows
        before up's, then the eight of up that belong to them, and so on. SpecError unless I is a multiple of 8.
        """
        if self.is_interleaved or self.n % (2 * SWIGLU_ROWS):
            raise SpecError(
                f"experts: expected gate's rows before up's, {SWIGLU_ROWS} or a multiple each, got {self.n}"
            )
        rows = torch.arange(self.n, device=self.device).view(2, -1, SWIGLU_ROWS).transpose(0, 1).flatten()
        return Experts([_with_rows(stack, rows) for stack in self.stacks], self.members, is_interleaved=True)

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        """The schemes in use, one a stack."""
        return tuple(stack.scheme for stack in self.stacks)

    @property
    def scheme_of_expert(self) -> tuple[QuantScheme, ...]:
        """Each expert's scheme."""
        found = {e: stack.scheme for stack, experts in zip(self.stacks, self.members, strict=True) for e in experts}
        return tuple(found[e] for e in range(self.num_experts))

    @property
    def num_bytes(self) -> int:
        """Device memory of all weights and scales."""
        return sum(stack.num_bytes for stack in self.stacks)

    def bind(self, slots: tuple[QuantScheme, ...]) -> Binding:
        """Tables for a kernel whose slots are these schemes; made once, then kept, since a captured graph reads them on
        every replay.

        The plan lists experts of slow tiles first (wide activations, then wide weights), so that no long tile is left
        for the end. SpecError for a slot that is missing, or inside a graph capture, which cannot copy new tables.
        """
        missing = [scheme.name for scheme in self.schemes if scheme not in slots]
        if missing:
            raise SpecError(
                f"experts: schemes {missing} are not among the kernel's {[scheme.name for scheme in slots]}"
            )
        if slots not in self._bindings:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise SpecError(
                    "experts: expected them launched by this kernel before, since a graph capture cannot copy their "
                    "tables, got their first launch"
                )
            rows = [
                (stack.scheme.activation_bits, stack.scheme.weight_bits, expert, slots.index(stack.scheme), index)
                for stack, experts in zip(self.stacks, self.members, strict=True)
                for index, expert in enumerate(experts)
            ]
            rows.sort(key=lambda row: (-row[0], -row[1], row[2]))
            by_scheme = {stack.scheme: stack for stack in self.stacks}
            self._bindings[slots] = Binding(
                plan=torch.tensor([[*row[2:], 0] for row in rows], dtype=torch.int32, device=self.device),
                weights=torch.tensor(
                    [_addresses(by_scheme.get(scheme)) for scheme in slots], dtype=torch.int64, device=self.device
                ),
            )
        return self._bindings[slots]


def _with_rows(stack: PackedWeights, rows: Tensor) -> PackedWeights:
    """The stack with its rows in this order."""
    whole = unpack(stack)
    return pack(
        dataclasses.replace(
            whole,
            codes=whole.codes[:, rows],
            scales=None if whole.scales is None else whole.scales[:, rows],
            zeros=None if whole.zeros is None else whole.zeros[:, rows],
        )
    )


def _addresses(stack: PackedWeights | None) -> list[int]:
    if stack is None:
        return [0, 0, 0, 0]
    parts = (stack.blob, stack.scale_strip, stack.zero_strip, stack.channel_scales)
    return [0 if part is None else part.data_ptr() for part in parts]


def _check_stacks(stacks: Sequence[PackedWeights], members: Sequence[Sequence[int]]) -> None:
    if not isinstance(stacks, Sequence) or not all(isinstance(stack, PackedWeights) for stack in stacks):
        raise SpecError(f"stacks: expected a list of what kernel_gen.formats.pack gives, got a {type(stacks).__name__}")
    if not isinstance(members, Sequence) or not all(isinstance(experts, Sized) for experts in members):
        raise SpecError(f"members: expected a list of experts for each stack, got {members!r}")
    if not stacks or len(stacks) != len(members):
        raise SpecError(
            f"stacks: expected one or more, with as many lists of experts, got {len(stacks)} and {len(members)}"
        )
    for stack, experts in zip(stacks, members, strict=True):
        if stack.num_experts != len(experts):
            raise SpecError(
                f"members: the {stack.scheme.name} stack holds {stack.num_experts} experts, {len(experts)} are named"
            )
    shapes = {(stack.n, stack.k, str(stack.blob.device)) for stack in stacks}
    if len(shapes) > 1:
        raise SpecError(f"stacks: expected one N, K and device, got {sorted(shapes)}")
    if len({stack.scheme for stack in stacks}) != len(stacks):
        raise SpecError(f"stacks: expected distinct schemes, got {[stack.scheme.name for stack in stacks]}")
    named = sorted(expert for experts in members for expert in experts)
    if named != list(range(len(named))):
        raise SpecError(f"members: expected each expert 0..{len(named) - 1} exactly once, got {named}")
