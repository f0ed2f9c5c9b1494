"""The analytic core: latency of grouped-GEMM launches from facts alone, no measurement.

A launch is a persistent grid: CTA i takes tiles i, i + grid, ... of the tile list, whose slow schemes come first. Per
tile, the time follows from what each resource of an SM must do for the CTAs that share it; the launch ends when CTA 0
(it has the longest tile of every round) does, or when DRAM has delivered every byte, and a launch floor and the
pipeline's first fill come on top:

    latency = floor + fill + || makespan, DRAM time ||

where ||.|| is a p-norm: never below either, equal to the larger when one dominates. Little's law is inside the
makespan: an iteration cannot be shorter than DRAM's latency over the stages in flight. Rows are independent and
everything is numpy, thousands of launches at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.constants import DEFAULT_CONSTANTS, SMEM_BYTES_PER_CLOCK, SUB_PARTITIONS_PER_SM, AnalyticConstants
from costmodel.facts import BuildFacts
from costmodel.launches import FLOPS_PER_MMA_K1, Launch, LaunchTable
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec, Math
from profiles.kernels import GemmShape, KernelConfig
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyBreakdown:
    """Where one launch's time goes.

    `latency_us` = `launch_us` + `fill_us` + the p-norm of `makespan_us` and `dram_us`. `tensor_us` to `fetch_us` are
    what the makespan would be if that were the only resource; `roofline_us` is the bound no kernel can beat: bytes
    once over the data sheet's bandwidth, flops without padding over the data sheet's rate. `padding` is multiplied
    over useful flops, `dram_bytes` what is moved, re-reads included.
    """

    latency_us: float
    launch_us: float
    fill_us: float
    makespan_us: float
    dram_us: float
    tensor_us: float
    issue_us: float
    smem_us: float
    l2_us: float
    chain_us: float
    fetch_us: float
    epilogue_us: float
    roofline_us: float
    dram_bytes: float
    flops: float
    padding: float
    num_tiles: float
    waves: float

    @property
    def bound(self) -> str:
        """The largest part: "dram", or the resource that the makespan waits for most."""
        if self.dram_us >= self.makespan_us:
            return "dram"
        names = ("tensor", "issue", "smem", "l2", "chain", "fetch")
        return max(names, key=lambda name: getattr(self, f"{name}_us"))


BREAKDOWN_COLUMNS = tuple(field.name for field in dataclasses.fields(LatencyBreakdown))
"""Columns of what `launch_latencies` returns, in order."""


ROWS_AT_ONCE = 1 << 14


def launch_latencies(
    gpu: GpuSpec, launches: Sequence[Launch], constants: AnalyticConstants = DEFAULT_CONSTANTS
) -> pd.DataFrame:
    """One row of `BREAKDOWN_COLUMNS` per launch, in order; 1 without tokens costs the floor alone.

    UnsupportedError if a scheme's math has no tensor cores on `gpu`.
    """
    return solve(gpu, LaunchTable.of(launches), constants)


def launch_latency(
    gpu: GpuSpec,
    shape: GemmShape,
    load: TokenLoad,
    schemes: Sequence[QuantScheme],
    config: KernelConfig,
    facts: BuildFacts,
    constants: AnalyticConstants = DEFAULT_CONSTANTS,
) -> LatencyBreakdown:
    """One launch. `schemes` holds one scheme per expert, or one for all; `shape`'s n and k are an expert's, its m is
    not read (the load says it).
    """
    launch = Launch(shape=shape, load=load, schemes=tuple(schemes), config=config, facts=facts)
    row = launch_latencies(gpu, [launch], constants).iloc[0]
    return LatencyBreakdown(**{name: float(row[name]) for name in BREAKDOWN_COLUMNS})


def marginal_expert_cost(
    gpu: GpuSpec,
    shape: GemmShape,
    scheme: QuantScheme,
    config: KernelConfig,
    facts: BuildFacts,
    tokens: Sequence[int],
    constants: AnalyticConstants = DEFAULT_CONSTANTS,
) -> Array:
    """Microseconds that one more expert with these tokens adds to a launch that already fills the GPU: what an
    allocator sums. [len(tokens)].

    The expert's share of the machine: its tiles over all resident CTAs, against its bytes over the bandwidth. No
    floor, no wave rounding; zero for no tokens, and never decreasing in tokens.
    """
    loads = [TokenLoad(tokens_per_expert=(int(count),), source="marginal") for count in tokens]
    table = LaunchTable.of(
        [Launch(shape=shape, load=load, schemes=(scheme,), config=config, facts=facts) for load in loads]
    )
    terms = _Terms(gpu, table, constants)
    full = terms.tile_us(table.ctas_per_sm[:, None])
    share = (full.total * table.num_tiles).sum(axis=1) / (gpu.num_sms * table.ctas_per_sm)
    return np.asarray(_norm([share, terms.dram_us()], constants.overlap_squarings), dtype=np.float64)


def solve(gpu: GpuSpec, table: LaunchTable, constants: AnalyticConstants = DEFAULT_CONSTANTS) -> pd.DataFrame:
    """`launch_latencies` over launches already in columns, in blocks that stay in the CPU's cache."""
    starts = range(0, len(table), ROWS_AT_ONCE)
    blocks = [_solve_block(gpu, table.rows(start, start + ROWS_AT_ONCE), constants) for start in starts]
    if not blocks:
        return pd.DataFrame({name: np.empty(0) for name in BREAKDOWN_COLUMNS})
    return pd.DataFrame({name: np.concatenate([block[name] for block in blocks]) for name in BREAKDOWN_COLUMNS})


