"""The analytic model's physical numbers that a GpuSpec does not hold. None of them is fitted to this project's
measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from profiles.gpus import Math

SUB_PARTITIONS_PER_SM = 4
"""Warp schedulers, each with its tensor core; every architecture since Volta."""
SMEM_BYTES_PER_CLOCK = 128
"""32 banks of 4 bytes; CUDA C++ Programming Guide, "Shared Memory"."""
WGMMA_ROWS = 64
"""Rows of a wgmma; its four warps take 16 each."""
WGMMA_MIN_TOKENS = 32
"""A wgmma of fewer tokens takes as long as one of these: its A fragment, 2 KiB, goes from the registers to the tensor
cores at 128 bytes a clock, the time of 32 tokens. A guess from that; published, full rate needs 64 with A in shared
memory (arXiv 2402.13499)."""
MMA_SYNC_IN_WGMMAS = 0.80 / 0.62
"""Tensor time of an mma.sync on Hopper in that of a wgmma's same work: the shares of the data sheet's rate below."""
FEW_STAGES, PRODUCER_WARPS = 4, (4, 2)
"""wgmma family: warps that copy k-tiles in turn, with so many stages and with fewer."""
MMA_K = MappingProxyType({Math.BF16: 16, Math.INT8: 32, Math.E4M3: 32, Math.INT4: 64})
"""k of one m16n8 mma.sync, and of one wgmma (PTX ISA, "Matrix shape")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticConstants:
    """Physical numbers of the analytic model. Mappings go by compute capability ("8.9") or its major ("8"); the
    longer key wins.
    """

    launch_floor_us: float = 4.8
    """An empty kernel in a CUDA graph, start to start; measured on an H200, 2026-11-23. Taken for every card."""

    dram_efficiency: float = 0.93
    """Streaming read over the data sheet's bandwidth. H200: 4445 to 4689 of 4800 GB/s by the reading kernel,
    2026-11-23."""

    dram_latency_cycles: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"8": 470.0, "8.9": 540.0, "9": 480.0, "12": 600.0})
    )
    """Load to use, SM clocks: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (arXiv
    2402.13499), A100, RTX 4090, H100. 12 is a guess from the same ratio of clocks."""

    loaded_latency_factor: float = 1.6
    """Queueing when DRAM is near its limit: a guess, between the idle latency (1) and about 2 at saturation."""

    l2_bytes_per_clock_per_sm: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"8": 32.0, "8.6": 20.0, "8.9": 16.0, "9": 36.0, "12": 18.0})
    )
    """Sustained by all SMs at once. RTX 4090 about 5 TB/s and H100 PCIe up to 7 TB/s (Chips and Cheese, 2022-11 and
    2023-07) over SMs x clock; the others are guesses between those and the 64 bytes a clock of one SM alone. 9 is not
    less than what a launch moved on an H200: w16a16, tile 256x128, 5.2 GB of stages in 611 us (2026-11-24)."""

    l2_usable_fraction: float = 0.5
    """Share of L2 that a re-read operand can count on; H100's L2 is two halves, and outputs stream through. A guess."""

    mma_sync_fraction: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"8": 0.95, "9": 0.62, "12": 0.95})
    )
    """Of the data sheet's tensor rate, what warp-level mma.sync reaches: 62% on Hopper, whose peak needs wgmma (arXiv
    2402.13499); near all elsewhere."""

    wgmma_fraction: Mapping[Math, float] = field(
        default_factory=lambda: MappingProxyType({Math.BF16: 0.80, Math.INT8: 0.76, Math.E4M3: 0.76})
    )
    """Of the data sheet's tensor rate, what the card holds under its power limit: cuBLAS' 8192^3 GEMMs on an H200, 795
    and 1505 TFLOP/s (profiles/gpus.py). INT8 as E4M3: cuBLAS' own int8 kernel stays below what the card can."""

    issue_fraction: float = 0.7
    """Of a scheduler's one instruction a clock, what a mix with dependences and barriers reaches. A guess; 0.6 to 0.8
    is usual in profiles."""

    dependent_issue_cycles: float = 3.0
    """A warp's own instructions, one after another, however many warps share the scheduler: 4 clocks from an arithmetic
    instruction to one that needs it (Jia et al., arXiv 1804.06826, and every architecture since), less for those that
    need nothing. A guess between."""

    mma_latency_cycles: float = 33.0
    """Dependent m16n8k16 to m16n8k16: 32 to 35 clocks on A100, Ada and Hopper (arXiv 2402.13499)."""

    k_tile_sync_cycles: float = 90.0
    """cp.async wait, CTA barrier (about 30) and the first ldmatrix (about 30) and dequantisation before the first
    MMA. A guess from these parts."""

    tile_overhead_cycles: float = 300.0
    """Finding the next tile in the table and starting the epilogue: two shared-memory searches and an address
    computation. A guess."""

    wgmma_wait_cycles: float = 90.0
    """wgmma family, a k-tile: seeing the stage's barrier and the first packed words in registers. A guess."""

    wgmma_drain_cycles: float = 120.0
    """wgmma family: waiting for the last wgmma's sums, from issue to registers: 128 clocks for 256 tokens, less for
    fewer (arXiv 2402.13499)."""

    producer_k_tile_cycles: float = 600.0
    """wgmma family: a producer warp sees an empty stage, expects its bytes and starts up to four copies. From H200 runs
    with one and with four producers, 2026-11-24 (docs/kernels.md)."""

    wgmma_store_cycles: float = 40.0
    """wgmma family: one token row's bulk store, which the lanes of a warp start in turn: nine instructions, three of
    them moves to uniform registers. A guess from that."""

    sm_to_sm_latency_cycles: float = 180.0
    """Load to use in another SM's shared memory within a cluster: H100, arXiv 2402.13499."""

    sm_to_sm_bytes_per_clock: float = 14.0
    """Into one SM's shared memory, clusters of two: 3.27 TB/s over all SMs of an H100 (arXiv 2402.13499)."""

    prologue_cycles: float = 2500.0
    """Tile table: two dependent global reads, a scan over the experts, barriers; then the first stage from DRAM. A
    guess from the parts."""

    prologue_cycles_per_expert: float = 4.0
    """The scan's share of an expert. A guess."""

    uneven_ctas: float = 1.0
    """In a last, partial round that is not the first, some SM has so many CTAs more than their mean over SMs, if it
    holds as many. Of 0, 0.5, 1, 1.5 and as many as fit, 1 explained 2,521 launches of the wgmma family on an H200 best
    (2026-11-24). In the first round CTAs go to one SM after another, so that some SM has the mean rounded up."""

    uneven_widths: float = 1.0
    """Where an expert's last tile may be narrower, CTAs get wide ones as by lot, and the launch ends with the CTA that
    has most: so many standard deviations above the mean. Of 0, 0.6, 1, 1.3 and 2, 1 explained an H200's launches best
    (2026-11-24)."""

    overlap_squarings: int = 2
    """Resources work at the same time but not perfectly: times combine as a p-norm, p = 1 in turn, infinity perfectly.
    p is 2 to this power, so that the norm needs squares and roots only: 4, a guess.
    """

    dram_overlap_squarings: int = 3
    """All of DRAM's traffic against all else, beside its share in each round: p = 8, a guess."""

    wgmma_overlap_squarings: int = 3
    """The same within an SM of the wgmma family, where copies, tensor cores and stores are asynchronous: p = 8, a
    guess."""

    def of(self, table: Mapping[str, float], compute_capability: tuple[int, int]) -> float:
        """The entry for a GPU: "major.minor" if there is one, else "major", else the newest major below."""
        major, minor = compute_capability
        exact = table.get(f"{major}.{minor}")
        if exact is not None:
            return exact
        known = sorted(int(key) for key in table if "." not in key)
        return table[str(max((key for key in known if key <= major), default=known[0]))]


DEFAULT_CONSTANTS = AnalyticConstants()
