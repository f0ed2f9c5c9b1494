"""What quantisation needs to know about an expert's tokens: second moments of its linears' inputs, and how errors of
gate and up reach its output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.calibration.experts import Activation, gated
from allocator.calibration.visits import ExpertGroup
from profiles.models import Linear

ROWS_AT_ONCE = 8192
_STEP = 1e-3
"""Of the activation's numerical derivative, in units of its input, which is of order one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Of some experts, weighted by the squared router weight w of each token, in float32.

    Attributes:
        moments: sum of w^2 x x^T, [E, K, K], for each linear.
        gate_gain, up_gain: mean of (act'(g) u)^2 and of act(g)^2, [E, I]: what a squared error of gate or up is
            multiplied by on its way to the input of down.
        counts: tokens of each expert.
    """

    moments: dict[Linear, Tensor]
    gate_gain: Tensor
    up_gain: Tensor
    counts: list[int]


def gather(group: ExpertGroup, experts: range) -> Statistics:
    """Over all tokens of these experts of a group."""
    weights = group.experts.base
    gate_up, down = weights[Linear.GATE_UP].weights, weights[Linear.DOWN].weights
    hidden, inner = gate_up.shape[2], down.shape[2]
    device = gate_up.device
    moments = {
        Linear.GATE_UP: torch.zeros(len(experts), hidden, hidden, device=device),
        Linear.DOWN: torch.zeros(len(experts), inner, inner, device=device),
    }
    gains = torch.zeros(2, len(experts), inner, device=device)
    counts = [group.count(expert) for expert in experts]
    for slot, expert in enumerate(experts):
        for first in range(group.starts[expert], group.starts[expert + 1], ROWS_AT_ONCE):
            rows = slice(first, min(first + ROWS_AT_ONCE, group.starts[expert + 1]))
            x = group.x[group.tokens[rows]]
            products = (x @ gate_up[expert].T).float()
            weighted_x = x.float() * group.weights[rows, None]
            weighted_h = gated(products, group.experts.activation) * group.weights[rows, None]
            moments[Linear.GATE_UP][slot].addmm_(weighted_x.T, weighted_x)
            moments[Linear.DOWN][slot].addmm_(weighted_h.T, weighted_h)
            gains[:, slot] += _gains(products, group.experts.activation) / counts[slot]
    return Statistics(moments=moments, gate_gain=gains[0], up_gain=gains[1], counts=counts)


def _gains(products: Tensor, activation: Activation) -> Tensor:
    """Sums over tokens of (act'(g) u)^2 and act(g)^2, [2, I]."""
    gate, up = products.chunk(2, dim=-1)
    slope = (activation(gate + _STEP) - activation(gate - _STEP)) / (2 * _STEP)
    return torch.stack(((slope * up).square().sum(0), activation(gate).square().sum(0)))
