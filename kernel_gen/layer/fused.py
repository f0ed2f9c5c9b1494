"""A layer's steps as kernels (kernel_gen.kernels.steps). Each gives what `plain` gives, for the rows that some expert
reads; the others' memory is left as it is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.kernels.spec import can_overlap
from kernel_gen.kernels.steps.spec import (
    CHUNK,
    FORMAT_CODE,
    MAX_EXPERTS,
    MAX_TOP_K,
    VECTOR,
    SwigluSpec,
)
from kernel_gen.layer.routing import Routing
from kernel_gen.layer.step_specs import StepSpecs
from kernel_gen.layouts import ACTIVATION_ARGUMENT, X_K_MULTIPLE, ActivationKind, activation_kind, round_up
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Activations
from profiles.errors import SpecError, UnsupportedError

MAX_RANKED_IDS = 4096
"""Up to here `gather` works out the places itself: one launch instead of three, though every CTA reads every id."""

_ELEMENTS = {ActivationKind.BF16: torch.bfloat16, ActivationKind.INT8: torch.int8}


class FusedSteps:
    """The steps of one layer.

    Args:
        gate_up, down: the layer's experts.
        library: where kernels come from.
        overlap: launch each step while the kernel before it ends; by default where the GPU can.
    """

    def __init__(self, gate_up: Experts, down: Experts, library: KernelLibrary, *, overlap: bool | None = None) -> None:
        self._library, self._device = library, gate_up.device
        self._num_experts = gate_up.num_experts
        if self._num_experts > MAX_EXPERTS:
            raise UnsupportedError("the fused steps", [f"{self._num_experts} experts, at most {MAX_EXPERTS}"])
        self._specs = StepSpecs.of(
            arch=library.gpu.arch,
            overlap=can_overlap(library.gpu.arch) if overlap is None else overlap,
            hidden=gate_up.k,
            intermediate=down.k,
            gate_up=gate_up.schemes,
            down=down.schemes,
        )
        self._formats = torch.tensor(
            [
                FORMAT_CODE[activation_kind(first)] | FORMAT_CODE[activation_kind(second)] << 8
                for first, second in zip(gate_up.scheme_of_expert, down.scheme_of_expert, strict=True)
            ],
            dtype=torch.int32,
            device=self._device,
        )
        # ids of no expert look one entry further
        self._formats = torch.nn.functional.pad(self._formats, (0, 1))

    def route(self, expert_ids: Tensor) -> Routing:
        """Integers [T, top_k] to places; an id outside 0..E-1 goes behind all others."""
        ids = _ids(expert_ids).flatten()
        counts = self._empty(-(-len(ids) // CHUNK), self._num_experts + 1)
        positions, offsets = self._empty(*expert_ids.shape), self._empty(self._num_experts + 1)
        bits = 8 * ids.element_size()
        with torch.cuda.device(self._device):
            self._library.step(self._specs.count(id_bits=bits))(ids, counts.data_ptr(), self._num_experts)
            self._library.step(self._specs.place(id_bits=bits))(
                ids, counts.data_ptr(), positions.data_ptr(), offsets.data_ptr(), self._num_experts
            )
        return Routing(offsets=offsets, positions=positions)

    def gather(
        self, hidden: Tensor, expert_ids: Tensor, routing: Routing | None, *, for_swiglu: bool
    ) -> tuple[Routing, Activations]:
        """bf16 [T, H] to rows in expert order, each in the form that its expert's first linear reads.

        routing: the places; None: worked out here, of at most MAX_RANKED_IDS ids. for_swiglu: `swiglu` below is next.
        UnsupportedError for a top_k that no kernel holds.
        """
        tokens, top_k = expert_ids.shape
        if top_k > MAX_TOP_K:
            raise UnsupportedError("the fused gather", [f"top_k {top_k}, at most {MAX_TOP_K}"])
        ids, source = _ids(expert_ids), hidden if hidden.stride(1) == 1 else hidden.contiguous()
        found = routing or Routing(offsets=self._empty(self._num_experts + 1), positions=self._empty(tokens, top_k))
        spec = self._specs.gather(
            top_k=top_k,
            id_bits=8 * ids.element_size(),
            ranks=routing is None,
            for_swiglu=for_swiglu,
            aligned=_is_aligned(source, self._specs.hidden),
        )
        formats = self._empty(tokens * top_k) if spec.writes_formats else None
        x = empty_activations(tokens * top_k, self._specs.hidden, self._specs.first, self._device)
        with torch.cuda.device(self._device):
            self._library.step(spec)(
                ids,
                source.data_ptr(),
                source.stride(0),
                found.positions.data_ptr(),
                found.offsets.data_ptr(),
                self._formats.data_ptr(),
                0 if formats is None else formats.data_ptr(),
                *x.addresses,
                self._num_experts,
                self._specs.hidden,
            )
        return Routing(offsets=found.offsets, positions=found.positions, row_formats=formats), x

    def with_formats(self, routing: Routing, expert_ids: Tensor) -> Routing:
        """The routing with each row's format, by torch: for a gather that is not fused."""
        if len(self._specs.second) == 1:
            return routing
        is_known = (expert_ids >= 0) & (expert_ids < self._num_experts)
        formats = self._formats[torch.where(is_known, expert_ids, self._num_experts).long()]
        by_row = torch.empty_like(formats.flatten())
        by_row[routing.positions.flatten()] = formats.flatten()
        return dataclasses.replace(routing, row_formats=by_row)

    def swiglu(self, gate_up: Tensor, routing: Routing) -> Activations:
        """bf16 [rows, 2 * I] to silu(gate) * up, rounded once, in the form that its expert's second linear reads."""
        x = empty_activations(len(gate_up), self._specs.intermediate, self._specs.second, self._device)
        self._swiglu(gate_up, routing, x, self._specs.swiglu(aligned=_is_aligned(gate_up, self._specs.intermediate)))
        return x

    def _swiglu(self, source: Tensor, routing: Routing, x: Activations, spec: SwigluSpec) -> None:
        formats = 0
        if spec.by_row:
            if routing.row_formats is None:
                raise SpecError("routing: expected each row's format, as gather with for_swiglu gives")
            formats = routing.row_formats.data_ptr()
        with torch.cuda.device(self._device):
            self._library.step(spec)(
                routing.offsets,
                source.data_ptr(),
                source.stride(0),
                formats,
                *x.addresses,
                len(source),
                self._specs.intermediate,
            )

    def quantize(self, product: Tensor, routing: Routing) -> Activations:
        """bf16 [rows, I], silu(gate) * up from a GEMM's epilogue, in the form that its expert's second linear reads.
        SpecError for rows that the second GEMM could not read where they are.
        """
        kinds, aligned = self._specs.quantized, _is_aligned(product, self._specs.intermediate)
        has_bf16 = len(kinds) < len(self._specs.second)
        if has_bf16 and not aligned:
            raise SpecError(f"product: expected rows of whole vectors at 16 bytes, got {list(product.shape)}")
        x = empty_activations(len(product), self._specs.intermediate, kinds, self._device)
        if spec := self._specs.quantize(aligned=aligned):
            self._swiglu(product, routing, x, spec)
        if not has_bf16:
            return x
        addresses = (product.data_ptr(), *x.addresses[1:])
        return dataclasses.replace(x, addresses=addresses, tensors=(product, *x.tensors))

    def combine(self, y: Tensor, routing: Routing, expert_weights: Tensor) -> Tensor:
        """bf16 [rows, H] to bf16 [T, H]: each token's rows times floats [T, top_k], added in float32 in that order.
        UnsupportedError for a top_k that no kernel holds.
        """
        tokens, top_k = routing.positions.shape
        if top_k > MAX_TOP_K:
            raise UnsupportedError("the fused combine", [f"top_k {top_k}, at most {MAX_TOP_K}"])
        is_known = expert_weights.dtype in (torch.float32, torch.bfloat16)
        weights = (expert_weights if is_known else expert_weights.float()).contiguous()
        out = torch.empty(tokens, self._specs.hidden, dtype=torch.bfloat16, device=self._device)
        aligned = _is_aligned(y, self._specs.hidden)
        spec = self._specs.combine(top_k=top_k, weight_bits=8 * weights.element_size(), aligned=aligned)
        with torch.cuda.device(self._device):
            self._library.step(spec)(
                routing.offsets,
                y.data_ptr(),
                y.stride(0),
                routing.positions.data_ptr(),
                weights.data_ptr(),
                out.data_ptr(),
                tokens,
                self._specs.hidden,
            )
        return out

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self._device)