def _solve_block(gpu: GpuSpec, table: LaunchTable, constants: AnalyticConstants) -> dict[str, Array]:
    """The columns of some launches."""
    terms = _Terms(gpu, table, constants)
    ctas = table.ctas_per_sm[:, None]
    full = terms.tile_us(ctas)
    order = np.argsort(-np.where(table.num_tiles > 0, full.total, -1.0), axis=1, kind="stable")
    tiles = np.take_along_axis(table.num_tiles, order, axis=1)
    slots = gpu.num_sms * table.ctas_per_sm
    total_tiles = tiles.sum(axis=1)
    rounds = np.floor(total_tiles / slots)
    rest = total_tiles - rounds * slots
    # A last, partial round shares each SM among fewer CTAs.
    last = terms.tile_us(np.maximum(np.ceil(rest / gpu.num_sms), 1.0)[:, None])
    weights_full, weights_last = _rounds_by_slot(tiles, slots, rounds, rest)

    def makespan(name: str) -> Array:
        by_slot = np.take_along_axis(getattr(full, name), order, axis=1) * weights_full
        by_slot += np.take_along_axis(getattr(last, name), order, axis=1) * weights_last
        return np.asarray(by_slot.sum(axis=1), dtype=np.float64)

    busy = total_tiles > 0
    parts = {name: makespan(name) for name in ("tensor", "issue", "smem", "l2", "chain", "fetch", "epilogue")}
    total, dram = makespan("total"), terms.dram_us()
    fill = np.where(busy, terms.fill_us(), 0.0)
    flops, multiplied = terms.flops(), terms.multiplied_flops()
    return {
        "latency_us": constants.launch_floor_us + fill + _norm([total, dram], constants.overlap_squarings),
        "launch_us": np.full(len(table), constants.launch_floor_us),
        "fill_us": fill,
        "makespan_us": total,
        "dram_us": dram,
        **{f"{name}_us": value for name, value in parts.items()},
        "roofline_us": terms.roofline_us(),
        "dram_bytes": terms.dram_bytes(),
        "flops": flops,
        "padding": np.where(busy, multiplied / np.maximum(flops, 1.0), 1.0),
        "num_tiles": total_tiles,
        "waves": total_tiles / slots,
    }


def _rounds_by_slot(tiles: Array, slots: Array, rounds: Array, rest: Array) -> tuple[Array, Array]:
    """How many full rounds of CTA 0, and whether its last partial one, fall to each slot of the sorted tile list: two
    [R, S] arrays.

    CTA 0's round r takes tile r * slots; a slot owns the tiles between its cumulative counts.
    """
    ends = np.cumsum(tiles, axis=1)
    begins = ends - tiles
    up_to_end = np.minimum(np.ceil(ends / slots[:, None]), rounds[:, None])
    up_to_begin = np.minimum(np.ceil(begins / slots[:, None]), rounds[:, None])
    first_of_last = (rounds * slots)[:, None]
    holds_last = (begins <= first_of_last) & (first_of_last < ends) & (rest > 0)[:, None]
    return up_to_end - up_to_begin, holds_last.astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TileTime:
    """Microseconds of one tile, [R, S]: all together, and each resource alone."""

    total: Array
    tensor: Array
    issue: Array
    smem: Array
    l2: Array
    chain: Array
    fetch: Array
    epilogue: Array


