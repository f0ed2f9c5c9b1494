"""bf16 layers around torch's and Triton's grouped GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.kernel_sets import TRIES
from bench.layer.allocations import BF16, Group
from bench.layer.contenders import Context, Entry, Layer, Maker, Variant
from bench.layer.layers import DenseLayer, Gemm, SteppedLayer, torch_gemm, torch_layer
from bench.layer.reference import expected_output
from bench.peers.triton_tiles import Tile, tile_name, tiles_for
from profiles.models import Linear

DensePair = tuple[Tensor, Tensor]


class OtherLayers:
    """Those of a cell. Weights and the expected output are made once."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._schemes = context.cell.schemes(BF16)
        self._experts = context.one_of(self._schemes, interleaved=False)

    def makers(self) -> Iterator[Maker]:
        """All that are timed."""
        found: dict[Variant, Callable[[], Entry]] = {
            Variant.TORCH: lambda: self._in_torch(Variant.TORCH, torch_layer),
            Variant.TORCH_OUR_STEPS: self._torch_gemms,
            Variant.TRITON_OUR_STEPS: self._triton,
        }
        if self._context.compiled:
            found[Variant.TORCH_COMPILED] = self._compiled
        for variant, make in found.items():
            yield Maker(allocation=BF16.name, variant=variant, make=make)

    @functools.cached_property
    def _sets(self) -> list[DensePair]:
        dense = [self._context.weights.dense(linear, BF16.middle) for linear in Linear]
        count = self._context.num_sets(sum(2 * part.numel() for part in dense))
        return [(dense[0], dense[1]), *((dense[0].clone(), dense[1].clone()) for _ in range(count - 1))]

    @functools.cached_property
    def _expected(self) -> Tensor:
        return expected_output(self._context.weights, self._schemes, self._context.given)

    def _entry(self, variant: Variant, layers: Sequence[Layer], configs: str = "") -> Entry:
        return Entry(
            allocation=BF16.name,
            group=Group.BF16,
            variant=variant,
            avg_bits=16.0,
            layers=tuple(self._context.bound(layer) for layer in layers),
            expected=self._expected,
            configs=configs,
        )

    def _in_torch(self, variant: Variant, function: Callable[..., Tensor]) -> Entry:
        return self._entry(variant, [_torch_layer(function, pair) for pair in self._sets])

    def _compiled(self) -> Entry:
        torch._dynamo.reset()  # a function keeps only so many compiled shapes
        return self._in_torch(Variant.TORCH_COMPILED, torch.compile(torch_layer, dynamic=False))

    def _around(self, gemms: Sequence[Gemm]) -> list[Layer]:
        context = self._context
        return [DenseLayer(self._experts, context.kernels, pair, gemms, overlap=context.overlap) for pair in self._sets]

    def _torch_gemms(self) -> Entry:
        return self._entry(Variant.TORCH_OUR_STEPS, self._around((torch_gemm, torch_gemm)))

    def _triton(self) -> Entry:
        gemms, name = _triton_gemms(self._experts_layer(), self._sets[0], self._context)
        return self._entry(Variant.TRITON_OUR_STEPS, self._around(gemms), name)

    def _experts_layer(self) -> SteppedLayer:
        return SteppedLayer(*self._experts, self._context.kernels, overlap=self._context.overlap)


def _torch_layer(function: Callable[..., Tensor], pair: DensePair) -> Layer:
    return lambda hidden, ids, weights: function(hidden, ids, weights, *pair)


def _triton_gemms(steps: SteppedLayer, pair: DensePair, context: Context) -> tuple[list[Gemm], str]:
    """Triton's grouped GEMM with the fastest tile for each linear. ModuleNotFoundError without Triton."""
    from bench.peers.triton_grouped import grouped_gemm

    def gemm(tile: Tile) -> Gemm:
        def run(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
            out = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype, device=x.device)
            grouped_gemm(x, weights, offsets, out, tile)
            return out

        return run

    routing, x = steps.dispatch(context.given.hidden, context.given.ids)
    rows = [x.tensors[0], context.rows(steps.down.k)]
    gemms, names = [], []
    for index in range(2):
        found = []
        for tile in tiles_for(context.given.counts):
            launch = _bound_gemm(gemm(tile), rows[index], pair[index], routing.offsets)
            launch()
            found.append((context.time_single(launch, TRIES), tile))
        best = min(found)[1]
        gemms.append(gemm(best))
        names.append(tile_name(best))
    return gemms, ", ".join(names)


def _bound_gemm(run: Gemm, x: Tensor, weights: Tensor, offsets: Tensor) -> Callable[[], None]:
    def launch() -> None:
        run(x, weights, offsets)

    return launch
