"""Launch a compiled kernel on torch tensors. Needs torch and apache-tvm-ffi; the compiler only where kernels are
compiled in process.

Every argument is checked before anything is launched; a mistake raises SpecError naming the argument, what was expected
and what came. A launch allocates nothing when `out` is given and activations were prepared before, reads the offsets on
the GPU only, and can be captured in a graph.
"""

from __future__ import annotations

import functools
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
    """Quantise bf16 X [T, K] once for each activation type among the schemes, on its device; nothing waits for it.

    SpecError for other arguments, or schemes with int4 activations per token and per group.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.bfloat16 or x.dim() != 2:
        raise SpecError(f"x: expected bfloat16 [T, K], got {described(x)}")
    if not isinstance(schemes, Sequence) or not all(isinstance(scheme, QuantScheme) for scheme in schemes):
        raise SpecError(f"schemes: expected a list of what profiles.schemes.parse gives, got {schemes!r}")
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


def described(given: object) -> str:
    """What came, for the sentence about a mistake: a tensor's dtype, shape, strides where they are not those of its
    shape, and device; the type of anything else.
    """
    if not isinstance(given, Tensor):
        return "None" if given is None else f"a {type(given).__name__}"
    strides = "" if given.is_contiguous() else f", strides {list(given.stride())},"
    return f"{given.dtype} {list(given.shape)}{strides} on {given.device}"


def check_launch(x: Tensor | Activations, experts: Experts, offsets: Tensor) -> None:
    """SpecError unless these belong together; no value is read."""
    if not isinstance(experts, Experts):
        raise SpecError(f"experts: expected kernel_gen.Experts, got {described(experts)}")
    if experts.device.type != "cuda":
        raise SpecError(f"experts: expected weights on a CUDA device, got {experts.device}")
    _check_tokens(x, experts)
    if (
        not isinstance(offsets, Tensor)
        or offsets.dtype != torch.int32
        or offsets.shape != (experts.num_experts + 1,)
        or offsets.device != experts.device
        or not offsets.is_contiguous()
    ):
        raise SpecError(
            f"offsets: expected contiguous int32 [{experts.num_experts + 1}] on {experts.device}, "
            f"got {described(offsets)}"
        )


def _check_tokens(x: Tensor | Activations, experts: Experts) -> None:
    if isinstance(x, Activations):
        if x.k != experts.k:
            raise SpecError(f"x: expected K = {experts.k} as the experts have, got {x.k}")
        if any(tensor.device != experts.device for tensor in x.tensors):
            raise SpecError(f"x: expected it on {experts.device}, got {x.tensors[0].device}")
        for scheme in experts.schemes:
            if x.addresses[_ARGUMENT[activation_kind(scheme)]] == 0 and x.num_tokens:
                raise SpecError(
                    f"x: not prepared for {scheme.name}: pass all the experts' schemes to prepare_activations"
                )
    elif (
        not isinstance(x, Tensor)
        or x.dtype != torch.bfloat16
        or x.dim() != 2
        or x.shape[1] != experts.k
        or x.device != experts.device
    ):
        raise SpecError(f"x: expected bfloat16 [T, {experts.k}] on {experts.device}, got {described(x)}")


def check_capture(x: Tensor | Activations, experts: Experts, out: Tensor | None) -> None:
    """SpecError where a launch inside a graph capture would allocate: a replay writes to the same addresses, so that
    they must be the caller's.
    """
    if out is None:
        raise SpecError("out: expected a tensor inside a graph capture, which must not allocate, got None")
    if isinstance(x, Tensor) and not _is_ready(x, experts):
        raise SpecError(
            "x: expected activations of prepare_activations inside a graph capture, which must not allocate, "
            f"got {described(x)} to quantise or copy"
        )


def _is_ready(x: Tensor, experts: Experts) -> bool:
    """Whether the kernels read x [T, K] where it is."""
    reads_bf16 = all(activation_kind(scheme) is ActivationKind.BF16 for scheme in experts.schemes)
    return reads_bf16 and x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] % ROW_ALIGN == 0


def _check_apart(out: Tensor, x: Tensor | Activations) -> None:
    """SpecError where a launch would store tiles into what it still reads."""
    if any(_share_memory(out, read) for read in (x.tensors if isinstance(x, Activations) else (x,))):
        raise SpecError("out: expected memory of its own, got some that x is read from while tiles are stored")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of one storage whose bytes, from the first element to the last, overlap."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not a.numel() or not b.numel():
        return False
    (a_begin, a_end), (b_begin, b_end) = _span_bytes(a), _span_bytes(b)
    return a_begin < b_end and b_begin < a_end


def _span_bytes(tensor: Tensor) -> tuple[int, int]:
    """From the first to behind the last element, in the storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.element_size()
    return begin, begin + (last + 1) * tensor.element_size()


