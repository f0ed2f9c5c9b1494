"""A launch's bytes, flops and bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodel.constants import AnalyticConstants
from costmodel.launches import LaunchTable
from profiles.gpus import GpuSpec

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Terms:
    """Of a table of launches on one GPU; every array is [R, S] (launches, slots) or [R]."""

    gpu: GpuSpec
    table: LaunchTable
    constants: AnalyticConstants

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
        return np.asarray((t.num_full_tiles / t.split_k[:, None] * t.tile_flops).sum(axis=1), dtype=np.float64)

    def roofline_us(self, sheet_rates: Array) -> Array:
        """Larger of bytes over the data sheet's bandwidth and flops over its rates (a clock and SM, [R, S]), [R]."""
        t, gpu = self.table, self.gpu
        memory = self._minimum_bytes().sum(axis=1) / (gpu.dram_gbps * 1e3)
        clocks = 2.0 * t.num_tokens * t.n[:, None] * t.k[:, None] / (sheet_rates * gpu.num_sms)
        return np.asarray(np.maximum(memory, clocks.sum(axis=1) / gpu.boost_clock_mhz), dtype=np.float64)

    def fill_us(self) -> Array:
        """Tile table and the first stage's way from DRAM, [R]."""
        c = self.constants
        return np.asarray(
            (c.prologue_cycles + c.prologue_cycles_per_expert * self.table.num_experts) / self.gpu.boost_clock_mhz,
            dtype=np.float64,
        )
