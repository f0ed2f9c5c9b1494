"""Problem: everything that a trial reads and no trial changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allocator.budget import Budget
from allocator.problem import Floats, Ints
from allocator.sensitivity import SHARED_EXPERT, Sensitivity
from allocator.study.evidence import Evidence
from profiles.errors import DataError, SpecError
from profiles.kernels import GemmShape
from profiles.loads import TokenLoad
from profiles.models import Linear, LinearId, MoeShape
from profiles.schemes import QuantScheme

LossOf = Callable[[Ints], float]
"""Corrected loss of an assignment: a scheme index for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchKind:
    """One linear's launch, the same shape in every layer.

    Attributes:
        linear: `gate_up`, `down`, `shared_gate_up` or `shared_down`.
        shape: n and k of one expert.
        loads: by scenario, tokens of each expert.
        rows: int64 [layers, experts], the blocks of each layer's launch, in the order of the loads' counts.
    """

    linear: str
    shape: GemmShape
    loads: Mapping[str, TokenLoad]
    rows: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Blocks (one a linear of an expert) and their launches.

    Attributes:
        model: the model's name.
        ids: the blocks.
        schemes: columns of loss and bits.
        loss: float64 [blocks, schemes], inf where not offered.
        bits: float64 [blocks, schemes], stored bits a weight.
        sizes: float64 [blocks], weights.
        kinds: the launches of a layer.
        budget: average bits, and limits on launch-level latency.
        evidence: loads and known latencies.
        sensitivity: where the losses are from.
        corrected_loss: of an assignment; the sum of losses unless losses do not add up.
        is_corrected: whether it is anything else than the sum.
    """

    model: str
    ids: tuple[LinearId, ...]
    schemes: tuple[QuantScheme, ...]
    loss: Floats
    bits: Floats
    sizes: Floats
    kinds: tuple[LaunchKind, ...]
    budget: Budget
    evidence: Evidence
    sensitivity: Mapping[str, str | int]
    corrected_loss: LossOf
    is_corrected: bool

    @property
    def avg_bits(self) -> float:
        """The limit on stored bits a weight; inf without one."""
        if self.budget.weight_bytes is not None:
            return self.budget.weight_bytes * 8 / float(self.sizes.sum())
        return np.inf if self.budget.avg_weight_bits is None else self.budget.avg_weight_bits

    @property
    def bits_limit(self) -> float:
        """`avg_bits` as a finite number that limits nothing without a budget."""
        return self.avg_bits if np.isfinite(self.avg_bits) else float(self.bits.max()) + 1

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Names of the token loads."""
        return tuple(self.evidence.loads)

    @property
    def digest(self) -> str:
        """Equal inputs, equal digest: a study is continued with the inputs that it was begun with."""
        text = hashlib.sha256()
        for array in (self.loss, self.bits, self.sizes, *(kind.rows for kind in self.kinds)):
            text.update(np.ascontiguousarray(array).tobytes())
        known = sorted((str(key), us) for key, us in self.evidence.latency_us.items())
        names = [scheme.name for scheme in self.schemes]
        loads = [(name, load.tokens_per_expert) for name, load in self.evidence.loads.items()]
        budget = (
            self.evidence.model_version,
            self.avg_bits,
            sorted(self.budget.max_latency_us.items()),
            self.is_corrected,
        )
        text.update(repr((self.model, self.evidence.gpu.name, names, loads, known, budget)).encode())
        return text.hexdigest()[:12]


def of(
    sensitivity: Sensitivity,
    shape: MoeShape,
    budget: Budget,
    evidence: Evidence,
    *,
    schemes: Sequence[QuantScheme] | None = None,
    corrected_loss: LossOf | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
) -> Problem:
    """The problem of these inputs.

    schemes: those that may be used; None: all that the sensitivity has. corrected_loss: as in Problem; it takes indices
    of `Sensitivity.arrays()`'s schemes. experts: by layer, which expert each of a load's counts is for; None: they are
    in the experts' own order. DataError, SpecError: what was given does not fit together.
    """
    if budget.per_layer:
        raise SpecError("a study's budget holds on average over all layers; per_layer is for allocate")
    for name, load in evidence.loads.items():
        if load.num_experts != shape.num_experts:
            raise DataError(f"scenario {name} has {load.num_experts} experts, {shape.name} has {shape.num_experts}")
    for name in budget.max_latency_us:
        if name not in evidence.loads:
            raise SpecError(f"no scenario {name!r} to limit; there are {', '.join(evidence.loads)}")
    ids, columns, loss = sensitivity.arrays()
    if schemes is not None:
        missing = [scheme.name for scheme in schemes if scheme not in columns]
        if missing:
            raise SpecError(f"the sensitivity has no losses for {', '.join(missing)}")
        loss = np.where(np.array([scheme in schemes for scheme in columns])[None, :], loss, np.inf)
    kinds = _kinds(ids, shape, evidence.loads, experts or {})
    bits, sizes = np.empty_like(loss), np.empty(len(ids))
    for kind in kinds:
        bits[kind.rows.ravel()] = [scheme.bits_per_weight(kind.shape.k) for scheme in columns]
        sizes[kind.rows.ravel()] = kind.shape.n * kind.shape.k
    return Problem(
        model=sensitivity.model,
        ids=ids,
        schemes=columns,
        loss=loss,
        bits=bits,
        sizes=sizes,
        kinds=kinds,
        budget=budget,
        evidence=evidence,
        sensitivity=sensitivity.provenance,
        corrected_loss=corrected_loss or (lambda assignment: float(loss[np.arange(len(ids)), assignment].sum())),
        is_corrected=corrected_loss is not None,
    )


def _kinds(
    ids: Sequence[LinearId], shape: MoeShape, loads: Mapping[str, TokenLoad], order: Mapping[int, Sequence[int]]
) -> tuple[LaunchKind, ...]:
    """The launches that the blocks make up. DataError: a layer's launch lacks an expert."""
    by_launch: dict[tuple[bool, Linear], dict[int, dict[int, int]]] = {}
    for row, block in enumerate(ids):
        key = (block.expert == SHARED_EXPERT, block.linear)
        by_launch.setdefault(key, {}).setdefault(block.layer, {})[block.expert] = row
    kinds = []
    for (is_shared, linear), layers in by_launch.items():
        experts = (SHARED_EXPERT,) if is_shared else tuple(range(shape.num_experts))
        for layer, rows in layers.items():
            if set(rows) != set(experts):
                raise DataError(
                    f"sensitivity: layer {layer} {linear.value} has {len(rows)} experts of {len(experts)};"
                    " a launch is priced with all of them"
                )
        n, k = shape.shared_gemm(linear) if is_shared else shape.gemm(linear)
        kinds.append(
            LaunchKind(
                linear=f"shared_{linear.value}" if is_shared else linear.value,
                shape=GemmShape(m=1, n=n, k=k),
                loads={name: _shared(load, shape.top_k) for name, load in loads.items()} if is_shared else loads,
                rows=np.array(
                    [
                        [layers[layer][expert] for expert in (experts if is_shared else order.get(layer, experts))]
                        for layer in sorted(layers)
                    ]
                ),
            )
        )
    return tuple(sorted(kinds, key=lambda kind: kind.linear))


def _shared(load: TokenLoad, top_k: int) -> TokenLoad:
    """Every token goes to the shared expert once."""
    return TokenLoad(tokens_per_expert=(-(-load.total // top_k),), source=f"{load.source}, shared expert")