def empty_activations(rows: int, k: int, kinds: tuple[ActivationKind, ...], device: torch.device | str) -> Activations:
    """Memory for rows of K values in each of these forms."""
    addresses = [0] * 7
    tensors: list[Tensor] = []
    for kind in kinds:
        columns = round_up(k, X_K_MULTIPLE[kind])
        is_int4 = kind in (ActivationKind.INT4, ActivationKind.INT4_GROUP)
        dtype = torch.uint8 if is_int4 else _ELEMENTS.get(kind, torch.float8_e4m3fn)
        codes = torch.empty(rows, columns // 2 if is_int4 else columns, dtype=dtype, device=device)
        tensors.append(codes)
        addresses[ACTIVATION_ARGUMENT[kind]] = codes.data_ptr()
        if kind is not ActivationKind.BF16:
            groups = columns // X_K_MULTIPLE[kind] if kind is ActivationKind.INT4_GROUP else 1
            scales = torch.empty(rows, groups, dtype=torch.float32, device=device)
            tensors.append(scales)
            addresses[ACTIVATION_ARGUMENT[kind] + 1] = scales.data_ptr()
    return Activations(num_tokens=rows, k=k, addresses=tuple(addresses), tensors=tuple(tensors))


def _is_aligned(rows: Tensor, columns: int) -> bool:
    return columns % VECTOR == 0 and rows.stride(0) % VECTOR == 0 and rows.data_ptr() % 16 == 0


def _ids(expert_ids: Tensor) -> Tensor:
    """As the kernels read them."""
    is_known = expert_ids.dtype in (torch.int32, torch.int64)
    return (expert_ids if is_known else expert_ids.long()).contiguous()
