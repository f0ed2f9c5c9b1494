"""Many whole allocations measured in one walk over the layers: each is a stream of hidden states of its own.

At every MoE layer the calibration tokens tell the quantiser what it needs, each linear is quantised once in every
scheme that some allocation wants, and each stream runs the layer with its own choice. In memory: a layer, its schemes,
and one hidden state for each evaluated token of each allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allocator.calibration.experts import LinearStack
from allocator.calibration.layer_losses import quantized_stacks, turns
from allocator.calibration.measured import divergence, negative_log_likelihood
from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.statistics import gather
from allocator.calibration.visits import ExpertGroup, advance, through, visit
from profiles.errors import SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import QuantScheme

Assignment = Mapping[LinearId, QuantScheme]
Stream = list[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an allocation does to a model: mean KL(exact || quantised) per token in nats, and perplexity."""

    kl: float
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredAllocations:
    """Of several allocations, in their order; exact_perplexity: the model's own."""

    allocations: tuple[Measured, ...]
    exact_perplexity: float


def measure_allocations(
    model: StreamedModel,
    tokens: Tensor,
    calibration: Tensor,
    assignments: Sequence[Assignment],
    quantizer: Quantizer,
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> MeasuredAllocations:
    """Run each allocation over held-out tokens.

    Args:
        model: the checkpoint.
        tokens: [sequences, length] to measure on.
        calibration: [sequences, length] that GPTQ and clipping learn from, on the model as it is.
        assignments: schemes; a linear that is not in one stays as it is there.
        quantizer: how weights become codes.
        batch_size: sequences at once.
        progress: is given a line after each layer.

    Raises:
        SpecError: nothing to measure, or a linear that the model does not have.
    """
    if not assignments:
        raise SpecError("no allocation to measure")
    _check(model, assignments)
    streams: list[Stream] = [
        [model.embed(b) for b in torch.split(tokens, batch_size)] for _ in range(1 + len(assignments))
    ]
    position = 0
    for seen in visit(model, calibration, batch_size=batch_size):
        layer = seen.layer
        for index in range(position, layer.index):
            streams = [through(model, index, stream) for stream in streams]
        position = layer.index + 1
        with torch.no_grad():
            menus = [(group, _menu(group, layer.index, assignments, quantizer, model.dtype)) for group in seen.groups()]
        moved = [[advance(model, layer, batch) for batch in streams[0]]]
        for assignment, stream in zip(assignments, streams[1:], strict=True):
            for group, menu in menus:
                _choose(group, layer.index, assignment, menu)
            moved.append([advance(model, layer, batch) for batch in stream])
        for group, _ in menus:
            group.experts.restore()
        streams = moved
        if progress is not None:
            progress(f"layer {layer.index}: {len(assignments)} allocations")
    for index in range(position, model.num_layers):
        streams = [through(model, index, stream) for stream in streams]
    return _scores(model, tokens, streams, batch_size)


def _scores(model: StreamedModel, tokens: Tensor, streams: list[Stream], batch_size: int) -> MeasuredAllocations:
    exact = streams[0]
    ids = torch.split(tokens, batch_size)

    def perplexity(stream: Stream) -> float:
        loss = sum(negative_log_likelihood(model, hidden, batch) for hidden, batch in zip(stream, ids, strict=True))
        return math.exp(min(loss / (tokens.shape[0] * (tokens.shape[1] - 1)), 700.0))

    measured = [
        Measured(
            kl=sum(divergence(model, a, b) for a, b in zip(exact, stream, strict=True)) / tokens.numel(),
            perplexity=perplexity(stream),
        )
        for stream in streams[1:]
    ]
    return MeasuredAllocations(allocations=tuple(measured), exact_perplexity=perplexity(exact))


def _menu(
    group: ExpertGroup, layer: int, assignments: Sequence[Assignment], quantizer: Quantizer, dtype: torch.dtype
) -> dict[Linear, dict[QuantScheme, LinearStack]]:
    """Every linear in every scheme that some allocation wants of it."""
    number = group.experts.num_experts
    wanted = {
        linear: list(
            dict.fromkeys(
                assignment[block]
                for block in (LinearId(layer=layer, expert=e + group.first_id, linear=linear) for e in range(number))
                for assignment in assignments
                if block in assignment
            )
        )
        for linear in Linear
    }
    parts: dict[Linear, dict[QuantScheme, list[LinearStack]]] = {
        linear: {scheme: [] for scheme in schemes} for linear, schemes in wanted.items()
    }
    for experts in turns(group, max(len(schemes) for schemes in wanted.values())):
        statistics = gather(group, experts)
        for linear, schemes in wanted.items():
            for scheme, result in quantized_stacks(group, experts, statistics, linear, schemes, quantizer):
                parts[linear][scheme].append(result.stack(dtype))
    return {
        linear: {
            scheme: replace(stacks[0], weights=torch.cat([stack.weights for stack in stacks]))
            for scheme, stacks in by_scheme.items()
        }
        for linear, by_scheme in parts.items()
    }


def _choose(
    group: ExpertGroup, layer: int, assignment: Assignment, menu: dict[Linear, dict[QuantScheme, LinearStack]]
) -> None:
    chosen: dict[Linear, Sequence[LinearStack]] = {}
    for linear in Linear:
        base = group.experts.base[linear]
        ids = [
            LinearId(layer=layer, expert=e + group.first_id, linear=linear) for e in range(group.experts.num_experts)
        ]
        chosen[linear] = [menu[linear][assignment[i]] if i in assignment else base for i in ids]
    group.experts.choose(chosen)


def _check(model: StreamedModel, assignments: Sequence[Assignment]) -> None:
    shared = model.shape.num_shared_experts > 0
    for assignment in assignments:
        for block in assignment:
            known = block.layer in model.moe_layers and block.expert < model.shape.num_experts
            if not known or (block.expert < 0 and not shared):
                raise SpecError(
                    f"the allocation has layer {block.layer}, expert {block.expert}; {model.shape.name} has none such"
                )
