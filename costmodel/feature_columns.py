"""The columns of the feature matrix, computed: those that tokens decide from the analytic core, and those that they do
not from the kernel and its schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from costmodel.analytic import solve_columns
from costmodel.columns import CORE, LAST_PARTS, STREAMING
from costmodel.kernel_use import KernelUse
from costmodel.launches import LaunchTable
from costmodel.tiles import TileCosts, TileTable
from profiles.gpus import GpuSpec, Math
from profiles.kernels import Family, Raster
from profiles.schemes import QuantScheme

Array = npt.NDArray[np.float64]


def token_columns(gpu: GpuSpec, table: LaunchTable, tiles: TileCosts) -> dict[str, Array]:
    """The columns that tokens decide."""
    solved = solve_columns(gpu, table, tiles)
    names = (*CORE, *LAST_PARTS, *STREAMING, "makespan_us", "roofline_us", "waves")
    columns = {name: solved[name] for name in names}
    num_tiles, tokens = table.num_tiles.sum(axis=1), table.num_tokens.sum(axis=1)
    active = table.num_active.sum(axis=1)
    largest = (table.max_tokens * (table.num_token_tiles > 0)).max(axis=1)
    rounds = np.ceil(columns["waves"])
    mean_tokens = tokens / np.maximum(active, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        tile_fill = np.where(table.num_tiles > 0, table.num_tokens / table.num_token_tiles, 0.0).max(axis=1)
    return {
        **columns,
        "rounds": rounds,
        "tiles_per_sm": np.ceil(num_tiles / gpu.num_sms),
        "largest_expert_tiles": largest,
        "num_active": active,
        "tail": np.where(rounds > 0, 1.0 - columns["waves"] / np.maximum(rounds, 1.0), 0.0),
        "padding": solved["padding"],
        "bytes_per_roofline": columns["dram_us"] / np.maximum(columns["roofline_us"], 1e-3),
        "makespan_per_dram": columns["makespan_us"] / np.maximum(columns["dram_us"], 1e-3),
        "imbalance": np.where(active > 0, largest / np.maximum(mean_tokens, 1.0), tile_fill),
        "num_tokens": tokens,
        "num_experts": table.num_experts,
    }


def fixed_columns(gpu: GpuSpec, uses: Sequence[KernelUse], table: LaunchTable, tiles: TileTable) -> dict[str, Array]:
    """The columns that tokens do not decide, one entry per kernel; means over slots go by their share of experts."""
    by_slot = [_shares(use.schemes) for use in uses]
    share = np.zeros(table.used.shape)
    for row, slots in enumerate(by_slot):
        share[row, : len(slots)] = list(slots.values())

    def mean(values: Array) -> Array:
        return np.asarray((share * values).sum(axis=1), dtype=np.float64)

    def of_scheme(value: Mapping[QuantScheme, float]) -> Array:
        return np.asarray([sum(part * value[s] for s, part in slots.items()) for slots in by_slot], dtype=np.float64)

    every = {scheme for slots in by_slot for scheme in slots}
    mmas = np.where(table.used, tiles.k_tile_mmas, 1.0)
    configs = [use.config for use in uses]
    rows_of_tile = np.asarray([config.tile.m for config in configs], dtype=np.float64)
    columns = {
        "tile_m": rows_of_tile,
        "tile_n": [config.tile.n for config in configs],
        "warps_m": [config.warps.m for config in configs],
        "warps_n": [config.warps.n for config in configs],
        "num_stages": [config.num_stages for config in configs],
        "ctas_per_sm": [use.ctas_per_sm for use in uses],
        "is_wgmma": [config.family is Family.WGMMA for config in configs],
        "is_along_features": [config.raster is Raster.ALONG_FEATURES for config in configs],
        "cluster": [config.cluster for config in configs],
        "split_k": [config.split_k for config in configs],
        "least_width": [config.token_widths[0] / config.tile.n for config in configs],
        "num_slots": [len(slots) for slots in by_slot],
        "weight_bits": of_scheme({scheme: scheme.weight_bits for scheme in every}),
        "least_weight_bits": [min(scheme.weight_bits for scheme in slots) for slots in by_slot],
        "most_weight_bits": [max(scheme.weight_bits for scheme in slots) for slots in by_slot],
        "grouped_share": of_scheme({scheme: float(scheme.group_size != -1) for scheme in every}),
        "zero_point_share": of_scheme({scheme: float(not scheme.is_symmetric) for scheme in every}),
        **{f"{math.value}_share": of_scheme({scheme: float(scheme.math is math) for scheme in every}) for math in Math},
        "k_tiles": mean(tiles.num_k_tiles),
        "feature_tiles": table.num_feature_tiles,
        "feature_padding": table.num_feature_tiles * rows_of_tile / table.n,
        "instructions_per_mma": mean(tiles.k_tile_instructions / mmas),
        "smem_bytes_per_mma": mean(tiles.k_tile_smem_bytes / mmas),
        "bytes_per_mma": mean(tiles.k_tile_bytes / mmas),
        "mmas_per_k_step_of_a_warp": mean(tiles.mmas_per_k_step_of_a_warp),
        "stage_bytes": tiles.k_tile_bytes.max(axis=1),
        "expert_bytes_per_l2": mean(table.expert_weight_bytes) / gpu.l2_bytes,
        "n": table.n,
        "k": table.k,
    }
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def _shares(schemes: tuple[QuantScheme, ...]) -> dict[QuantScheme, float]:
    """Each distinct scheme's share of the experts, in the order of `Launch.slots`."""
    shares: dict[QuantScheme, float] = {}
    for scheme in schemes:
        shares[scheme] = shares.get(scheme, 0.0) + 1.0 / len(schemes)
    return shares