class _Terms:
    """The model's terms for one GPU over a table of launches; every array is [R, S] (launches, slots) or [R]."""

    def __init__(self, gpu: GpuSpec, table: LaunchTable, constants: AnalyticConstants) -> None:
        self.gpu, self.table, self.constants = gpu, table, constants
        self.clocks_per_us = gpu.boost_clock_mhz
        self.flops_per_clock_per_sm = self._tensor_rates(sheet=False)
        active_sms = np.clip(table.num_tiles.sum(axis=1), 1.0, gpu.num_sms)
        l2 = constants.of(constants.l2_bytes_per_clock_per_sm, gpu.compute_capability)
        # Few busy SMs may each draw more than their share, up to the 64 bytes a clock of an SM's port.
        self.l2_bytes_per_clock = np.minimum(64.0, l2 * gpu.num_sms / active_sms)[:, None]
        self.latency_clocks = constants.of(constants.dram_latency_cycles, gpu.compute_capability)

    def _tensor_rates(self, *, sheet: bool) -> Array:
        """Multiply-add operations (2 each) a clock and SM of each slot's math, [R, S]; `sheet`: the data sheet's, not
        what the family reaches.
        """
        gpu, table = self.gpu, self.table
        rates = np.full(len(Math), np.nan)
        for index, math in enumerate(Math):
            if math in gpu.tensor_tops:
                rates[index] = gpu.tensor_tops[math] * 1e6 / (gpu.num_sms * gpu.boost_clock_mhz)
        missing = [
            math.value
            for index, math in enumerate(Math)
            if np.isnan(rates[index]) and bool(np.any(table.math_index[table.used] == index))
        ]
        if missing:
            raise UnsupportedError(
                f"a latency on {gpu.name}",
                [
                    f"no {math} tensor cores on sm_{gpu.compute_capability[0]}{gpu.compute_capability[1]} ({gpu.name})"
                    for math in missing
                ],
            )
        by_slot = np.nan_to_num(rates, nan=1.0)[table.math_index]
        if sheet:
            return np.asarray(by_slot, dtype=np.float64)
        fraction = self.constants.of(self.constants.mma_sync_fraction, gpu.compute_capability)
        return np.asarray(by_slot * np.where(table.is_mma_family[:, None], fraction, 1.0), dtype=np.float64)

    def tile_us(self, ctas: Array) -> _TileTime:
        """One tile's time when `ctas` CTAs ([R, 1]) share the SM."""
        t, c = self.table, self.constants
        schedulers = np.minimum(ctas * t.num_warps[:, None], float(SUB_PARTITIONS_PER_SM))
        issue_rate = schedulers * c.issue_fraction
        iterations = t.num_k_tiles
        tensor_clocks = (
            t.k_tile_mmas
            * t.mma_k
            * FLOPS_PER_MMA_K1
            / self.flops_per_clock_per_sm
            * SUB_PARTITIONS_PER_SM
            / schedulers
        )
        mma_clocks = t.mma_k * FLOPS_PER_MMA_K1 / self.flops_per_clock_per_sm * SUB_PARTITIONS_PER_SM
        chain_clocks = c.k_tile_sync_cycles + t.k_steps * np.maximum(
            c.mma_latency_cycles, t.mmas_per_k_step_of_a_warp * mma_clocks
        )
        fetch_clocks = self.latency_clocks * c.loaded_latency_factor / np.maximum(t.num_stages - 1.0, 1.0)[:, None]
        clocks = {
            "tensor": ctas * tensor_clocks * iterations,
            "issue": ctas * t.k_tile_instructions / issue_rate * iterations,
            "smem": ctas * t.k_tile_smem_bytes / SMEM_BYTES_PER_CLOCK * iterations,
            "l2": ctas * t.k_tile_bytes / self.l2_bytes_per_clock * iterations,
            "chain": chain_clocks * iterations,
            "fetch": fetch_clocks * iterations,
        }
        epilogue = (
            ctas * (t.epilogue_instructions / issue_rate + t.output_bytes / self.l2_bytes_per_clock)
            + c.tile_overhead_cycles
        )
        total = _norm(list(clocks.values()), c.overlap_squarings) + epilogue
        per_us = {name: np.broadcast_to(value, total.shape) / self.clocks_per_us for name, value in clocks.items()}
        return _TileTime(total=total / self.clocks_per_us, epilogue=epilogue / self.clocks_per_us, **per_us)

    def dram_bytes(self) -> Array:
        """Bytes from and to DRAM, [R]: every active expert's weights and every token once, outputs, and the re-reads
        that L2 does not hold.

        Walking along tokens, neighbours share the weights and each block of features reads the expert's tokens again;
        along features, each block of tokens reads the expert's weights again. A re-read misses by the share of the
        operand that does not fit the usable part of L2.
        """
        t = self.table
        usable = self.gpu.l2_bytes * self.constants.l2_usable_fraction

        def missing(operand_bytes: Array) -> Array:
            return np.asarray(np.clip(1.0 - usable / np.maximum(operand_bytes, 1.0), 0.0, 1.0), dtype=np.float64)

        token_bytes = t.num_tokens * t.token_bytes
        token_rereads = token_bytes * (t.num_feature_tiles[:, None] - 1.0) * missing(t.max_tokens * t.token_bytes)
        weight_rereads = (t.num_token_tiles - t.num_active) * t.expert_weight_bytes * missing(t.expert_weight_bytes)
        rereads = np.where(t.is_along_tokens[:, None], token_rereads, weight_rereads)
        return np.asarray((self._minimum_bytes() + rereads).sum(axis=1), dtype=np.float64)

    def _minimum_bytes(self) -> Array:
        t = self.table
        outputs = 2.0 * t.num_tokens * t.n[:, None]
        return np.asarray(
            t.num_active * t.expert_weight_bytes + t.num_tokens * t.token_bytes + outputs, dtype=np.float64
        )

    def dram_us(self) -> Array:
        """Time of the bytes at the bandwidth that streaming reaches, [R]."""
        return self.dram_bytes() / (self.gpu.dram_gbps * 1e3 * self.constants.dram_efficiency)

    def flops(self) -> Array:
        """Useful operations, 2 a multiply-add, [R]."""
        t = self.table
        return np.asarray((2.0 * t.num_tokens * t.n[:, None] * t.k[:, None]).sum(axis=1), dtype=np.float64)

    def multiplied_flops(self) -> Array:
        """Operations that the tensor cores are given, padding included, [R]."""
        t = self.table
        return np.asarray(
            (t.num_tiles * t.num_k_tiles * t.k_tile_mmas * t.mma_k * FLOPS_PER_MMA_K1).sum(axis=1), dtype=np.float64
        )

    def roofline_us(self) -> Array:
        """Larger of bytes over the data sheet's bandwidth and flops over its rates, [R]."""
        t, gpu = self.table, self.gpu
        memory = self._minimum_bytes().sum(axis=1) / (gpu.dram_gbps * 1e3)
        clocks = 2.0 * t.num_tokens * t.n[:, None] * t.k[:, None] / (self._tensor_rates(sheet=True) * gpu.num_sms)
        return np.asarray(np.maximum(memory, clocks.sum(axis=1) / self.clocks_per_us), dtype=np.float64)

    def fill_us(self) -> Array:
        """Tile table and the first stage's way from DRAM, [R]."""
        c = self.constants
        return np.asarray(
            (c.prologue_cycles + c.prologue_cycles_per_expert * self.table.num_experts) / self.clocks_per_us,
            dtype=np.float64,
        )


@functools.cache
def model_version() -> str:
    """Names this analytic model by its sources: tables of other formulas or constants have another version."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("analytic", "constants", "launches", "occupancy", "work"):
        digest.update((folder / f"{name}.py").read_bytes())
    return f"analytic-{digest.hexdigest()[:12]}"


def _norm(parts: Sequence[Array], squarings: int) -> Array:
    """p-norm of non-negative parts, elementwise, p = 2 ** squarings: at least the largest, at most their sum."""
    largest = functools.reduce(np.maximum, parts)
    scale = np.where(largest > 0, largest, 1.0)
    total = np.zeros(scale.shape)
    for part in parts:
        power = part / scale
        for _ in range(squarings):
            power = np.square(power)
        total += power
    for _ in range(squarings):
        total = np.sqrt(total)
    return np.asarray(scale * total, dtype=np.float64)
