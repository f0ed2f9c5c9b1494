"""What quantised MoE linears cost a checkpoint: perplexity on held-out text, and KL divergence from its own logits.

One pass over the layers measures one variant: the calibration tokens go through a layer as it is and tell the
quantiser what it needs, the held-out tokens go through the layer quantised. In memory is one layer, or all of them if
the model keeps them. "Its own" is the model in the dtype that it runs in: bf16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allocator.calibration.experts import LinearStack
from allocator.calibration.measured import divergence, final_outputs, negative_log_likelihood
from allocator.calibration.model import LoadedLayer, StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.statistics import gather
from allocator.calibration.visits import ExpertGroup, advance, visit
from allocator.sensitivity import SHARED_EXPERT
from profiles.errors import SpecError
from profiles.models import Linear, LinearId, MoeShape
from profiles.schemes import QuantScheme

Assignment = Mapping[LinearId, QuantScheme]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What quantisation costs on held-out text.

    Attributes:
        perplexity: per token, of every token but each sequence's first.
        mean_kl: mean over all tokens of KL(model || quantised model), nats.
        avg_weight_bits: stored bits per weight of the MoE linears, scales and zero points counted.
        num_tokens: held-out tokens.
    """

    perplexity: float
    mean_kl: float
    avg_weight_bits: float
    num_tokens: int


class Evaluator:
    """Measures variants of one model on one held-out text."""

    def __init__(self, model: StreamedModel, held_out: Tensor, calibration: Tensor, *, batch_size: int = 8) -> None:
        """Runs the model as it is once.

        Args:
            model: a checkpoint.
            held_out: token ids [sequences, length] to measure on.
            calibration: token ids that the quantisers learn from.
            batch_size: sequences at a time.
        """
        self.model = model
        self._held_out, self._calibration, self._batch_size = held_out, calibration, batch_size
        self._exact = final_outputs(model, held_out, batch_size=batch_size)

    def linears(self) -> tuple[LinearId, ...]:
        """Every linear of the MoE layers, the shared experts' as expert -1."""
        return all_linears(self.model)

    def measure(self, assignment: Assignment, quantizer: Quantizer) -> Evaluation:
        """The model with these linears quantised; those that are not in `assignment` stay as they are.

        SpecError: `assignment` has a linear that the model has not.
        """
        unknown = set(assignment) - set(self.linears())
        if unknown:
            raise SpecError(f"{self.model.shape.name} has no {_described(sorted(unknown, key=repr)[0])}")
        final = self._run_quantized(assignment, quantizer) if assignment else self._exact
        kl = nll = 0.0
        for exact, changed, ids in zip(self._exact, final, self._batches(self._held_out), strict=True):
            kl += divergence(self.model, exact, changed)
            nll += negative_log_likelihood(self.model, changed, ids)
        number, length = self._held_out.shape
        return Evaluation(
            perplexity=math.exp(min(nll / (number * (length - 1)), 700.0)),
            mean_kl=kl / self._held_out.numel(),
            avg_weight_bits=average_bits(self.model.shape, self.linears(), assignment),
            num_tokens=self._held_out.numel(),
        )

    def quantized_layers(self, assignment: Assignment, quantizer: Quantizer) -> Iterator[LoadedLayer]:
        """The MoE layers in turn, each quantised as assigned until the next is asked for."""
        for seen in visit(self.model, self._calibration, batch_size=self._batch_size):
            for group in seen.groups():
                choose(group, seen.layer.index, assignment, quantizer, self.model.dtype)
            try:
                yield seen.layer
            finally:
                restore(seen.layer)

    def _batches(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.split(tokens, self._batch_size)

    def _run_quantized(self, assignment: Assignment, quantizer: Quantizer) -> list[Tensor]:
        """The last layer's output for the held-out tokens, in batches."""
        hidden = [self.model.embed(batch) for batch in self._batches(self._held_out)]
        position = 0
        for layer in self.quantized_layers(assignment, quantizer):
            hidden = self._advance(hidden, range(position, layer.index))
            hidden = [advance(self.model, layer, batch) for batch in hidden]
            position = layer.index + 1
        return self._advance(hidden, range(position, self.model.num_layers))

    def _advance(self, hidden: list[Tensor], layers: range) -> list[Tensor]:
        for index in layers:
            layer = self.model.layer(index)
            hidden = [advance(self.model, layer, batch) for batch in hidden]
        return hidden


def all_linears(model: StreamedModel) -> tuple[LinearId, ...]:
    """Every linear of the MoE layers, the shared experts' as expert -1."""
    experts = [*range(model.shape.num_experts), *([SHARED_EXPERT] if model.shape.num_shared_experts else [])]
    return tuple(
        LinearId(layer=i, expert=e, linear=linear) for i in model.moe_layers for e in experts for linear in Linear
    )


def average_bits(shape: MoeShape, linears: Sequence[LinearId], assignment: Assignment) -> float:
    """Stored bits per weight of `linears`; one without a scheme has 16."""
    bits = weights = 0.0
    for linear in linears:
        n, k = shape.shared_gemm(linear.linear) if linear.expert == SHARED_EXPERT else shape.gemm(linear.linear)
        scheme = assignment.get(linear)
        bits += n * k * (16.0 if scheme is None else scheme.bits_per_weight(k))
        weights += n * k
    return bits / weights


def choose(group: ExpertGroup, layer: int, assignment: Assignment, quantizer: Quantizer, dtype: torch.dtype) -> None:
    """Quantises a group's experts as assigned, from the tokens of its layer, and lets them run so."""
    chosen: dict[Linear, Sequence[LinearStack]] = {}
    number = group.experts.num_experts
    statistics = gather(group, range(number))
    for linear in Linear:
        base = group.experts.base[linear]
        wanted = [
            assignment.get(LinearId(layer=layer, expert=group.first_id + e, linear=linear)) for e in range(number)
        ]
        stacks: dict[QuantScheme | None, LinearStack] = {None: base}
        for scheme in dict.fromkeys(scheme for scheme in wanted if scheme is not None):
            quantized = quantizer.quantize(base.weights, scheme, statistics.moments[linear], statistics.counts)
            stacks[scheme] = quantized.stack(dtype)
        chosen[linear] = [stacks[scheme] for scheme in wanted]
    group.experts.choose(chosen)


def restore(layer: LoadedLayer) -> None:
    """Let a layer's experts run as the checkpoint has them."""
    for experts in (layer.routed, layer.shared):
        if experts is not None:
            experts.restore()


def _described(linear: LinearId) -> str:
    return f"{linear.linear.value} of expert {linear.expert} in layer {linear.layer}"
