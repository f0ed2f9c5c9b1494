"""What a layer should give: a float32 MoE of the weights that it really has, tokens quantised as its schemes say."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.layer.allocations import Schemes
from bench.layer.cells import Given
from bench.layer.weights import LayerWeights
from kernel_gen.formats import dequantize_activations, quantize_activations
from profiles.models import Linear
from profiles.schemes import QuantScheme

CHECKED_TOKENS = 8


def expected_output(weights: LayerWeights, schemes: Schemes, given: Given) -> Tensor:
    """The first CHECKED_TOKENS rows of the layer's output, float32, expert by expert."""
    hidden, ids, router = (tensor[:CHECKED_TOKENS] for tensor in given.tensors)
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in sorted(set(ids.flatten().tolist())):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = _linear(hidden[token], weights, Linear.GATE_UP, schemes[Linear.GATE_UP][expert], expert).chunk(
            2, dim=1
        )
        product = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)
        y = _linear(product, weights, Linear.DOWN, schemes[Linear.DOWN][expert], expert)
        out.index_add_(0, token, y * router[token, choice, None].float())
    return out


def _linear(x: Tensor, weights: LayerWeights, linear: Linear, scheme: QuantScheme, expert: int) -> Tensor:
    return dequantize_activations(quantize_activations(x, scheme)) @ weights.real(linear, scheme, expert).T
