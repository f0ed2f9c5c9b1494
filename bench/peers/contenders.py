"""Who runs in a cell: our kernels, and torch's and Triton's grouped GEMMs on the same weights, tokens and routing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.peers.triton_tiles import Tile, tile_name, tiles_for
from kernel_gen.formats import unpack
from kernel_gen.measure import COLD_L2_FACTOR, Inputs, Launch
from kernel_gen.select import table_size
from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.kernels import KernelConfig
from profiles.schemes import QuantScheme

OURS = "bitile"


class Kernels(Protocol):
    """Where our kernels come from: kernel_gen.library.KernelLibrary."""

    def kernel(self, config: KernelConfig, schemes: tuple[QuantScheme, ...], max_experts: int = 256) -> Any:
        """A kernel to call as kernel_gen.runtime.Kernel is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One contender, ready. `check` launches once and leaves its result in the inputs' Y; `launches` are timed, one a
    set of weights, so that L2 is cold.
    """

    check: Launch
    launches: tuple[Launch, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contender:
    """A kernel by name and configuration. `make` readies it, and raises as torch, Triton or our launcher do."""

    name: str
    config: str
    make: Callable[[], Entry]


def contenders(inputs: Inputs, configs: Sequence[KernelConfig], kernels: Kernels, l2_bytes: int) -> Iterator[Contender]:
    """All that can run the inputs' schemes: ours in each configuration; others for bf16 and for 8-bit floats alone."""
    for config in configs:
        yield Contender(name=OURS, config=config.name, make=functools.partial(_ours, inputs, config, kernels))
    if len(inputs.weights.stacks) > 1:
        return
    scheme = inputs.weights.workload.schemes[0]
    dense = functools.cache(lambda: _dense(inputs, l2_bytes))  # made when first needed, then shared
    if scheme.weight_bits == 16:
        yield Contender(name="torch._grouped_mm", config="", make=lambda: _torch_bf16(inputs, dense()[0]))
        yield from _triton(inputs, lambda: dense()[0])
    elif scheme.weight_bits == 8 and scheme.math is Math.E4M3:
        yield Contender(name="torch._scaled_grouped_mm", config="rowwise", make=lambda: _torch_fp8(inputs, *dense()))


def _ours(inputs: Inputs, config: KernelConfig, kernels: Kernels) -> Entry:
    experts = inputs.experts
    kernel = kernels.kernel(config, experts.schemes, table_size(experts.num_experts))
    for one in inputs.sets:
        one.bind(kernel.spec.schemes)  # tables are copied to the GPU, which a capture does not allow

    def launch(of: Any) -> Launch:
        return lambda: kernel(inputs.activations, of, inputs.offsets, out=inputs.output.y)

    return Entry(check=launch(experts), launches=tuple(launch(one) for one in inputs.sets))


def grouped_bf16(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped GEMM: bf16 x [T, K] times weights [E, N, K] transposed; experts' rows end at int32 ends [E]."""
    grouped: Callable[..., Tensor] = torch._grouped_mm
    return grouped(x, weights.transpose(-2, -1), offs=ends, out_dtype=torch.bfloat16)


def grouped_fp8(x: Tensor, x_scales: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """The same of float8_e4m3fn, with float32 scales [T] of tokens and [E, N] of weight rows; bf16 out."""
    grouped: Callable[..., Tensor] = torch._scaled_grouped_mm
    transposed = weights.transpose(-2, -1)
    return grouped(x, transposed, x_scales, scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)


def _torch_bf16(inputs: Inputs, weights: Sequence[Tensor]) -> Entry:
    x, ends = _tokens(inputs), inputs.offsets[1:].contiguous()
    return _entry(inputs, lambda of: grouped_bf16(x, of, ends), weights)


def _torch_fp8(inputs: Inputs, weights: Sequence[Tensor], scales: Tensor | None) -> Entry:
    assert scales is not None  # an 8-bit scheme has them
    x, ends = _tokens(inputs), inputs.offsets[1:].contiguous()
    x_scales = inputs.activations.tensors[1].flatten()
    return _entry(inputs, lambda of: grouped_fp8(x, x_scales, of, scales, ends), weights)


def _triton(inputs: Inputs, dense: Callable[[], Sequence[Tensor]]) -> Iterator[Contender]:
    """One contender a tile; a single one that says so where Triton is not installed."""
    try:
        from bench.peers.triton_grouped import grouped_gemm
    except ModuleNotFoundError:
        yield Contender(name="triton", config="", make=_no_triton)
        return

    def make(tile: Tile) -> Entry:
        x, y, weights = _tokens(inputs), inputs.output.y, dense()

        def launch(of: Tensor) -> Launch:
            return lambda: grouped_gemm(x, of, inputs.offsets, y, tile)

        return Entry(check=launch(weights[0]), launches=tuple(launch(one) for one in weights))

    for tile in tiles_for(inputs.load.tokens_per_expert):
        yield Contender(name="triton", config=tile_name(tile), make=functools.partial(make, tile))


def _no_triton() -> Entry:
    raise UnsupportedError("Triton's grouped GEMM", ["triton is not installed"])


def _entry(inputs: Inputs, product: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Entry:
    """Of a function that returns its result: the copy into Y is in the check only, not in the timed launches."""

    def check() -> None:
        inputs.output.y.copy_(product(weights[0]))

    def launch(of: Tensor) -> Launch:
        def run() -> None:
            product(of)

        return run

    return Entry(check=check, launches=tuple(launch(one) for one in weights))


def _tokens(inputs: Inputs) -> Tensor:
    """The tokens [T, K] as the launch reads them, without padding along K."""
    return inputs.activations.tensors[0][:, : inputs.activations.k].contiguous()


def _dense(inputs: Inputs, l2_bytes: int) -> tuple[list[Tensor], Tensor | None]:
    """Our packed weights as codes [E, N, K], in as many copies as keep L2 cold (other launches' are read between two of
    one), and their scales [E, N].
    """
    quantized = unpack(inputs.weights.stacks[0])
    codes, scales = quantized.codes, quantized.scales
    touched = inputs.load.num_active * codes[0].numel() * codes.element_size()
    count = 1 + math.ceil(COLD_L2_FACTOR * l2_bytes / max(1, touched))
    return [codes, *(codes.clone() for _ in range(count - 1))], None if scales is None else scales.squeeze(-1)
