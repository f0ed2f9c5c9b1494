"""The analytic model's terms: what a tile costs each resource of an SM, and a launch's bytes, flops and bounds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.constants import (
    FEW_STAGES,
    PRODUCER_WARPS,
    SMEM_BYTES_PER_CLOCK,
    SUB_PARTITIONS_PER_SM,
    AnalyticConstants,
)
from costmodel.launches import FLOPS_PER_MMA_K1, LaunchTable
from profiles.errors import UnsupportedError
from profiles.gpus import GpuSpec, Math

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTime:
    """Microseconds of one tile, [R, S]: all together, and each resource alone."""

    total: Array
    tensor: Array
    issue: Array
    smem: Array
    l2: Array
    chain: Array
    warp: Array
    fetch: Array
    epilogue: Array


class Terms:
    """The model's terms for one GPU over a table of launches; every array is [R, S] (launches, slots) or [R]."""

    def __init__(self, gpu: GpuSpec, table: LaunchTable, constants: AnalyticConstants) -> None:
        self.gpu, self.table, self.constants = gpu, table, constants
        self.clocks_per_us = gpu.boost_clock_mhz
        self._sheet_rates = self._tensor_rates()
        self.flops_per_clock_per_sm = self._sheet_rates * self._reached()
        self.l2_bytes_per_clock = constants.of(constants.l2_bytes_per_clock_per_sm, gpu.compute_capability)
        self.latency_clocks = constants.of(constants.dram_latency_cycles, gpu.compute_capability)

    def narrowest(self) -> Terms:
        """The same launches, each tile the narrowest that its configuration has."""
        return self._with(self.table.narrowest(), slice(None))

    def take(self, rows: npt.NDArray[np.intp]) -> Terms:
        """Some of the launches."""
        return self._with(self.table.take(rows), rows)

    def _with(self, table: LaunchTable, rows: slice | npt.NDArray[np.intp]) -> Terms:
        """Other columns of tiles under the same rates."""
        other = copy.copy(self)
        other.table = table
        other.flops_per_clock_per_sm = self.flops_per_clock_per_sm[rows]
        return other

    def _tensor_rates(self) -> Array:
        """Multiply-add operations (2 each) a clock and SM of each slot's math by the data sheet, [R, S]."""
        gpu, table = self.gpu, self.table
        rates = np.full(len(Math), np.nan)
        for index, math in enumerate(Math):
            if math in gpu.tensor_tops:
                rates[index] = gpu.tensor_tops[math] * 1e6 / (gpu.num_sms * gpu.boost_clock_mhz)
        by_slot = rates[table.math_index]
        unknown = table.used & np.isnan(by_slot)
        if bool(unknown.any()):
            missing = [
                math.value for index, math in enumerate(Math) if bool((table.math_index[unknown] == index).any())
            ]
            raise UnsupportedError(
                f"a latency on {gpu.name}",
                [
                    f"no {math} tensor cores on sm_{gpu.compute_capability[0]}{gpu.compute_capability[1]} ({gpu.name})"
                    for math in missing
                ],
            )
        return np.asarray(np.where(table.used, by_slot, 1.0), dtype=np.float64)

    def _reached(self) -> Array:
        """The share of the data sheet's rate that each slot's family reaches in its math, [R, S]."""
        c, table = self.constants, self.table
        of_wgmma = np.asarray([c.wgmma_fraction.get(math, 1.0) for math in Math])[table.math_index]
        of_mma = c.of(c.mma_sync_fraction, self.gpu.compute_capability)
        return np.asarray(np.where(table.is_mma_family[:, None], of_mma, of_wgmma), dtype=np.float64)

    def tile_us(self, ctas: Array) -> TileTime:
        """One tile's time when `ctas` CTAs ([R, 1]) share the SM."""
        t, c = self.table, self.constants
        is_mma = t.is_mma_family[:, None]
        schedulers = np.minimum(ctas * t.num_warps[:, None], float(SUB_PARTITIONS_PER_SM))
        issue_rate = schedulers * c.issue_fraction
        iterations = t.chain_k_tiles
        mma_clocks = t.mma_k * FLOPS_PER_MMA_K1 / self.flops_per_clock_per_sm * SUB_PARTITIONS_PER_SM
        epilogue_issue = ctas * t.epilogue_instructions / issue_rate
        # cp.async's family stores its outputs itself, wgmma's leaves that to bulk copies beside the next tile.
        output = ctas * t.output_bytes / self.l2_bytes_per_clock
        clocks = {
            "tensor": ctas * t.k_tile_tensor_mmas * mma_clocks / schedulers * iterations,
            "issue": ctas * t.k_tile_instructions / issue_rate * iterations,
            "smem": ctas * t.k_tile_smem_bytes / SMEM_BYTES_PER_CLOCK * iterations,
            "l2": ctas * t.k_tile_bytes / self.l2_bytes_per_clock * iterations + np.where(is_mma, 0.0, output),
            "chain": self._chain_clocks(mma_clocks) * iterations,
            "warp": t.instructions_of_a_warp * c.dependent_issue_cycles * iterations,
            "fetch": self._fetch_clocks() * iterations,
        }
        epilogue = (
            epilogue_issue
            + np.where(is_mma, output, 0.0)
            + np.where(is_mma, 0.0, c.wgmma_drain_cycles + t.stores_in_turn * c.wgmma_store_cycles)
            + c.tile_overhead_cycles
            + np.where(
                t.partial_sum_bytes > 0,
                c.sm_to_sm_latency_cycles + t.partial_sum_bytes / c.sm_to_sm_bytes_per_clock,
                0.0,
            )
        )
        total = norm(list(clocks.values()), np.where(is_mma, c.overlap_squarings, c.wgmma_overlap_squarings)) + epilogue
        per_us = {name: value / self.clocks_per_us for name, value in clocks.items()}
        return TileTime(total=total / self.clocks_per_us, epilogue=epilogue / self.clocks_per_us, **per_us)

    def _chain_clocks(self, mma_clocks: Array) -> Array:
        """An iteration of one warp alone, which no other CTA shortens, [R, S]: waiting for the stage, its MMAs, and
        what it does in turn with them.
        """
        t, c = self.table, self.constants
        is_mma = t.is_mma_family[:, None]
        multiply = t.k_steps * t.mmas_per_k_step_of_a_warp * mma_clocks
        exposed = t.exposed_k_steps * np.where(is_mma, c.mma_latency_cycles, c.wgmma_drain_cycles)
        together = np.where(is_mma, np.maximum(multiply, exposed), multiply + exposed)
        wait = np.where(is_mma, c.k_tile_sync_cycles, c.wgmma_wait_cycles)
        return np.asarray(wait + together + t.serial_instructions_of_a_warp / c.issue_fraction, dtype=np.float64)

    def _fetch_clocks(self) -> Array:
        """An iteration's share of a stage's way from DRAM, and for wgmma at least the producers' own work, who take
        k-tiles in turn, [R, 1].
        """
        t, c = self.table, self.constants
        latency = self.latency_clocks * c.loaded_latency_factor / np.maximum(t.num_stages - 1.0, 1.0)
        producers = np.where(t.num_stages >= FEW_STAGES, *PRODUCER_WARPS)
        producer = np.where(t.is_mma_family, 0.0, c.producer_k_tile_cycles / producers)
        return np.asarray(np.maximum(latency, producer)[:, None], dtype=np.float64)

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
        return self.dram_us_of(self.dram_bytes())

    def dram_us_of(self, num_bytes: Array) -> Array:
        """Time of some bytes, [R]."""
        return num_bytes / (self.gpu.dram_gbps * 1e3 * self.constants.dram_efficiency)

    def flops(self) -> Array:
        """Useful operations, 2 a multiply-add, [R]."""
        t = self.table
        return np.asarray((2.0 * t.num_tokens * t.n[:, None] * t.k[:, None]).sum(axis=1), dtype=np.float64)

    def multiplied_flops(self) -> Array:
        """Operations that the tensor cores are given, padding included, [R]."""
        t = self.table
        return np.asarray(
            (t.num_full_tiles / t.split_k[:, None] * t.num_k_tiles * t.k_tile_mmas * t.mma_k * FLOPS_PER_MMA_K1).sum(
                axis=1
            ),
            dtype=np.float64,
        )

    def roofline_us(self) -> Array:
        """Larger of bytes over the data sheet's bandwidth and flops over its rates, [R]."""
        t, gpu = self.table, self.gpu
        memory = self._minimum_bytes().sum(axis=1) / (gpu.dram_gbps * 1e3)
        clocks = 2.0 * t.num_tokens * t.n[:, None] * t.k[:, None] / (self._sheet_rates * gpu.num_sms)
        return np.asarray(np.maximum(memory, clocks.sum(axis=1) / self.clocks_per_us), dtype=np.float64)

    def fill_us(self) -> Array:
        """Tile table and the first stage's way from DRAM, [R]."""
        c = self.constants
        return np.asarray(
            (c.prologue_cycles + c.prologue_cycles_per_expert * self.table.num_experts) / self.clocks_per_us,
            dtype=np.float64,
        )


def norm(parts: Sequence[Array], squarings: int | npt.NDArray[np.int_]) -> Array:
    """p-norm of non-negative parts, elementwise, p = 2 ** squarings (one for all, or an array that broadcasts): at
    least the largest, at most their sum.
    """
    each = np.asarray(squarings)
    for_all, most = (int(each.min()), int(each.max())) if each.size else (0, 0)
    more = [each > step for step in range(for_all, most)]
    total: Array = np.zeros(1)
    # Microseconds or clocks: their eighth powers are far from the ends of float64.
    for part in parts:
        power = np.square(part) if for_all else np.array(part, dtype=np.float64)
        for _ in range(for_all - 1):
            np.square(power, out=power)
        for happens in more:
            np.square(power, out=power, where=happens)
        total = total + power
    for _ in range(for_all):
        np.sqrt(total, out=total)
    for happens in more:
        np.sqrt(total, out=total, where=happens)
    return total
