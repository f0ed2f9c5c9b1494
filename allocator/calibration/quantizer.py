"""How weights become codes: one entry for rounding to nearest, GPTQ, clipping and rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from allocator.calibration.experts import LinearStack
from allocator.calibration.gptq import Factors, factorise, gptq, row_objective, shrunk
from allocator.calibration.grid import nearest
from allocator.calibration.hadamard import Rotation
from kernel_gen.formats import QuantizedWeights, dequantize
from profiles.errors import SpecError
from profiles.schemes import QuantScheme


class Method(Enum):
    """How a weight's code is chosen."""

    RTN = "rtn"  # the nearest
    GPTQ = "gptq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Settings of the quantisation.

    Attributes:
        method: rounding.
        clip: search for narrower ranges than a group's own.
        rotate: rotate the inputs of linears whose activations are quantised.
        shrink: let few tokens say less: clipping and GPTQ take each expert's moments shrunk towards a multiple of the
            identity, by as much as its number of tokens asks for (gptq.shrunk).
        damping: GPTQ's, as a share of the mean diagonal.
        activation_order: GPTQ's order of columns.
        seed: of the rotation's signs.
    """

    method: Method = Method.GPTQ
    clip: bool = True
    rotate: bool = False
    shrink: bool = True
    damping: float = 0.01
    activation_order: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise SpecError(f"GPTQ damping {self.damping} must be from 0 to 1")

    @property
    def name(self) -> str:
        """As a metric names it: `gptq+clip+rotate`."""
        return "+".join([self.method.value, *(["clip"] if self.clip else []), *(["rotate"] if self.rotate else [])])

    def rotation(self, scheme: QuantScheme, k: int) -> Rotation | None:
        """What turns the inputs of a linear in this scheme."""
        return Rotation(k=k, seed=self.seed) if self.rotate and scheme.input_activations is not None else None

    def prepare(self, moments: Tensor, counts: Sequence[int], rotation: Rotation | None = None) -> Prepared:
        """What all schemes of one rotation share.

        Args:
            moments: second moments of the inputs, [E, K, K], not rotated.
            counts: tokens behind each expert's.
            rotation: of the inputs.
        """
        moments = moments.float()
        seen = torch.tensor([count > 0 for count in counts], device=moments.device)
        if not bool(seen.all()):
            moments = torch.where(seen.view(-1, 1, 1), moments, torch.eye(moments.shape[-1], device=moments.device))
        if rotation is not None:
            moments = rotation.apply_both(moments)
        learnt = shrunk(moments, counts) if self.shrink else moments
        factors = None
        if self.method is Method.GPTQ:
            factors = factorise(learnt, damping=self.damping, activation_order=self.activation_order)
        return Prepared(moments=moments, learnt=learnt, seen=seen, rotation=rotation, factors=factors)

    def quantize(
        self, weights: Tensor, scheme: QuantScheme, moments: Tensor | Prepared, counts: Sequence[int]
    ) -> Quantized:
        """A stack of experts.

        Args:
            weights: [E, N, K] floats.
            scheme: what to.
            moments: second moments of the inputs, [E, K, K], not rotated; or what `prepare` made of them.
            counts: tokens behind each; an expert without any is rounded to nearest, ranges and all from its weights
                alone.
        """
        rotation = self.rotation(scheme, weights.shape[-1])
        ready = moments if isinstance(moments, Prepared) else self.prepare(moments, counts, rotation)
        if ready.rotation != rotation:
            raise SpecError(f"{scheme.name}: moments were prepared for another rotation")
        values = weights.float() if rotation is None else rotation.apply(weights.float())
        start = nearest(values, scheme, ready.learnt, clip=self.clip)
        if ready.factors is None or scheme.weights is None:
            errors = ready.zeroed(row_objective(values, start, ready.moments))
            return Quantized(weights=start, rotation=rotation, row_errors=errors, nearest_objective=errors.sum(-1))
        starts = [nearest(values, scheme, clip=False), start] if self.clip else [start]
        result = gptq(values, ready.moments, starts, ready.factors)
        raised = tuple(e for e, share in enumerate(ready.factors.damping) if share > self.damping)
        return Quantized(
            weights=result.weights,
            rotation=rotation,
            row_errors=ready.zeroed(result.row_errors),
            nearest_objective=result.nearest_objective,
            damping_raised=raised,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """Second moments as roundings use them: rotated, with the identity for experts without tokens.

    Attributes:
        moments: [E, K, K].
        learnt: what clipping and GPTQ take them to be.
        seen: experts with tokens, bool [E].
        rotation: that they are rotated by.
        factors: GPTQ's.
    """

    moments: Tensor
    learnt: Tensor
    seen: Tensor
    rotation: Rotation | None
    factors: Factors | None

    def zeroed(self, row_errors: Tensor) -> Tensor:
        """[E, N], 0 for experts without tokens: they made no error at any."""
        return row_errors * self.seen.unsqueeze(-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantized:
    """A stack in one scheme.

    Attributes:
        weights: codes, scales, zero points; of rotated weights where there is a rotation.
        rotation: of the inputs.
        row_errors: squared error of every output that the weights' error makes, summed over tokens, float64 [E, N].
        nearest_objective: their sums under method GPTQ, had all been rounded to nearest without clipping, [E].
        damping_raised: experts whose moments needed more damping than asked to factorise.
    """

    weights: QuantizedWeights
    rotation: Rotation | None
    row_errors: Tensor
    nearest_objective: Tensor
    damping_raised: tuple[int, ...] = ()

    @property
    def objective(self) -> Tensor:
        """tr((W - Q) H (W - Q)^T) of each expert, [E]."""
        return self.row_errors.sum(-1)

    def of(self, scheme: QuantScheme) -> Quantized:
        """The same codes in a scheme that differs in its activations only."""
        return replace(self, weights=replace(self.weights, scheme=scheme))

    def stack(self, dtype: torch.dtype) -> LinearStack:
        """As experts run it."""
        return LinearStack(
            weights=dequantize(self.weights).to(dtype), scheme=self.weights.scheme, rotation=self.rotation
        )
