"""Who runs in a cell, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from bench.layer.allocations import BF16, MIXED, Allocation, Group, total_bits
from bench.layer.cells import Cell, Given
from bench.layer.layers import DenseLayer, Gemm, LaunchPerScheme, OneLaunch, SteppedLayer, torch_gemm, torch_layer
from bench.layer.reference import expected_output
from bench.layer.tuning import QUICK_RULE, TimeLaunches, TunedLibrary, ranked
from bench.layer.weights import LayerWeights, num_sets
from kernel_gen.experts import Experts
from kernel_gen.moe import Fusion, MoELayer
from kernel_gen.runtime import Activations
from profiles.kernels import KernelConfig
from profiles.models import Linear
from profiles.schemes import QuantScheme

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Sets = Sequence[tuple[Experts, Experts]]


class Variant(Enum):
    """One way to run an allocation's layer."""

    OURS = "one launch"
    PER_SCHEME = "a launch a scheme"
    STREAMS = "a launch a scheme, on streams"
    TORCH = "torch"
    TORCH_COMPILED = "torch, compiled"
    TORCH_OUR_STEPS = "torch GEMMs, our steps"
    TRITON_OUR_STEPS = "Triton GEMMs, our steps"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One contender: the same layer over several sets of weights, which take turns.

    part: the layer only up to this part, or without this fusion; empty: the whole layer. expected: the output's first
    rows, where it is checked.
    """

    allocation: str
    group: Group
    variant: Variant
    avg_bits: float
    layers: tuple[Callable[[], object], ...]
    expected: Tensor | None = None
    part: str = ""
    configs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What contenders of a cell are made from."""

    cell: Cell
    given: Given
    weights: LayerWeights
    kernels: TunedLibrary
    l2_bytes: int
    num_configs: int
    time_launches: TimeLaunches
    streams: tuple[torch.cuda.Stream, ...]
    compiled: bool

    @property
    def num_rows(self) -> int:
        """Rows of all experts."""
        return int(self.given.ids.numel())

    def one_of(self, schemes: Sequence[Sequence[QuantScheme]], *, interleaved: bool) -> tuple[Experts, Experts]:
        """A layer's weights in memory of their own."""
        gate_up = self.weights.experts(Linear.GATE_UP, schemes[0], interleaved=interleaved)
        return gate_up, self.weights.experts(Linear.DOWN, schemes[1])

    def sets_of(self, schemes: Sequence[Sequence[QuantScheme]], *, interleaved: bool) -> list[tuple[Experts, Experts]]:
        """As many layers as keep L2 cold."""
        one = self.one_of(schemes, interleaved=interleaved)
        share = sum(count > 0 for count in self.given.counts) / len(self.given.counts)
        count = num_sets(share * sum(experts.num_bytes for experts in one), self.l2_bytes)
        return [one, *(self.one_of(schemes, interleaved=interleaved) for _ in range(count - 1))]


def per_expert(allocation: Allocation, cell: Cell, linear: Linear) -> tuple[QuantScheme, ...]:
    """The schemes of one linear; each linear has its own draw."""
    shape = cell.shape
    return allocation.per_expert(shape.num_experts, shape.gemm(linear)[1], cell.seed + 7 * list(Linear).index(linear))


def configs_of(
    schemes: Sequence[QuantScheme], cell: Cell, linear: Linear, counts: Sequence[int], library_gpu: object, number: int
) -> list[KernelConfig]:
    """The configurations worth timing for a launch of these experts with these tokens."""
    n, k = cell.shape.gemm(linear)
    return ranked(schemes, n, k, counts, library_gpu, number)  # type: ignore[arg-type]


def launches_of(
    allocation: Allocation, cell: Cell, counts: Sequence[int]
) -> Iterator[tuple[Linear, tuple[QuantScheme, ...], tuple[int, ...]]]:
    """Every GEMM launch that an allocation's contenders make: the linear, the experts' schemes and tokens."""
    for linear in Linear:
        schemes = per_expert(allocation, cell, linear)
        yield linear, schemes, tuple(counts)
        if allocation.group is Group.MIXED:
            for slot in dict.fromkeys(schemes):
                mine = [count for scheme, count in zip(schemes, counts, strict=True) if scheme == slot]
                yield linear, (slot,) * len(mine), tuple(mine)


