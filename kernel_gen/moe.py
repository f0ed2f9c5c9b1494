"""A layer of experts on the GPU: `grouped_gemm` for one linear, `MoELayer` from router output to layer output.

Every mistake raises SpecError (or UnsupportedError) naming the argument; nothing was launched then.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kernel_gen.experts import Experts
from kernel_gen.library import KernelLibrary, library_of
from kernel_gen.runtime import Activations
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
        out: where to write, bf16 [T, N]; fresh memory by default.
        library: the kernels to choose from; the device's own by default, which compiles in process.
        check_offsets: read the offsets and refuse bad ones. This waits for the GPU, so it is left out in a capture;
            unchecked bad offsets are clamped and can reach no memory but the tensors'.
    """
    if experts.device.type != "cuda":
        raise SpecError(f"experts: expected weights on a CUDA device, got {experts.device}")
    num_rows = x.num_tokens if isinstance(x, Activations) else x.shape[0]
    if check_offsets and not torch.cuda.is_current_stream_capturing():
        _check_offsets(offsets, num_rows)
    kernels = library or library_of(experts.device.index or 0)
    return kernels.best(experts, num_rows)(x, experts, offsets, out)


class MoELayer(torch.nn.Module):
    """silu(X gate) * (X up), times down, summed over each token's experts with the router's weights.

    Args:
        gate_up: [E, 2 * I, H] weights, gate's I rows before up's.
        down: [E, H, I] weights.
        library: the kernels to choose from; the device's own by default.

    Launches depend on shapes alone: no value is read by the host, so a CUDA graph can hold `forward` once it ran
    before. Under torch.compile the layer is one opaque step between compiled parts.
    """

    def __init__(self, gate_up: Experts, down: Experts, *, library: KernelLibrary | None = None) -> None:
        super().__init__()
        if gate_up.num_experts != down.num_experts:
            raise SpecError(f"down: expected {gate_up.num_experts} experts as gate_up has, got {down.num_experts}")
        if gate_up.n != 2 * down.k or gate_up.k != down.n:
            raise SpecError(
                f"down: expected [E, {gate_up.k}, {gate_up.n // 2}] for gate_up [E, {gate_up.n}, {gate_up.k}], "
                f"got [E, {down.n}, {down.k}]"
            )
        if gate_up.device != down.device or gate_up.device.type != "cuda":
            raise SpecError(f"down: expected both on one CUDA device, got {gate_up.device} and {down.device}")
        self.gate_up, self.down = gate_up, down
        self.kernels = library or library_of(gate_up.device.index or 0)
        self._bounds: Tensor
        self.register_buffer("_bounds", torch.arange(gate_up.num_experts + 1, device=gate_up.device), persistent=False)

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
        tokens, top_k = expert_ids.shape
        if tokens == 0:
            return hidden.new_empty(0, self.down.n)
        num_experts = self.gate_up.num_experts
        ids = torch.where((expert_ids < 0) | (expert_ids >= num_experts), num_experts, expert_ids).flatten()
        sorted_ids, order = ids.sort(stable=True)
        offsets = torch.searchsorted(sorted_ids, self._bounds.to(sorted_ids.dtype)).to(torch.int32)
        x = hidden[order // top_k]
        gate, up = grouped_gemm(x, self.gate_up, offsets, library=self.kernels, check_offsets=False).chunk(2, dim=1)
        y = torch.zeros(tokens * top_k, -(-self.down.n // 8) * 8, dtype=torch.bfloat16, device=hidden.device)
        product = torch.nn.functional.silu(gate) * up
        aligned = y if self.down.n == y.shape[1] else None
        filled = grouped_gemm(product, self.down, offsets, aligned, library=self.kernels, check_offsets=False)
        if aligned is None:
            y = torch.where((sorted_ids < num_experts)[:, None], filled, 0)
        scattered = torch.empty_like(y)
        scattered[order] = y
        weights = expert_weights.to(torch.float32)[..., None]
        return (scattered.view(tokens, top_k, -1).float() * weights).sum(1).to(torch.bfloat16)

    def _check(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> None:
        device = self.gate_up.device
        if (
            hidden.dtype != torch.bfloat16
            or hidden.dim() != 2
            or hidden.shape[1] != self.gate_up.k
            or hidden.device != device
        ):
            raise SpecError(
                f"hidden: expected bfloat16 [T, {self.gate_up.k}] on {device}, "
                f"got {hidden.dtype} {list(hidden.shape)} on {hidden.device}"
            )
        if expert_ids.dim() != 2 or expert_ids.shape[0] != hidden.shape[0] or expert_ids.is_floating_point():
            raise SpecError(
                f"expert_ids: expected integers [{hidden.shape[0]}, top_k], "
                f"got {expert_ids.dtype} {list(expert_ids.shape)}"
            )
        if expert_weights.shape != expert_ids.shape or not expert_weights.is_floating_point():
            raise SpecError(
                f"expert_weights: expected floats {list(expert_ids.shape)}, "
                f"got {expert_weights.dtype} {list(expert_weights.shape)}"
            )


def _check_offsets(offsets: Tensor, num_rows: int) -> None:
    values = offsets.tolist()
    if values and (values[0] != 0 or values[-1] != num_rows or any(b < a for a, b in itertools.pairwise(values))):
        raise SpecError(f"offsets: expected numbers rising from 0 to {num_rows}, got {_short(values)}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