def check_gpu(arch: str, device: torch.device) -> None:
    """SpecError unless the GPU is of the architecture that kernels were made for, such as sm_89."""
    found, name = _gpu_of(device)
    if found != arch.rstrip("af"):
        raise SpecError(f"library: expected kernels for the {found} of {device} ({name}), got them for {arch}")


@functools.cache
def _gpu_of(device: torch.device) -> tuple[str, str]:
    """(architecture, name) of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.name


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
            out: as Y, contiguous, its rows a multiple of 8 long; no memory of x's.
        """
        check_launch(x, experts, offsets)
        self._check(experts)
        num_tokens = x.num_tokens if isinstance(x, Activations) else x.shape[0]
        columns = experts.n // 2 if self.spec.swiglu else experts.n
        y = self._output(num_tokens, columns, experts.device, out)
        if out is not None:
            _check_apart(out, x)
        if num_tokens:
            binding = experts.bind(self.spec.schemes)
            activations = x if isinstance(x, Activations) else prepare_activations(x, experts.schemes)
            grid = self.grid(num_tokens, experts)
            with torch.cuda.device(experts.device):
                self.function(y, offsets, binding.plan, binding.weights, *activations.addresses, experts.k, grid)
        return y if y.shape[1] == columns else y[:, :columns]

    def grid(self, num_tokens: int, experts: Experts) -> int:
        """CTAs of a launch: as many as are resident at once, or as the tiles there can be at most; whole clusters."""
        config = self.spec.config
        tile, ctas = config.tile, config.cluster * config.split_k
        token_tiles = -(-num_tokens // tile.n) + min(experts.num_experts, num_tokens) - 1
        resident = torch.cuda.get_device_properties(experts.device).multi_processor_count * self.ctas_per_sm
        clusters = max(token_tiles, 1) * -(-experts.n // (tile.m * config.cluster))
        return min(resident // ctas, clusters) * ctas

    def _check(self, experts: Experts) -> None:
        check_gpu(self.spec.arch, experts.device)
        if experts.num_experts > self.spec.max_experts:
            raise SpecError(
                f"experts: expected {self.spec.max_experts} at most, which this kernel was built for, "
                f"got {experts.num_experts}"
            )
        if self.spec.swiglu and not experts.is_interleaved:
            raise SpecError(
                "experts: expected gate and up interleaved, as Experts.interleaved gives them, got rows in their order"
            )
        if experts.is_interleaved and not self.spec.swiglu:
            raise SpecError("experts: expected rows in their order, got gate and up interleaved for a SwiGLU epilogue")

    def _output(self, num_tokens: int, columns: int, device: torch.device, out: Tensor | None) -> Tensor:
        width = -(-columns // ROW_ALIGN) * ROW_ALIGN
        if out is None:
            return torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device)
        expected = (num_tokens, columns)
        if (
            not isinstance(out, Tensor)
            or out.dtype != torch.bfloat16
            or out.shape != expected
            or out.device != device
            or not out.is_contiguous()
            or out.data_ptr() % 16
        ):
            odd = isinstance(out, Tensor) and out.data_ptr() % 16
            raise SpecError(
                f"out: expected contiguous, 16-byte aligned bfloat16 {list(expected)} on {device}, "
                f"got {described(out)}{f' at an address {odd} bytes past one' if odd else ''}"
            )
        if columns != width:
            raise SpecError(
                f"out: N = {columns} is not a multiple of {ROW_ALIGN}: leave out away and take the result's view"
            )
        return out