def ours(allocation: Allocation, context: Context) -> Iterator[Entry]:
    """MoELayer; for a mix also a launch a scheme; for some allocations its parts, and each fusion left out."""
    cell, given, library = context.cell, context.given, context.kernels
    schemes = [per_expert(allocation, cell, linear) for linear in Linear]
    if allocation.group is Group.MIXED and all(len(set(each)) == 1 for each in schemes):
        return  # so few experts that not one can have more bits
    sets = context.sets_of(schemes, interleaved=True)
    configs = _tune(sets, context)
    bits = _avg_bits(schemes, cell)
    layers = [MoELayer(*pair, library=library, fusions=Fusion.ALL) for pair in sets]
    expected = expected_output(context.weights, schemes, given)

    def entry(variant: Variant, made: Sequence[Layer], part: str = "", configs: str = configs) -> Entry:
        return Entry(
            allocation=allocation.name,
            group=allocation.group,
            variant=variant,
            avg_bits=bits,
            layers=tuple(_bound(layer, given) for layer in made),
            expected=expected,
            part=part,
            configs=configs,
        )

    yield entry(Variant.OURS, layers)
    if allocation.group is Group.MIXED:
        for variant, streams in ((Variant.PER_SCHEME, ()), (Variant.STREAMS, context.streams)):
            split = [LaunchPerScheme(*pair, library, streams) for pair in sets]
            yield entry(variant, split, configs=_tune_shares(split, context))
    if allocation.name in PARTS_OF:
        apart = context.sets_of(schemes, interleaved=False)
        for fusion in Fusion:
            without = Fusion.EPILOGUE | fusion if fusion is Fusion.SWIGLU else fusion
            of = apart if Fusion.EPILOGUE in without else sets
            left = [MoELayer(*pair, library=library, fusions=Fusion.ALL & ~without) for pair in of]
            yield entry(Variant.OURS, left, part=f"without {str(fusion.name).lower()}")
        stepped = [OneLaunch(*pair, library, overlap=True).prefixes(*given.tensors) for pair in sets]
        for part in stepped[0]:
            yield Entry(
                allocation=allocation.name,
                group=allocation.group,
                variant=Variant.OURS,
                avg_bits=bits,
                layers=tuple(parts[part] for parts in stepped),
                part=f"up to {part}",
            )


PARTS_OF = (BF16.name, MIXED[0].name)
"""Allocations whose layer is also timed part by part."""
MANY_TOKENS = 32
"""From so many tokens an expert on, Triton's wide tiles are tried, below its narrow ones."""


def others(context: Context) -> Iterator[Callable[[], Entry]]:
    """bf16 layers around torch's and Triton's grouped GEMMs. Each is made when it is called."""
    cell, given, library = context.cell, context.given, context.kernels
    schemes = [per_expert(BF16, cell, linear) for linear in Linear]
    experts = context.one_of(schemes, interleaved=False)
    dense = [context.weights.dense(linear, BF16.middle) for linear in Linear]
    share = sum(count > 0 for count in given.counts) / len(given.counts)
    count = num_sets(share * sum(2 * part.numel() for part in dense), context.l2_bytes)
    sets = [(dense[0], dense[1]), *((dense[0].clone(), dense[1].clone()) for _ in range(count - 1))]
    expected = expected_output(context.weights, schemes, given)

    def entry(variant: Variant, made: Sequence[Layer], configs: str = "") -> Entry:
        return Entry(
            allocation=BF16.name,
            group=Group.BF16,
            variant=variant,
            avg_bits=16.0,
            layers=tuple(_bound(layer, given) for layer in made),
            expected=expected,
            configs=configs,
        )

    def in_torch() -> Entry:
        return entry(Variant.TORCH, [_torch_layer(torch_layer, pair) for pair in sets])

    def compiled() -> Entry:
        torch._dynamo.reset()  # a function keeps only so many compiled shapes
        function = torch.compile(torch_layer, dynamic=False)
        return entry(Variant.TORCH_COMPILED, [_torch_layer(function, pair) for pair in sets])

    def our_steps() -> Entry:
        made = [DenseLayer(experts, library, pair, (torch_gemm, torch_gemm)) for pair in sets]
        return entry(Variant.TORCH_OUR_STEPS, made)

    def triton() -> Entry:
        gemms, name = _triton_gemms(SteppedLayer(*experts, library, overlap=True), sets, context)
        return entry(Variant.TRITON_OUR_STEPS, [DenseLayer(experts, library, pair, gemms) for pair in sets], name)

    yield from (in_torch, our_steps, triton)
    if context.compiled:
        yield compiled


