"""A layer of experts on the GPU: `grouped_gemm` for one linear, `MoELayer` from router output to layer output.

Every mistake raises SpecError (or UnsupportedError) naming the argument; nothing was launched then.
"""

from __future__ import annotations

import enum
import itertools

import torch
from torch import Tensor

from kernel_gen.experts import SWIGLU_ROWS, Experts
from kernel_gen.kernels.spec import can_overlap
from kernel_gen.kernels.steps.spec import MAX_TOP_K
from kernel_gen.layer import plain
from kernel_gen.layer.fused import MAX_RANKED_IDS, FusedSteps
from kernel_gen.layer.routing import Routing
from kernel_gen.library import KernelLibrary, library_of
from kernel_gen.runtime import Activations, check_capture, check_gpu, check_launch, described
from profiles.errors import SpecError


def grouped_gemm(
    x: Tensor | Activations,
    experts: Experts,
    offsets: Tensor,
    out: Tensor | None = None,
    *,
    library: KernelLibrary | None = None,
    check_offsets: bool = True,
) -> Tensor:
    """Y [T, N] bf16: rows offsets[e]..offsets[e+1] of X [T, K] times expert e's weights, transposed.

    Args:
        x: bf16 [T, K], tokens sorted by expert; or activations prepared before.
        experts: the linear's weights, each expert in its own scheme, at most four different ones.
        offsets: int32 [E + 1] on the GPU, rising from 0 to T.
        out: where to write, bf16 [T, N]; fresh memory by default. A graph capture needs it, and activations prepared
            before where the experts' schemes quantise them.
        library: the kernels to choose from; the device's own by default, which compiles in process.
        check_offsets: read the offsets and refuse bad ones. This waits for the GPU, so it is left out in a capture;
            unchecked bad offsets are clamped and can reach no memory but the tensors'.
    """
    check_launch(x, experts, offsets)
    _check_library(library)
    num_rows = x.num_tokens if isinstance(x, Activations) else x.shape[0]
    if torch.cuda.is_current_stream_capturing():
        check_capture(x, experts, out)
    elif check_offsets:
        _check_offsets(offsets, num_rows)
    kernels = library or library_of(experts.device.index or 0)
    check_gpu(kernels.gpu.arch, experts.device)
    return kernels.best(experts, num_rows)(x, experts, offsets, out)


class Fusion(enum.Flag):
    """The steps of a layer that run as kernels of this project instead of torch's operators.

    ROUTE: expert ids to places in expert order. GATHER: tokens to those places, quantised on the way. SWIGLU: the first
    GEMM's output to the second's input, quantised on the way. COMBINE: back to tokens, times the router's weights. For
    few tokens ROUTE and GATHER together are one launch. EPILOGUE: SwiGLU in the first GEMM itself; SWIGLU then only
    quantises, where the second GEMM reads 8 bits or fewer. OVERLAP: each kernel is launched while the one before it
    ends, from sm_90 on. PREFETCH, beside OVERLAP: the second GEMM lists its tiles and asks for its first weights before
    it waits for the kernel ahead.
    """

    NONE = 0
    ROUTE = enum.auto()
    GATHER = enum.auto()
    SWIGLU = enum.auto()
    COMBINE = enum.auto()
    EPILOGUE = enum.auto()
    OVERLAP = enum.auto()
    PREFETCH = enum.auto()
    ALL = ROUTE | GATHER | SWIGLU | COMBINE | EPILOGUE | OVERLAP | PREFETCH
    MEASURED_FASTER = ALL  # on an H200, each alone (docs/layer.md)


_STEPS = Fusion.ROUTE | Fusion.GATHER | Fusion.SWIGLU | Fusion.COMBINE
"""Kernels of their own."""


def default_fusions(gate_up: Experts, kernels: KernelLibrary) -> Fusion:
    """What was measured faster, without what these weights or this GPU cannot have; nothing from a bundle."""
    if kernels.bundle is not None:
        return Fusion.NONE
    found = Fusion.MEASURED_FASTER
    if not can_overlap(kernels.gpu.arch):
        found &= ~(Fusion.OVERLAP | Fusion.PREFETCH)
    if gate_up.n % (2 * SWIGLU_ROWS):
        found &= ~Fusion.EPILOGUE
    return found


