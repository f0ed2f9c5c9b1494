"""Layers beside kernel_gen.moe.MoELayer: the same with one launch a scheme, and torch's and Triton's in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.layer.weights import SchemeShare
from bench.peers.contenders import grouped_bf16
from kernel_gen.experts import Experts
from kernel_gen.layer.fused import MAX_RANKED_IDS, FusedSteps
from kernel_gen.layer.routing import Routing
from kernel_gen.library import KernelLibrary
from kernel_gen.runtime import Activations
from profiles.models import Linear

Gemm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [M, K], weights [E, N, K], offsets [E + 1]) to [M, N]; bf16."""


class SteppedLayer:
    """Our fused steps around any two GEMMs. gate_up interleaved: the first GEMM gives the product already."""

    PARTS = ("gather", "gemm 1", "swiglu", "gemm 2", "combine")

    def __init__(self, gate_up: Experts, down: Experts, library: KernelLibrary, *, overlap: bool) -> None:
        self.gate_up, self.down, self.overlap = gate_up, down, overlap
        self.steps = FusedSteps(gate_up, down, library, overlap=overlap)

    @property
    def first_columns(self) -> int:
        """Of what the first GEMM gives."""
        return self.gate_up.n // 2 if self.gate_up.is_interleaved else self.gate_up.n

    def first(self, x: Activations, routing: Routing) -> Tensor:
        """[rows, 2 * I], or the product [rows, I]."""
        raise NotImplementedError

    def second(self, x: Activations, routing: Routing) -> Tensor:
        """[rows, H]."""
        raise NotImplementedError

    def dispatch(self, hidden: Tensor, ids: Tensor) -> tuple[Routing, Activations]:
        """Rows in expert order."""
        routing = None if ids.numel() <= MAX_RANKED_IDS else self.steps.route(ids)
        return self.steps.gather(hidden, ids, routing, for_swiglu=True)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As MoELayer.forward."""
        routing, x = self.dispatch(hidden, ids)
        product = self.product(self.first(x, routing), routing)
        return self.steps.combine(self.second(product, routing), routing, weights)

    def product(self, gate_up: Tensor, routing: Routing) -> Activations:
        """What the second GEMM reads."""
        if self.gate_up.is_interleaved:
            return self.steps.quantize(gate_up, routing)
        return self.steps.swiglu(gate_up, routing)

    def prefixes(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Callable[[], object]]:
        """The layer up to each part, so that a part's time is its prefix's less the one before."""

        def up_to_first() -> tuple[Routing, Tensor]:
            routing, x = self.dispatch(hidden, ids)
            return routing, self.first(x, routing)

        def up_to_swiglu() -> tuple[Routing, Activations]:
            routing, gate_up = up_to_first()
            return routing, self.product(gate_up, routing)

        def up_to_second() -> Tensor:
            routing, product = up_to_swiglu()
            return self.second(product, routing)

        parts: tuple[Callable[[], object], ...] = (
            lambda: self.dispatch(hidden, ids),
            up_to_first,
            up_to_swiglu,
            up_to_second,
            lambda: self(hidden, ids, weights),
        )
        return dict(zip(self.PARTS, parts, strict=True))


class OneLaunch(SteppedLayer):
    """MoELayer with all its steps fused, part by part; with SwiGLU in the epilogue where gate_up is interleaved."""

    def __init__(
        self, gate_up: Experts, down: Experts, library: KernelLibrary, *, overlap: bool, prefetch: bool
    ) -> None:
        super().__init__(gate_up, down, library, overlap=overlap)
        self._library, self.prefetch = library, prefetch

    def first(self, x: Activations, routing: Routing) -> Tensor:
        """One launch."""
        swiglu = self.gate_up.is_interleaved
        kernel = self._library.best(self.gate_up, x.num_tokens, swiglu=swiglu, overlap=self.overlap)
        return kernel(x, self.gate_up, routing.offsets)

    def second(self, x: Activations, routing: Routing) -> Tensor:
        """One launch."""
        kernel = self._library.best(self.down, x.num_tokens, overlap=self.overlap, prefetch=self.prefetch)
        return kernel(x, self.down, routing.offsets)


class LaunchPerScheme(SteppedLayer):
    """The same experts, a launch a scheme: one after the other, or each on a stream of its own, where launches do not
    overlap otherwise.
    """

    def __init__(
        self,
        gate_up: Experts,
        down: Experts,
        library: KernelLibrary,
        streams: Sequence[torch.cuda.Stream] = (),
        *,
        overlap: bool,
        prefetch: bool,
    ) -> None:
        super().__init__(gate_up, down, library, overlap=overlap and not streams)
        self.prefetch = prefetch and not streams
        self._library, self._streams = library, tuple(streams)
        self.shares = {
            linear: [SchemeShare(whole, index) for index in range(len(whole.stacks))]
            for linear, whole in ((Linear.GATE_UP, gate_up), (Linear.DOWN, down))
        }

    def first(self, x: Activations, routing: Routing) -> Tensor:
        """A launch a scheme."""
        return self._all(Linear.GATE_UP, x, routing)

    def second(self, x: Activations, routing: Routing) -> Tensor:
        """A launch a scheme."""
        return self._all(Linear.DOWN, x, routing)

    def _all(self, linear: Linear, x: Activations, routing: Routing) -> Tensor:
        shares = self.shares[linear]
        swiglu = shares[0].is_interleaved
        columns = shares[0].n // 2 if swiglu else shares[0].n
        y = torch.empty(x.num_tokens, columns, dtype=torch.bfloat16, device=routing.offsets.device)
        main = torch.cuda.current_stream()
        for index, share in enumerate(shares):
            stream = self._streams[index] if self._streams else main
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                kernel = self._library.best(
                    share,
                    x.num_tokens,
                    swiglu=swiglu,
                    overlap=self.overlap,
                    prefetch=self.prefetch and linear is Linear.DOWN,
                )
                kernel(x, share, routing.offsets, out=y)
        for stream in self._streams[: len(shares)]:
            main.wait_stream(stream)
        return y


class DenseLayer(SteppedLayer):
    """Somebody else's bf16 GEMM between our steps."""

    def __init__(
        self,
        experts: tuple[Experts, Experts],
        library: KernelLibrary,
        dense: tuple[Tensor, Tensor],
        gemms: Sequence[Gemm],
        *,
        overlap: bool,
    ) -> None:
        super().__init__(*experts, library, overlap=overlap)
        self._dense, self._gemms = dense, tuple(gemms)

    def first(self, x: Activations, routing: Routing) -> Tensor:
        """Theirs."""
        return self._gemms[0](x.tensors[0], self._dense[0], routing.offsets)

    def second(self, x: Activations, routing: Routing) -> Tensor:
        """Theirs."""
        return self._gemms[1](x.tensors[0], self._dense[1], routing.offsets)


def torch_gemm(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """torch._grouped_mm."""
    return grouped_bf16(x, weights, offsets[1:])


def torch_layer(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer in torch's operators around torch._grouped_mm; dense gate_up [E, 2 * I, H], down [E, H, I]."""
    tokens, top_k = ids.shape
    in_order, order = ids.flatten().sort(stable=True)
    experts = torch.arange(gate_up.shape[0], device=ids.device)
    ends = torch.searchsorted(in_order, experts, right=True).to(torch.int32)
    gate, up = grouped_bf16(hidden[order // top_k], gate_up, ends).chunk(2, dim=1)
    y = grouped_bf16(torch.nn.functional.silu(gate) * up, down, ends)
    scattered = torch.empty_like(y)
    scattered[order] = y
    return (scattered.view(tokens, top_k, -1).float() * weights[..., None]).sum(1).to(torch.bfloat16)
