"""The least time of a grouped GEMM on the card that the peers were measured on.

roofline = max(minimum bytes / read bandwidth, operations / peak). Minimum bytes: the packed weights and scales of the
experts that have tokens, activations and bf16 outputs, once each. Nothing is padded: padding counts against a kernel.
Bandwidth and peaks were measured on one H200 on 2026-11-23: a streaming read, and cuBLAS products of 8192^3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from profiles.errors import UnsupportedError
from profiles.gpus import Math
from profiles.schemes import QuantScheme

OUTPUT_BYTES = 2
TOKEN_SCALE_BYTES = 4
PEER_LAUNCH_FLOOR_US = 4.8
"""In every time of a peer: one launch a graph replay. Our graphs hold many launches: little of it is in ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU's measured limits: `read_gbps` of DRAM in GB/s, `peak_tops` in 10^12 operations a second."""

    gpu: str
    read_gbps: float
    peak_tops: Mapping[Math, float]
    l2_bytes: int


H200 = Card(
    gpu="h200",
    read_gbps=4689.0,
    peak_tops=MappingProxyType({Math.BF16: 795.0, Math.E4M3: 1505.0, Math.INT8: 1151.0}),
    l2_bytes=50 << 20,
)


class PeerClass(Enum):
    """What peers are compared within: bits of weights and activations, whatever the groups and zero points."""

    BF16 = "bf16"
    W8A16 = "w8a16"
    W4A16 = "w4a16"
    W2A16 = "w2a16"
    W8A8_FP8 = "w8a8-fp8"
    W8A8_INT8 = "w8a8-int8"
    W4A8_FP8 = "w4a8-fp8"
    W4A8_INT8 = "w4a8-int8"


def peer_class(scheme: QuantScheme) -> PeerClass | None:
    """The class of a scheme; None where no public kernel was measured (3-bit weights, 4-bit activations)."""
    weights, tokens = scheme.weight_bits, scheme.activation_bits
    if weights == tokens == 16:
        return PeerClass.BF16
    suffix = {Math.E4M3: "-fp8", Math.INT8: "-int8"}.get(scheme.math, "")
    name = f"w{weights}a{tokens}{suffix}"
    return next((found for found in PeerClass if found.value == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """One launch's limits. `min_bytes` are moved at least, `flops` are useful operations; the larger of the two times
    is the roofline.
    """

    min_bytes: float
    flops: float
    memory_us: float
    compute_us: float

    @property
    def us(self) -> float:
        """The least time, microseconds."""
        return max(self.memory_us, self.compute_us)

    @property
    def is_memory_bound(self) -> bool:
        """Whether bytes take longer than operations."""
        return self.memory_us >= self.compute_us


def roofline(scheme: QuantScheme, n: int, k: int, tokens_per_expert: Sequence[int], card: Card = H200) -> Roofline:
    """The roofline of experts [n, k] of one scheme. UnsupportedError: the card's rate of that math is not known."""
    if scheme.math not in card.peak_tops:
        raise UnsupportedError(
            f"a roofline of {scheme.name}", [f"no {scheme.math.name} rate was measured on {card.gpu}"]
        )
    rows, active = sum(tokens_per_expert), sum(count > 0 for count in tokens_per_expert)
    token_bytes = k * scheme.activation_bits / 8 + (TOKEN_SCALE_BYTES if scheme.activation_bits < 16 else 0)
    min_bytes = active * n * k * scheme.bits_per_weight(k) / 8 + rows * (token_bytes + OUTPUT_BYTES * n)
    flops = 2.0 * rows * n * k
    return Roofline(
        min_bytes=min_bytes,
        flops=flops,
        memory_us=min_bytes / (1e3 * card.read_gbps),
        compute_us=flops / (1e6 * card.peak_tops[scheme.math]),
    )
