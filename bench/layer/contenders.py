"""What a contender is, and what all of a cell's are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bench.layer.allocations import Group, Schemes
from bench.layer.building import Plan
from bench.layer.cells import Cell, Given
from bench.layer.tuning import TimeSingle, TunedLibrary
from bench.layer.weights import LayerWeights, num_sets
from kernel_gen.experts import Experts
from kernel_gen.moe import Fusion
from profiles.models import Linear

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = tuple[Experts, Experts]


class Variant(Enum):
    """One way to run an allocation's layer."""

    OURS = "one launch"
    PER_SCHEME = "a launch a scheme"
    STREAMS = "a launch a scheme, on streams"
    TORCH = "torch"
    TORCH_COMPILED = "torch, compiled"
    TORCH_OUR_STEPS = "torch GEMMs, our steps"
    TRITON_OUR_STEPS = "Triton GEMMs, our steps"


FUSIONS = {
    "four": Fusion.ROUTE | Fusion.GATHER | Fusion.SWIGLU | Fusion.COMBINE,
    "epilogue": Fusion.ALL & ~(Fusion.OVERLAP | Fusion.PREFETCH),
    "overlap": Fusion.ALL & ~(Fusion.EPILOGUE | Fusion.PREFETCH),
    "both": Fusion.ALL & ~Fusion.PREFETCH,
    "all": Fusion.ALL,
}
"""Ways to run our layer that are compared, by name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One contender: the same layer over several sets of weights, which take turns.

    part: the layer only up to this part, or without this fusion; empty: the whole layer. fusions: the name among
    FUSIONS; empty for what has none. expected: the output's first rows, where it is checked.
    """

    allocation: str
    group: Group
    variant: Variant
    avg_bits: float
    layers: tuple[Callable[[], object], ...]
    expected: Tensor | None = None
    part: str = ""
    fusions: str = ""
    configs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """A contender to be: its names, should it fail, and what makes it."""

    allocation: str
    variant: Variant
    make: Callable[[], Entry]
    part: str = ""
    fusions: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What contenders of a cell are made from."""

    cell: Cell
    plan: Plan
    given: Given
    weights: LayerWeights
    kernels: TunedLibrary
    l2_bytes: int
    time_single: TimeSingle
    streams: tuple[torch.cuda.Stream, ...]
    compiled: bool

    @property
    def num_rows(self) -> int:
        """Rows of all experts."""
        return int(self.given.ids.numel())

    @property
    def overlap(self) -> bool:
        """Whether the first of the plan's fusions overlaps launches."""
        return Fusion.OVERLAP in self.plan.fusions[0]

    @property
    def prefetch(self) -> bool:
        """Whether in the first of the plan's fusions the second GEMM prefetches."""
        return Fusion.PREFETCH in self.plan.fusions[0]

    def one_of(self, schemes: Schemes, *, interleaved: bool) -> Pair:
        """A layer's weights in memory of their own."""
        gate_up = self.weights.experts(Linear.GATE_UP, schemes[Linear.GATE_UP], interleaved=interleaved)
        return gate_up, self.weights.experts(Linear.DOWN, schemes[Linear.DOWN])

    def sets_of(self, schemes: Schemes, *, interleaved: bool) -> list[Pair]:
        """As many layers as keep L2 cold."""
        one = self.one_of(schemes, interleaved=interleaved)
        count = self.num_sets(sum(experts.num_bytes for experts in one))
        return [one, *(self.one_of(schemes, interleaved=interleaved) for _ in range(count - 1))]

    def num_sets(self, layer_bytes: float) -> int:
        """For a layer of so many bytes, of which this cell reads the experts that have tokens."""
        share = sum(count > 0 for count in self.given.counts) / len(self.given.counts)
        return num_sets(share * layer_bytes, self.l2_bytes)

    def rows(self, columns: int) -> Tensor:
        """A GEMM's output."""
        return torch.zeros(self.num_rows, columns, dtype=torch.bfloat16, device=self.given.hidden.device)

    def bound(self, layer: Layer) -> Callable[[], Tensor]:
        """The layer on the cell's tokens."""
        return lambda: layer(*self.given.tensors)
