"""Launch a compiled kernel on torch tensors. Needs torch and apache-tvm-ffi; the compiler only where kernels are
compiled in process.

Every argument is checked before anything is launched; a mistake raises SpecError naming the argument, what was expected
and what came. A launch allocates nothing when `out` is given and activations were prepared before, reads the offsets on
the GPU only, and can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.formats import quantize_activations
from kernel_gen.kernels import KernelSpec
from kernel_gen.layouts import ActivationKind, activation_kind
from profiles.errors import SpecError
from profiles.schemes import QuantScheme

ROW_ALIGN = 8
"""Rows of Y are multiples of 8 bf16, 16 bytes: with another N the result is a view into wider rows."""

_ARGUMENT = {
    ActivationKind.BF16: 0,
    ActivationKind.INT8: 1,
    ActivationKind.E4M3: 3,
    ActivationKind.INT4: 5,
    ActivationKind.INT4_GROUP: 5,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """X [T, K] in every form that some slots need. addresses: the entry's seven; tensors keeps them alive."""

    num_tokens: int
    k: int
    addresses: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def prepare_activations(x: Tensor, schemes: Sequence[QuantScheme]) -> Activations:
    """Quantise bf16 X [T, K] once for each activation type among the schemes."""
    if x.dtype != torch.bfloat16 or x.dim() != 2:
        raise SpecError(f"x: expected bfloat16 [T, K], got {x.dtype} {list(x.shape)}")
    addresses = [0] * 7
    tensors: list[Tensor] = []
    kinds = {activation_kind(scheme): scheme for scheme in schemes}
    if ActivationKind.INT4 in kinds and ActivationKind.INT4_GROUP in kinds:
        raise SpecError("schemes: int4 activations per token and per group cannot share a launch")
    for kind, scheme in kinds.items():
        quantized = quantize_activations(x, scheme)
        codes = quantized.codes if quantized.codes.data_ptr() % 16 == 0 else quantized.codes.clone()
        tensors.append(codes)
        addresses[_ARGUMENT[kind]] = codes.data_ptr()
        if quantized.scales is not None:
            tensors.append(quantized.scales)
            addresses[_ARGUMENT[kind] + 1] = quantized.scales.data_ptr()
    return Activations(num_tokens=x.shape[0], k=x.shape[1], addresses=tuple(addresses), tensors=tuple(tensors))


class Kernel:
    """A loaded kernel.

    Args:
        spec: what it was compiled from.
        function: its entry (ARCHITECTURE.md), from a bundle or compiled in process.
        ctas_per_sm: how many CTAs an SM holds (build facts); the grid is that times the SMs, or fewer where there are
            fewer tiles.
    """

    def __init__(self, spec: KernelSpec, function: Callable[..., None], ctas_per_sm: int) -> None:
        self.spec, self.function, self.ctas_per_sm = spec, function, ctas_per_sm
        if ctas_per_sm < 1:
            raise SpecError(f"ctas_per_sm: expected at least 1, got {ctas_per_sm}")

    def __call__(self, x: Tensor | Activations, experts: Experts, offsets: Tensor, out: Tensor | None = None) -> Tensor:
        """Y [T, N] bf16: rows offsets[e]..offsets[e+1] of X [T, K] times expert e's weights, transposed. From a kernel
        with SwiGLU in its epilogue Y is [T, N / 2], silu(gate) * up.

        Args:
            x: bf16 [T, K], tokens sorted by expert, on the experts' device; or activations prepared before.
            experts: the linear's weights; their schemes are among the kernel's.
            offsets: int32 [E + 1] on the same device, rising from 0 to T. Not read by the host: out of range they are
                clamped.
            out: as Y, contiguous, its rows a multiple of 8 long.
        """
        activations = x if isinstance(x, Activations) else prepare_activations(x, experts.schemes)
        self._check(activations, experts, offsets)
        columns = experts.n // 2 if self.spec.swiglu else experts.n
        y = self._output(activations, columns, experts.device, out)
        if activations.num_tokens == 0:
            return y[:, :columns]
        binding = experts.bind(self.spec.schemes)
        grid = self.grid(activations.num_tokens, experts)
        with torch.cuda.device(experts.device):
            self.function(y, offsets, binding.plan, binding.weights, *activations.addresses, experts.k, grid)
        return y[:, :columns]

    def grid(self, num_tokens: int, experts: Experts) -> int:
        """CTAs of a launch: as many as are resident at once, or as the tiles there can be at most; whole clusters."""
        config = self.spec.config
        tile, ctas = config.tile, config.cluster * config.split_k
        token_tiles = -(-num_tokens // tile.n) + min(experts.num_experts, num_tokens) - 1
        resident = torch.cuda.get_device_properties(experts.device).multi_processor_count * self.ctas_per_sm
        clusters = max(token_tiles, 1) * -(-experts.n // (tile.m * config.cluster))
        return min(resident // ctas, clusters) * ctas

    def _check(self, x: Activations, experts: Experts, offsets: Tensor) -> None:
        if experts.num_experts > self.spec.max_experts:
            raise SpecError(
                f"experts: {experts.num_experts} experts, this kernel was built for {self.spec.max_experts}"
            )
        if experts.device.type != "cuda":
            raise SpecError(f"experts: expected weights on a CUDA device, got {experts.device}")
        if self.spec.swiglu and not experts.is_interleaved:
            raise SpecError("experts: expected gate and up interleaved, as Experts.interleaved gives them")
        if experts.is_interleaved and not self.spec.swiglu:
            raise SpecError("experts: expected rows in their order, got gate and up interleaved for a SwiGLU epilogue")
        if x.k != experts.k:
            raise SpecError(f"x: expected K = {experts.k} as the experts have, got {x.k}")
        if any(tensor.device != experts.device for tensor in x.tensors):
            raise SpecError(f"x: expected it on {experts.device}, got {x.tensors[0].device}")
        for scheme in experts.schemes:
            if x.addresses[_ARGUMENT[activation_kind(scheme)]] == 0 and x.num_tokens:
                raise SpecError(
                    f"x: not prepared for {scheme.name}: pass all the experts' schemes to prepare_activations"
                )
        if (
            offsets.dtype != torch.int32
            or offsets.shape != (experts.num_experts + 1,)
            or offsets.device != experts.device
            or not offsets.is_contiguous()
        ):
            raise SpecError(
                f"offsets: expected contiguous int32 [{experts.num_experts + 1}] on {experts.device}, "
                f"got {offsets.dtype} {list(offsets.shape)} on {offsets.device}"
            )

    def _output(self, x: Activations, columns: int, device: torch.device, out: Tensor | None) -> Tensor:
        width = -(-columns // ROW_ALIGN) * ROW_ALIGN
        if out is None:
            return torch.empty(x.num_tokens, width, dtype=torch.bfloat16, device=device)
        expected = (x.num_tokens, columns)
        if (
            out.dtype != torch.bfloat16
            or out.shape != expected
            or out.device != device
            or not out.is_contiguous()
            or out.data_ptr() % 16
        ):
            raise SpecError(
                f"out: expected contiguous, 16-byte aligned bfloat16 {list(expected)} on {device}, "
                f"got {out.dtype} {list(out.shape)} on {out.device}"
            )
        if columns != width:
            raise SpecError(
                f"out: N = {columns} is not a multiple of {ROW_ALIGN}: leave out away and take the result's view"
            )
        return out