def _torch_layer(function: Callable[..., Tensor], pair: tuple[Tensor, Tensor]) -> Layer:
    return lambda hidden, ids, weights: function(hidden, ids, weights, *pair)


def _bound(layer: Layer, given: Given) -> Callable[[], Tensor]:
    return lambda: layer(*given.tensors)


def _avg_bits(schemes: Sequence[Sequence[QuantScheme]], cell: Cell) -> float:
    """Weight bits, both linears by their sizes."""
    sizes = [cell.shape.gemm(linear) for linear in Linear]
    bits = sum(n * k * total_bits(each, k) for each, (n, k) in zip(schemes, sizes, strict=True))
    return bits / (cell.shape.num_experts * sum(n * k for n, k in sizes))


def _tune(sets: Sets, context: Context) -> str:
    """Both linears of MoELayer."""
    layer = OneLaunch(*sets[0], context.kernels, overlap=False)
    names = []

    def tune(linear: Linear, index: int, x: Activations, offsets: Tensor, out: Tensor) -> None:
        schemes = sets[0][index].scheme_of_expert
        configs = configs_of(
            schemes, context.cell, linear, context.given.counts, context.kernels.gpu, context.num_configs
        )
        of_linear = [pair[index] for pair in sets]
        names.append(context.kernels.tune(of_linear, x.num_tokens, configs, x, offsets, out, context.time_launches))

    routing, x = layer.dispatch(context.given.hidden, context.given.ids)
    gate_up = _rows(context, layer.gate_up.n // 2)
    tune(Linear.GATE_UP, 0, x, routing.offsets, gate_up)
    product = layer.product(gate_up, routing)
    tune(Linear.DOWN, 1, product, routing.offsets, _rows(context, layer.down.n))
    return ", ".join(names)


def _tune_shares(split: Sequence[LaunchPerScheme], context: Context) -> str:
    """Every launch of a layer that has one a scheme."""
    first, names = split[0], []
    routing, x = first.dispatch(context.given.hidden, context.given.ids)
    gate_up = _rows(context, first.gate_up.n // 2)
    out = gate_up
    for linear, name in ((Linear.GATE_UP, "first"), (Linear.DOWN, "second")):
        if linear is Linear.DOWN:
            x, out = first.product(gate_up, routing), _rows(context, first.down.n)
        for index, share in enumerate(first.shares[name]):
            counts = [context.given.counts[expert] for expert in share.members[0]]
            configs = configs_of(
                share.scheme_of_expert, context.cell, linear, counts, context.kernels.gpu, context.num_configs
            )
            shares = [layer.shares[name][index] for layer in split]
            names.append(
                context.kernels.tune(shares, context.num_rows, configs, x, routing.offsets, out, context.time_launches)
            )
    return ", ".join(names)


def _rows(context: Context, columns: int) -> Tensor:
    return torch.zeros(context.num_rows, columns, dtype=torch.bfloat16, device=context.given.hidden.device)


def _triton_gemms(
    steps: SteppedLayer, sets: Sequence[tuple[Tensor, Tensor]], context: Context
) -> tuple[list[Gemm], str]:
    """Triton's grouped GEMM with the fastest tile for each linear. ModuleNotFoundError without Triton."""
    from bench.peers.triton_grouped import TILES, grouped_gemm

    def gemm(tile: tuple[int, int, int, int, int]) -> Gemm:
        def run(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
            out = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype, device=x.device)
            grouped_gemm(x, weights, offsets, out, tile)
            return out

        return run

    routing, x = steps.dispatch(context.given.hidden, context.given.ids)
    rows = [x.tensors[0], _rows(context, steps.down.k)]
    mean = context.num_rows / max(1, sum(count > 0 for count in context.given.counts))
    tiles = [tile for tile in TILES if (tile[0] > MANY_TOKENS) == (mean > MANY_TOKENS)]
    gemms, names = [], []
    for index in range(2):
        found = []
        for tile in tiles:
            run = gemm(tile)
            launches = [_bound_gemm(run, rows[index], pair[index], routing.offsets) for pair in sets]
            launches[0]()
            found.append((context.time_launches(launches, QUICK_RULE).median_us, tile))
        best = min(found)[1]
        gemms.append(gemm(best))
        names.append("{}x{}x{}_w{}_s{}".format(*best))
    return gemms, ", ".join(names)


def _bound_gemm(run: Gemm, x: Tensor, weights: Tensor, offsets: Tensor) -> Callable[[], None]:
    def launch() -> None:
        run(x, weights, offsets)

    return launch
