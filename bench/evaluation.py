"""What quantised MoE linears cost a checkpoint: perplexity on held-out text, and KL divergence from its own logits.

"Its own" is the model in the dtype that it runs in: bf16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from allocator.calibration.model import StreamedModel
from allocator.calibration.quantizer import Quantizer
from allocator.calibration.streams import measure_allocations
from allocator.sensitivity import SHARED_EXPERT
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluator:
    """Measures variants of one model on one held-out text.

    Attributes:
        model: a checkpoint.
        held_out: token ids [sequences, length] to measure on.
        calibration: token ids that the quantisers learn from.
        batch_size: sequences at a time.
    """

    model: StreamedModel
    held_out: Tensor
    calibration: Tensor
    batch_size: int = 8

    @property
    def linears(self) -> tuple[LinearId, ...]:
        """Every linear of the MoE layers, the shared experts' as expert -1."""
        shape = self.model.shape
        experts = [*range(shape.num_experts), *([SHARED_EXPERT] if shape.num_shared_experts else [])]
        layers = self.model.moe_layers
        return tuple(LinearId(layer=i, expert=e, linear=linear) for i in layers for e in experts for linear in Linear)

    def measure(self, assignment: Assignment, quantizer: Quantizer) -> Evaluation:
        """The model with these linears quantised; those that are not in `assignment` stay as they are.

        SpecError: `assignment` has a linear that the model has not.
        """
        return self.measure_all([assignment], quantizer)[0]

    def measure_all(self, assignments: Sequence[Assignment], quantizer: Quantizer) -> list[Evaluation]:
        """Several at once: each linear is quantised once in each scheme that some of them want."""
        measured = measure_allocations(
            self.model, self.held_out, self.calibration, assignments, quantizer, batch_size=self.batch_size
        )
        return [
            Evaluation(
                perplexity=found.perplexity,
                mean_kl=found.kl,
                avg_weight_bits=average_bits(self.model.shape, self.linears, assignment),
                num_tokens=self.held_out.numel(),
            )
            for assignment, found in zip(assignments, measured.allocations, strict=True)
        ]


def average_bits(shape: MoeShape, linears: Sequence[LinearId], assignment: Assignment) -> float:
    """Stored bits per weight of `linears`; one without a scheme has 16."""
    bits = weights = 0.0
    for linear in linears:
        n, k = shape.shared_gemm(linear.linear) if linear.expert == SHARED_EXPERT else shape.gemm(linear.linear)
        scheme = assignment.get(linear)
        bits += n * k * (16.0 if scheme is None else scheme.bits_per_weight(k))
        weights += n * k
    return bits / weights