class MoELayer(torch.nn.Module):
    """silu(X gate) * (X up), times down, summed over each token's experts with the router's weights.

    Args:
        gate_up: [E, 2 * I, H] weights, gate's I rows before up's; or interleaved (Experts.interleaved), where EPILOGUE
            is among the fusions, which makes an interleaved copy otherwise.
        down: [E, H, I] weights.
        library: the kernels to choose from; the device's own by default.
        fusions: what runs as kernels of this project, by default what was measured faster, as far as the GPU and the
            sizes allow; nothing from a bundle, which has GEMMs only.

    Launches depend on shapes alone: no value is read by the host, so a CUDA graph can hold `forward` once it ran
    before. Under torch.compile the layer is one opaque step between compiled parts.
    """

    def __init__(
        self,
        gate_up: Experts,
        down: Experts,
        *,
        library: KernelLibrary | None = None,
        fusions: Fusion | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("gate_up", gate_up), ("down", down)):
            if not isinstance(given, Experts):
                raise SpecError(f"{name}: expected kernel_gen.Experts, got {described(given)}")
        if gate_up.num_experts != down.num_experts:
            raise SpecError(f"down: expected {gate_up.num_experts} experts as gate_up has, got {down.num_experts}")
        if gate_up.n != 2 * down.k or gate_up.k != down.n:
            raise SpecError(
                f"down: expected [E, {gate_up.k}, {gate_up.n // 2}] for gate_up [E, {gate_up.n}, {gate_up.k}], "
                f"got [E, {down.n}, {down.k}]"
            )
        if gate_up.device != down.device or gate_up.device.type != "cuda":
            raise SpecError(f"down: expected both on one CUDA device, got {gate_up.device} and {down.device}")
        _check_library(library)
        if fusions is not None and not isinstance(fusions, Fusion):
            raise SpecError(f"fusions: expected kernel_gen.Fusion or None, got {fusions!r}")
        self.kernels = library or library_of(gate_up.device.index or 0)
        check_gpu(self.kernels.gpu.arch, gate_up.device)
        self.fusions = default_fusions(gate_up, self.kernels) if fusions is None else fusions
        if self.fusions & _STEPS and not self.kernels.has_steps:
            raise SpecError(
                f"fusions: expected none of {_STEPS} from a bundle, which has GEMMs only, got {self.fusions}"
            )
        if Fusion.OVERLAP in self.fusions and not can_overlap(self.kernels.gpu.arch):
            raise SpecError(f"fusions: expected no OVERLAP on {self.kernels.gpu.name}: launches overlap from sm_90 on")
        if Fusion.PREFETCH in self.fusions and Fusion.OVERLAP not in self.fusions:
            raise SpecError("fusions: expected OVERLAP beside PREFETCH: without it nothing runs ahead of a launch")
        if Fusion.EPILOGUE in self.fusions and Fusion.SWIGLU not in self.fusions:
            raise SpecError("fusions: expected SWIGLU beside EPILOGUE, which quantises what the epilogue leaves")
        if Fusion.EPILOGUE not in self.fusions and gate_up.is_interleaved:
            raise SpecError("gate_up: expected gate's rows before up's, got them interleaved: only EPILOGUE reads that")
        if Fusion.EPILOGUE in self.fusions and not gate_up.is_interleaved:
            gate_up = gate_up.interleaved()
        self.gate_up, self.down = gate_up, down
        self._overlap = Fusion.OVERLAP in self.fusions
        self._fused = FusedSteps(gate_up, down, self.kernels, overlap=self._overlap) if self.fusions else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Layer output, bf16 [T, H].

        Args:
            hidden: bf16 [T, H].
            expert_ids: integers [T, top_k], each token's experts. An id outside 0..E-1 (an expert of another rank)
                adds nothing.
            expert_weights: floats [T, top_k], what each expert's output is multiplied by.
        """
        self._check(hidden, expert_ids, expert_weights)
        if expert_ids.numel() == 0:
            return hidden.new_zeros(len(hidden), self.down.n)
        routing, x = self._dispatch(hidden, expert_ids)
        product = self._product(routing, x)
        kernel = self.kernels.best(
            self.down, product.num_tokens, overlap=self._overlap, prefetch=Fusion.PREFETCH in self.fusions
        )
        y = kernel(product, self.down, routing.offsets)
        if fused := self._uses(Fusion.COMBINE):
            return fused.combine(y, routing, expert_weights)
        return plain.combine(y, routing, expert_weights)

    def _dispatch(self, hidden: Tensor, expert_ids: Tensor) -> tuple[Routing, Activations]:
        """Tokens in expert order, as gate_up reads them."""
        routing: Routing | None = None
        route, gather = self._uses(Fusion.ROUTE), self._uses(Fusion.GATHER)
        if route and not (gather and expert_ids.numel() <= MAX_RANKED_IDS):
            routing = route.route(expert_ids)
        elif not route:
            routing = plain.route(expert_ids, self.gate_up.num_experts)
        for_swiglu = Fusion.SWIGLU in self.fusions
        if gather:
            return gather.gather(hidden, expert_ids, routing, for_swiglu=for_swiglu)
        assert routing is not None
        if for_swiglu and self._fused is not None:
            routing = self._fused.with_formats(routing, expert_ids)
        return routing, plain.gather(hidden, routing, self.gate_up)

    def _product(self, routing: Routing, x: Activations) -> Activations:
        """silu(X gate) * (X up), as down reads it."""
        is_whole = Fusion.EPILOGUE in self.fusions
        kernel = self.kernels.best(self.gate_up, x.num_tokens, swiglu=is_whole, overlap=self._overlap)
        gate_up = kernel(x, self.gate_up, routing.offsets)
        fused = self._uses(Fusion.SWIGLU)
        if fused is None:
            return plain.swiglu(gate_up, self.down)
        return fused.quantize(gate_up, routing) if is_whole else fused.swiglu(gate_up, routing)

    def _uses(self, step: Fusion) -> FusedSteps | None:
        """The fused steps, if this one is among the layer's fusions."""
        return self._fused if step in self.fusions else None

    def _check(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
        device = self.gate_up.device
        if (
            not isinstance(hidden, Tensor)
            or hidden.dtype != torch.bfloat16
            or hidden.dim() != 2
            or hidden.shape[1] != self.gate_up.k
            or hidden.device != device
        ):
            raise SpecError(f"hidden: expected bfloat16 [T, {self.gate_up.k}] on {device}, got {described(hidden)}")
        if (
            not isinstance(expert_ids, Tensor)
            or not _is_integer(expert_ids)
            or expert_ids.dim() != 2
            or expert_ids.shape[0] != hidden.shape[0]
            or expert_ids.device != device
        ):
            raise SpecError(
                f"expert_ids: expected integers [{hidden.shape[0]}, top_k] on {device}, got {described(expert_ids)}"
            )
        if self.fusions & (Fusion.GATHER | Fusion.COMBINE) and expert_ids.shape[1] > MAX_TOP_K:
            raise SpecError(
                f"expert_ids: expected at most {MAX_TOP_K} experts a token, which the fused steps hold, got "
                f"{expert_ids.shape[1]}; leave Fusion.GATHER and Fusion.COMBINE out"
            )
        if (
            not isinstance(expert_weights, Tensor)
            or not expert_weights.is_floating_point()
            or expert_weights.shape != expert_ids.shape
            or expert_weights.device != device
        ):
            raise SpecError(
                f"expert_weights: expected floats {list(expert_ids.shape)} on {device}, got {described(expert_weights)}"
            )


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _check_library(library: KernelLibrary | None) -> None:
    if library is not None and not isinstance(library, KernelLibrary):
        raise SpecError(f"library: expected kernel_gen.KernelLibrary, got {described(library)}")


def _check_offsets(offsets: Tensor, num_rows: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != num_rows or any(b < a for a, b in itertools.pairwise(values)):
        raise SpecError(f"offsets: expected numbers rising from 0 to {num_rows}, got {_short(values)}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
