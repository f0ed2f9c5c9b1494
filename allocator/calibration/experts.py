"""One layer's experts as modules that run in any mix of schemes, and record what they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allocator.calibration.adapters import ExpertWeights
from allocator.calibration.hadamard import Rotation
from kernel_gen.formats import dequantize_activations, quantize_activations
from profiles.models import Linear
from profiles.schemes import QuantScheme

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearStack:
    """One linear of all experts of a layer, in one scheme or as the checkpoint has it.

    Attributes:
        weights: [E, N, K], the values that the codes stand for; rotated where `rotation` is.
        scheme: None: as the checkpoint has it.
        rotation: what turns the inputs before they are quantised; None: nothing.
    """

    weights: Tensor
    scheme: QuantScheme | None = None
    rotation: Rotation | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """What the weights multiply: x [tokens, K] rotated and quantised as the scheme says."""
        if self.rotation is not None:
            x = self.rotation.apply(x)
        if self.scheme is None or self.scheme.input_activations is None:
            return x
        return dequantize_activations(quantize_activations(x, self.scheme)).to(x.dtype)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """[tokens, N] of one expert."""
        return self.inputs(x) @ self.weights[expert].T


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, [tokens, I] from [tokens, 2*I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


class Experts(nn.Module):
    """Routed experts: y_t = sum over a token's experts of weight * down(act(gate(x_t)) * up(x_t)).

    `choose` says which LinearStack each expert's linears are taken from; a fresh one takes the checkpoint's. Shared
    experts are a stack of one that every token goes to.
    """

    def __init__(self, weights: ExpertWeights, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.base = {
            Linear.GATE_UP: LinearStack(weights=weights.gate_up),
            Linear.DOWN: LinearStack(weights=weights.down),
        }
        self.restore()

    @property
    def num_experts(self) -> int:
        """Experts of the stack."""
        return self.base[Linear.DOWN].weights.shape[0]

    def restore(self) -> None:
        """Run as the checkpoint says."""
        self.chosen = {linear: [stack] * self.num_experts for linear, stack in self.base.items()}

    def choose(self, chosen: dict[Linear, Sequence[LinearStack]]) -> None:
        """One LinearStack for each expert and linear."""
        self.chosen = {linear: list(stacks) for linear, stacks in chosen.items()}

    def expert(self, x: Tensor, index: int) -> Tensor:
        """One expert's output [tokens, H], before its routing weight."""
        hidden = gated(self.chosen[Linear.GATE_UP][index](x, index), self.activation)
        return self.chosen[Linear.DOWN][index](hidden, index)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, H], index and weights [tokens, k] -> [tokens, H]. Recorders see these through a forward hook."""
        y = torch.zeros_like(x)
        tokens, slots, starts = by_expert(index, self.num_experts)
        for expert in range(self.num_experts):
            rows = slice(starts[expert], starts[expert + 1])
            if rows.start == rows.stop:
                continue
            out = self.expert(x[tokens[rows]], expert) * weights[tokens[rows], slots[rows], None]
            y.index_add_(0, tokens[rows], out.to(y.dtype))
        return y


class SharedExperts(nn.Module):
    """A stack of one in the place of the shared experts' module."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> the same shape."""
        return self.experts.expert(x.reshape(-1, x.shape[-1]), 0).view_as(x)


def by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """(tokens, slots, starts): rows of expert e are tokens[starts[e]:starts[e + 1]], in the tokens' order, and the slot
    of the top-k that chose it. An index of num_experts or more is no expert's.
    """
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts]
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return order // index.shape[1], order % index.shape[1], starts
