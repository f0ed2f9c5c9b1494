"""What one tile of a launch takes each resource of an SM, in microseconds, by how many CTAs share the SM. It depends on
the kernel, its schemes and its linear, not on tokens: `costmodel.features` works it out once for many loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.constants import (
    FEW_STAGES,
    MMA_K,
    PRODUCER_WARPS,
    SMEM_BYTES_PER_CLOCK,
    SUB_PARTITIONS_PER_SM,
    AnalyticConstants,
)
from costmodel.launches import FLOPS_PER_MMA_K1, Launch, column
from costmodel.work import narrowest_work, part_k_tiles, tile_work
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec, Math
from profiles.kernels import Family

Array = npt.NDArray[np.float64]
TILE_PARTS = ("total", "tensor", "issue", "smem", "l2", "chain", "warp", "fetch", "epilogue")
"""All together, and each resource alone: the first axis of what `TileCosts` holds."""
_MATH_INDEX = {math: index for index, math in enumerate(Math)}
_OF_WORK = (
    *("k_steps", "exposed_k_steps", "k_tile_mmas", "k_tile_tensor_mmas", "k_tile_instructions", "k_tile_smem_bytes"),
    *("k_tile_bytes", "instructions_of_a_warp", "mmas_per_k_step_of_a_warp", "serial_instructions_of_a_warp"),
    *("epilogue_instructions", "stores_in_turn", "output_bytes", "partial_sum_bytes"),
)
"""Columns that are fields of `TileWork`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTable:
    """One tile of each launch in columns: [R], or [R, S] with S slots; unused slots hold zeros and `used` is false.
    Fields from `k_steps` on are those of `costmodel.work.TileWork`. With split-K a CTA goes through `chain_k_tiles` of
    the tile's `num_k_tiles`.
    """

    ctas_per_sm: Array
    num_warps: Array
    num_stages: Array
    is_mma_family: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]
    math_index: npt.NDArray[np.intp]
    mma_k: Array
    num_k_tiles: Array
    chain_k_tiles: Array
    k_steps: Array
    exposed_k_steps: Array
    k_tile_mmas: Array
    k_tile_tensor_mmas: Array
    k_tile_instructions: Array
    k_tile_smem_bytes: Array
    k_tile_bytes: Array
    instructions_of_a_warp: Array
    mmas_per_k_step_of_a_warp: Array
    serial_instructions_of_a_warp: Array
    epilogue_instructions: Array
    stores_in_turn: Array
    output_bytes: Array
    partial_sum_bytes: Array

    @classmethod
    def of(cls, launches: Sequence[Launch], *, narrowest: bool = False) -> TileTable:
        """Tiles of full width, or of the narrowest that a launch's configuration has."""
        slots = [launch.slots() for launch in launches]
        shape = (len(launches), max((len(row) for row in slots), default=1))
        columns = {name: np.zeros(shape) for name in ("mma_k", "num_k_tiles", "chain_k_tiles", *_OF_WORK)}
        used, math_index = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.intp)
        for row, (launch, of_launch) in enumerate(zip(launches, slots, strict=True)):
            config, k = launch.config, launch.shape.k
            for slot, (scheme, _) in enumerate(of_launch):
                work = narrowest_work(config, scheme) if narrowest else tile_work(config, scheme)
                used[row, slot], math_index[row, slot] = True, _MATH_INDEX[scheme.math]
                columns["mma_k"][row, slot] = MMA_K[scheme.math]
                columns["num_k_tiles"][row, slot] = -(-k // work.k_tile)
                columns["chain_k_tiles"][row, slot] = part_k_tiles(scheme, k, config.split_k)
                for name in _OF_WORK:
                    columns[name][row, slot] = getattr(work, name)
        configs = [launch.config for launch in launches]
        return cls(
            ctas_per_sm=column([launch.facts.ctas_per_sm for launch in launches]),
            num_warps=column([config.warps.num_warps for config in configs]),
            num_stages=column([config.num_stages for config in configs]),
            is_mma_family=np.asarray([config.family is Family.MMA for config in configs], dtype=np.bool_),
            used=used,
            math_index=math_index,
            **columns,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedTime:
    """One tile's microseconds as a function of the CTAs on its SM: parts that all warps of the SM's schedulers share
    (tensor, issue, the epilogue's instructions), that all CTAs do (smem, l2, the epilogue's stores), and that a warp
    takes alone (chain, warp, fetch, the rest of the epilogue). [3 or 4, R, S]; `num_warps` and `squarings` [R].
    """

    by_schedulers: Array
    by_ctas: Array
    alone: Array
    num_warps: Array
    squarings: npt.NDArray[np.int_]

    def take(self, rows: npt.NDArray[np.intp] | slice) -> SharedTime:
        """Some of the launches."""
        return SharedTime(
            by_schedulers=self.by_schedulers[:, rows],
            by_ctas=self.by_ctas[:, rows],
            alone=self.alone[:, rows],
            num_warps=self.num_warps[rows],
            squarings=self.squarings[rows],
        )

    def at(self, ctas: Array) -> Array:
        """Microseconds with `ctas` [R] CTAs on the SM, [len(TILE_PARTS), R, S]."""
        # Each of a CTA's instructions takes a turn of one of the schedulers that its SM's warps keep busy.
        share = np.maximum(ctas / SUB_PARTITIONS_PER_SM, 1.0 / self.num_warps)[:, None]
        ctas = ctas[:, None]
        out = np.empty((len(TILE_PARTS), *self.alone.shape[1:]))
        np.multiply(self.by_schedulers[:2], share, out=out[1:3])
        np.multiply(self.by_ctas[:2], ctas, out=out[3:5])
        out[5:8] = self.alone[:3]
        out[8] = self.by_schedulers[2] * share + self.by_ctas[2] * ctas + self.alone[3]
        out[0] = norm(out[1:8], self.squarings[:, None]) + out[8]
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileCosts:
    """Tiles on a GPU: `full` [len(TILE_PARTS), R, S] is the narrowest with as many CTAs on the SM as fit, `widening`
    what one of full width takes there above it, `narrow` the narrowest with any number of CTAs. `sheet_rates` [R, S]:
    operations a clock and SM by the data sheet.
    """

    full: Array
    widening: Array
    narrow: SharedTime
    sheet_rates: Array

    @classmethod
    def of(cls, gpu: GpuSpec, launches: Sequence[Launch], constants: AnalyticConstants) -> TileCosts:
        """Of these launches. UnsupportedError if a scheme's math has no tensor cores on `gpu`."""
        narrow_table = TileTable.of(launches, narrowest=True)
        narrow = shared_time(gpu, narrow_table, constants)
        full = narrow.at(narrow_table.ctas_per_sm)
        wide_table = TileTable.of(launches)
        wide = shared_time(gpu, wide_table, constants).at(wide_table.ctas_per_sm)
        return cls(
            full=full,
            widening=np.maximum(wide - full, 0.0),
            narrow=narrow,
            sheet_rates=_sheet_rates(gpu, narrow_table),
        )

    def take(self, rows: npt.NDArray[np.intp] | slice) -> TileCosts:
        """Some of the launches."""
        return TileCosts(
            full=self.full[:, rows],
            widening=self.widening[:, rows],
            narrow=self.narrow.take(rows),
            sheet_rates=self.sheet_rates[rows],
        )


def shared_time(gpu: GpuSpec, table: TileTable, constants: AnalyticConstants) -> SharedTime:
    """Each launch's tile on a GPU."""
    t, c = table, constants
    is_mma, iterations = t.is_mma_family[:, None], t.chain_k_tiles
    mma_clocks = t.mma_k * FLOPS_PER_MMA_K1 / _reached_rates(gpu, table, constants) * SUB_PARTITIONS_PER_SM
    l2_bytes_per_clock = c.of(c.l2_bytes_per_clock_per_sm, gpu.compute_capability)
    # cp.async's family stores its outputs itself, wgmma's leaves that to bulk copies beside the next tile.
    output = t.output_bytes / l2_bytes_per_clock
    epilogue = (
        np.where(is_mma, 0.0, c.wgmma_drain_cycles + t.stores_in_turn * c.wgmma_store_cycles)
        + c.tile_overhead_cycles
        + np.where(
            t.partial_sum_bytes > 0,
            c.sm_to_sm_latency_cycles + t.partial_sum_bytes / c.sm_to_sm_bytes_per_clock,
            0.0,
        )
    )
    by_schedulers = (
        t.k_tile_tensor_mmas * mma_clocks * iterations,
        t.k_tile_instructions / c.issue_fraction * iterations,
        t.epilogue_instructions / c.issue_fraction,
    )
    by_ctas = (
        t.k_tile_smem_bytes / SMEM_BYTES_PER_CLOCK * iterations,
        t.k_tile_bytes / l2_bytes_per_clock * iterations + np.where(is_mma, 0.0, output),
        np.where(is_mma, output, 0.0),
    )
    alone = (
        _chain_clocks(table, constants, mma_clocks) * iterations,
        t.instructions_of_a_warp * c.dependent_issue_cycles * iterations,
        _fetch_clocks(gpu, table, constants) * iterations,
        epilogue,
    )
    return SharedTime(
        by_schedulers=np.stack(by_schedulers) / gpu.boost_clock_mhz,
        by_ctas=np.stack(by_ctas) / gpu.boost_clock_mhz,
        alone=np.stack(alone) / gpu.boost_clock_mhz,
        num_warps=t.num_warps,
        squarings=np.where(t.is_mma_family, c.overlap_squarings, c.wgmma_overlap_squarings),
    )


def _chain_clocks(table: TileTable, constants: AnalyticConstants, mma_clocks: Array) -> Array:
    """An iteration of one warp alone, which no other CTA shortens, [R, S]: waiting for the stage, its MMAs, and what it
    does in turn with them.
    """
    t, c = table, constants
    is_mma = t.is_mma_family[:, None]
    multiply = t.k_steps * t.mmas_per_k_step_of_a_warp * mma_clocks
    exposed = t.exposed_k_steps * np.where(is_mma, c.mma_latency_cycles, c.wgmma_drain_cycles)
    together = np.where(is_mma, np.maximum(multiply, exposed), multiply + exposed)
    wait = np.where(is_mma, c.k_tile_sync_cycles, c.wgmma_wait_cycles)
    return np.asarray(wait + together + t.serial_instructions_of_a_warp / c.issue_fraction, dtype=np.float64)


def _fetch_clocks(gpu: GpuSpec, table: TileTable, constants: AnalyticConstants) -> Array:
    """An iteration's share of a stage's way from DRAM, and for wgmma at least the producers' own work, who take k-tiles
    in turn, [R, 1].
    """
    t, c = table, constants
    latency = c.of(c.dram_latency_cycles, gpu.compute_capability) * c.loaded_latency_factor
    producers = np.where(t.num_stages >= FEW_STAGES, *PRODUCER_WARPS)
    producer = np.where(t.is_mma_family, 0.0, c.producer_k_tile_cycles / producers)
    return np.asarray(np.maximum(latency / np.maximum(t.num_stages - 1.0, 1.0), producer)[:, None], dtype=np.float64)


def _sheet_rates(gpu: GpuSpec, table: TileTable) -> Array:
    """Operations (2 a multiply-add) a clock and SM of each slot's math by the data sheet, [R, S]."""
    rates = np.full(len(Math), np.nan)
    for index, math in enumerate(Math):
        if math in gpu.tensor_tops:
            rates[index] = gpu.tensor_tops[math] * 1e6 / (gpu.num_sms * gpu.boost_clock_mhz)
    by_slot = rates[table.math_index]
    unknown = table.used & np.isnan(by_slot)
    if bool(unknown.any()):
        missing = [math.value for index, math in enumerate(Math) if bool((table.math_index[unknown] == index).any())]
        major, minor = gpu.compute_capability
        raise UnsupportedError(
            f"a latency on {gpu.name}",
            [f"no {math} tensor cores on sm_{major}{minor} ({gpu.name})" for math in missing],
        )
    return np.asarray(np.where(table.used, by_slot, 1.0), dtype=np.float64)


def _reached_rates(gpu: GpuSpec, table: TileTable, constants: AnalyticConstants) -> Array:
    """Of those rates, what each slot's family reaches in its math, [R, S]."""
    of_wgmma = np.asarray([constants.wgmma_fraction.get(math, 1.0) for math in Math])[table.math_index]
    of_mma = constants.of(constants.mma_sync_fraction, gpu.compute_capability)
    return np.asarray(_sheet_rates(gpu, table) * np.where(table.is_mma_family[:, None], of_mma, of_wgmma))


def norm(parts: Sequence[Array] | Array, squarings: int | npt.NDArray[np.int_]) -> Array:
    """p-norm of non-negative parts along their first axis, p = 2 ** squarings (one for all, or an array that broadcasts
    to a part): at least the largest, at most their sum.
    """
    each = np.asarray(squarings)
    for_all, most = (int(each.min()), int(each.max())) if each.size else (0, 0)
    more = [each > step for step in range(for_all, most)]
    # Microseconds: their eighth powers are far from the ends of float64.
    power = np.array(parts, dtype=np.float64)
    for _ in range(for_all):
        np.square(power, out=power)
    for happens in more:
        np.square(power, out=power, where=happens)
    total: Array = power.sum(axis=0)
    for _ in range(for_all):
        np.sqrt(total, out=total)
    for happens in more:
        np.sqrt(total, out=total, where=happens)
    return total
