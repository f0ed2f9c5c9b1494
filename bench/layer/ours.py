"""Our layers of one allocation: with each choice of fusions, a launch a scheme, and part by part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from bench.layer.allocations import BF16, Allocation, Group, average_bits
from bench.layer.building import GemmId, configs_of, left_out
from bench.layer.contenders import FUSIONS, Context, Entry, Layer, Maker, Pair, Variant
from bench.layer.layers import LaunchPerScheme, OneLaunch
from bench.layer.reference import expected_output
from kernel_gen.experts import Experts
from kernel_gen.moe import Fusion, MoELayer
from kernel_gen.runtime import Activations
from profiles.models import Linear

PARTS_OF = (BF16.name, "w4a8/w8a8 int8 by row")
"""Allocations whose layer is also timed part by part, where that is asked for."""


class OurLayers:
    """An allocation in a cell. Weights, the expected output and the choice of configurations are made once."""

    def __init__(self, allocation: Allocation, context: Context) -> None:
        self._allocation, self._context = allocation, context
        self._schemes = context.cell.schemes(allocation)
        self._first = context.plan.fusions[0]
        self._sets = functools.cache(self._make_sets)

    def makers(self) -> Iterator[Maker]:
        """All that are timed."""
        name, first = self._allocation.name, _name(self._first)
        for fusions in self._context.plan.fusions:
            make = partial(self._whole, fusions)
            yield Maker(allocation=name, variant=Variant.OURS, fusions=_name(fusions), make=make)
        if self._allocation.group is Group.MIXED:
            for variant in (Variant.PER_SCHEME, Variant.STREAMS):
                yield Maker(allocation=name, variant=variant, fusions=first, make=partial(self._split, variant))
        if self._context.plan.with_parts and name in PARTS_OF:
            for fusions in left_out(self._first):
                part = f"without {(self._first & ~fusions).name}".lower().replace("|", " and ")
                make = partial(self._whole, fusions, part)
                yield Maker(allocation=name, variant=Variant.OURS, part=part, make=make)
            for part in OneLaunch.PARTS:
                make = partial(self._up_to, part)
                yield Maker(allocation=name, variant=Variant.OURS, part=f"up to {part}", make=make)

    def _make_sets(self, interleaved: bool) -> list[Pair]:
        return self._context.sets_of(self._schemes, interleaved=interleaved)

    @functools.cached_property
    def _expected(self) -> Tensor:
        return expected_output(self._context.weights, self._schemes, self._context.given)

    @functools.cached_property
    def _configs(self) -> str:
        return _tune(self._allocation.name, self._sets(Fusion.EPILOGUE in self._first)[0], self._context)

    def _entry(self, variant: Variant, layers: Sequence[Layer], *, fusions: str, configs: str, part: str = "") -> Entry:
        return Entry(
            allocation=self._allocation.name,
            group=self._allocation.group,
            variant=variant,
            avg_bits=average_bits(self._schemes, self._context.cell.shape),
            layers=tuple(self._context.bound(layer) for layer in layers),
            expected=self._expected,
            part=part,
            fusions=fusions,
            configs=configs,
        )

    def _whole(self, fusions: Fusion, part: str = "") -> Entry:
        configs = self._configs
        sets = self._sets(Fusion.EPILOGUE in fusions)
        layers = [MoELayer(*pair, library=self._context.kernels, fusions=fusions) for pair in sets]
        return self._entry(Variant.OURS, layers, fusions=_name(fusions), configs=configs, part=part)

    def _split(self, variant: Variant) -> Entry:
        streams = self._context.streams if variant is Variant.STREAMS else ()
        split = [
            LaunchPerScheme(
                *pair, self._context.kernels, streams, overlap=self._context.overlap, prefetch=self._context.prefetch
            )
            for pair in self._sets(Fusion.EPILOGUE in self._first)
        ]
        configs = _tune_shares(self._allocation.name, split[0], self._context)
        return self._entry(variant, split, fusions=_name(self._first), configs=configs)

    def _up_to(self, part: str) -> Entry:
        configs, context = self._configs, self._context
        sets = self._sets(Fusion.EPILOGUE in self._first)
        layers = [
            OneLaunch(*pair, context.kernels, overlap=context.overlap, prefetch=context.prefetch) for pair in sets
        ]
        return Entry(
            allocation=self._allocation.name,
            group=self._allocation.group,
            variant=Variant.OURS,
            avg_bits=average_bits(self._schemes, context.cell.shape),
            layers=tuple(_prefix(layer, part, context) for layer in layers),
            part=f"up to {part}",
            configs=configs,
        )


def _name(fusions: Fusion) -> str:
    """Among FUSIONS; empty for another."""
    return next((name for name, value in FUSIONS.items() if value == fusions), "")


def _prefix(layer: OneLaunch, part: str, context: Context) -> Callable[[], object]:
    return layer.prefixes(*context.given.tensors)[part]


def _tune(name: str, pair: Pair, context: Context) -> str:
    """Both linears of MoELayer."""
    layer = OneLaunch(*pair, context.kernels, overlap=context.overlap, prefetch=context.prefetch)

    def tune(linear: Linear, experts: Experts, x: Activations, offsets: Tensor, out: Tensor) -> str:
        configs = configs_of(context.plan, GemmId(cell=context.cell, allocation=name, linear=linear))
        return context.kernels.tune(
            experts,
            x.num_tokens,
            configs,
            x,
            offsets,
            out,
            context.time_single,
            overlap=context.overlap,
            prefetch=context.prefetch and linear is Linear.DOWN,
        )

    routing, x = layer.dispatch(context.given.hidden, context.given.ids)
    gate_up = context.rows(layer.first_columns)
    first = tune(Linear.GATE_UP, layer.gate_up, x, routing.offsets, gate_up)
    product = layer.product(gate_up, routing)
    second = tune(Linear.DOWN, layer.down, product, routing.offsets, context.rows(layer.down.n))
    return f"{first}, {second}"


def _tune_shares(name: str, layer: LaunchPerScheme, context: Context) -> str:
    """Every launch of a layer that has one a scheme."""
    names = []
    routing, x = layer.dispatch(context.given.hidden, context.given.ids)
    gate_up = out = context.rows(layer.first_columns)
    for linear in Linear:
        if linear is Linear.DOWN:
            x, out = layer.product(gate_up, routing), context.rows(layer.down.n)
        for share in layer.shares[linear]:
            gemm = GemmId(cell=context.cell, allocation=name, linear=linear, share=share.schemes[0])
            configs = configs_of(context.plan, gemm)
            names.append(
                context.kernels.tune(
                    share,
                    context.num_rows,
                    configs,
                    x,
                    routing.offsets,
                    out,
                    context.time_single,
                    overlap=layer.overlap,
                    prefetch=layer.prefetch and linear is Linear.DOWN,
                )
            )
    return ", ".join(names)
