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

from costmodel.columns import LAST_PARTS, STREAMING
from costmodel.constants import DEFAULT_CONSTANTS, AnalyticConstants
from costmodel.facts import BuildFacts
from costmodel.launches import Launch, LaunchTable
from costmodel.rounds import Rounds
from costmodel.terms import Terms
from costmodel.tiles import TileCosts, TileTable, norm, shared_time
from profiles.gpus import GpuSpec
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
    warp_us: float
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
        names = ("tensor", "issue", "smem", "l2", "chain", "warp", "fetch")
        return max(names, key=lambda name: getattr(self, f"{name}_us"))


BREAKDOWN_COLUMNS = tuple(field.name for field in dataclasses.fields(LatencyBreakdown))
"""Columns of what `launch_latencies` returns, in order."""


SOURCES = ("analytic", "constants", "launches", "occupancy", "rounds", "splits", "terms", "tiles", "work")
"""Modules that decide a latency."""
ROWS_AT_ONCE = 1 << 14


def launch_latencies(
    gpu: GpuSpec, launches: Sequence[Launch], constants: AnalyticConstants = DEFAULT_CONSTANTS
) -> pd.DataFrame:
    """One row of `BREAKDOWN_COLUMNS` per launch, in order; 1 without tokens costs the floor alone.

    UnsupportedError if a scheme's math has no tensor cores on `gpu`.
    """
    columns = solve_columns(gpu, LaunchTable.of(launches), TileCosts.of(gpu, launches, constants), constants)
    return pd.DataFrame({name: columns[name] for name in BREAKDOWN_COLUMNS})


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
    launches = [Launch(shape=shape, load=load, schemes=(scheme,), config=config, facts=facts) for load in loads]
    table, tiles = LaunchTable.of(launches), TileTable.of(launches)
    full = shared_time(gpu, tiles, constants).at(table.ctas_per_sm)[0]
    share = (full * table.num_tiles).sum(axis=1) / (gpu.num_sms * table.ctas_per_sm)
    dram_us = Terms(gpu, table, constants).dram_us()
    return np.asarray(norm([share, dram_us], constants.overlap_squarings), dtype=np.float64)


def solve_columns(
    gpu: GpuSpec, table: LaunchTable, tiles: TileCosts, constants: AnalyticConstants = DEFAULT_CONSTANTS
) -> dict[str, Array]:
    """`BREAKDOWN_COLUMNS` as arrays [R], and `costmodel.columns`' LAST_PARTS and STREAMING, in blocks that stay in the
    CPU's cache. `tiles` are those of the table's launches.
    """
    if 0 < len(table) <= ROWS_AT_ONCE:
        return _solve_block(gpu, table, tiles, constants)
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(table), ROWS_AT_ONCE)]
    blocks = [_solve_block(gpu, table.rows(rows), tiles.take(rows), constants) for rows in parts]
    if not blocks:
        return {name: np.empty(0) for name in (*BREAKDOWN_COLUMNS, *LAST_PARTS, *STREAMING)}
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _solve_block(gpu: GpuSpec, table: LaunchTable, tiles: TileCosts, constants: AnalyticConstants) -> dict[str, Array]:
    """The columns of some launches."""
    terms = Terms(gpu, table, constants)
    rounds = Rounds(terms, tiles)
    parts, streaming = rounds.parts(), rounds.streaming()
    busy, is_mixed, dram_bytes = rounds.num_tiles > 0, table.used.sum(axis=1) > 1, terms.dram_bytes()
    makespan = rounds.makespan(lambda a, b: norm([a, b], constants.overlap_squarings))
    dram = terms.dram_us_of(dram_bytes)
    fill = np.where(busy, terms.fill_us(), 0.0)
    flops, multiplied = terms.flops(), terms.multiplied_flops()
    return {
        "latency_us": constants.launch_floor_us + fill + norm([makespan, dram], constants.dram_overlap_squarings),
        "launch_us": np.full(len(table), constants.launch_floor_us),
        "fill_us": fill,
        "makespan_us": parts.pop("total").total,
        "dram_us": dram,
        **{f"{name}_us": part.total for name, part in parts.items()},
        "roofline_us": terms.roofline_us(tiles.sheet_rates),
        "dram_bytes": dram_bytes,
        "flops": flops,
        "padding": np.where(busy, multiplied / np.maximum(flops, 1.0), 1.0),
        "num_tiles": rounds.num_tiles,
        "waves": rounds.num_tiles / rounds.resident,
        **{f"last_{name}_us": np.where(is_mixed, 0.0, part.last) for name, part in parts.items()},
        "full_rounds": streaming.full_rounds,
        "stream_rounds": streaming.rounds,
        "stream_round_us": streaming.round_us,
        "stream_rest_us": streaming.rest_us,
        "stream_rest_is_last": streaming.is_rest_last,
    }


@functools.cache
def model_version() -> str:
    """Names this analytic model by its sources: tables of other formulas or constants have another version."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / f"{name}.py").read_bytes())
    return f"analytic-{digest.hexdigest()[:12]}"
