"""A layer's steps in torch's operators: what the fused steps are compared with, and what runs in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.layer.routing import Routing
from kernel_gen.runtime import Activations, prepare_activations


def route(expert_ids: Tensor, num_experts: int) -> Routing:
    """Integers [T, top_k]; an id outside 0..num_experts-1 goes behind all others."""
    ids = torch.where((expert_ids < 0) | (expert_ids >= num_experts), num_experts, expert_ids.long()).flatten()
    in_order, order = ids.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=ids.device)
    positions = torch.empty_like(order, dtype=torch.int32)
    positions[order] = torch.arange(len(order), dtype=torch.int32, device=ids.device)
    return Routing(
        offsets=torch.searchsorted(in_order, bounds).to(torch.int32), positions=positions.view_as(expert_ids)
    )


def gather(hidden: Tensor, routing: Routing, experts: Experts) -> Activations:
    """bf16 [T, H] to rows in expert order, in every form that the experts read."""
    tokens, top_k = routing.positions.shape
    rows = torch.empty(tokens * top_k, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    rows[routing.positions.flatten()] = hidden[:, None].expand(-1, top_k, -1).flatten(0, 1)
    return prepare_activations(rows, experts.schemes)


def swiglu(gate_up: Tensor, experts: Experts) -> Activations:
    """bf16 [rows, 2 * I] to silu(gate) * up in every form that the experts read."""
    gate, up = gate_up.chunk(2, dim=1)
    return prepare_activations(torch.nn.functional.silu(gate) * up, experts.schemes)


def combine(y: Tensor, routing: Routing, expert_weights: Tensor) -> Tensor:
    """bf16 [rows, H] to bf16 [T, H]: each token's rows times floats [T, top_k], summed in float32."""
    tokens, top_k = routing.positions.shape
    is_ours = (routing.positions < routing.offsets[-1])[..., None]
    rows = y[routing.positions.flatten()].view(tokens, top_k, y.shape[1])
    weighted = torch.where(is_ours, rows.float() * expert_weights.to(torch.float32)[..., None], 0.0)
    return weighted.sum(1).to(torch.bfloat16)
