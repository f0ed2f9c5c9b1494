"""The feature matrix of the latency model: what is known about a launch before it runs, as numbers that mean the same
on every GPU.

Times are what the analytic core says each resource alone would take, so they are already ratios to the card's limits;
the rest are counts per SM, shares and ratios. Every column either never falls when an expert gets more tokens
(`Kind.GROWS`) or does not depend on tokens (`Kind.FIXED`): a model that rises in the first and is free in the second
is non-decreasing in tokens. Ratios that may do either (`Kind.RATIO`) and absolute sizes (`Kind.RAW`) are there to
explain errors and for the baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.analytic import BREAKDOWN_COLUMNS, solve
from costmodel.blocks import for_blocks
from costmodel.facts import BuildFacts
from costmodel.launches import Launch, LaunchTable
from costmodel.work import split_load
from profiles import kernels
from profiles import schemes as scheme_names
from profiles.errors import DataError
from profiles.gpus import GpuSpec, Math
from profiles.gpus import gpu as find_gpu
from profiles.kernels import Family, GemmShape, KernelConfig, Raster
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.intp]


class Kind(Enum):
    """What a column may do when one expert gets one more token."""

    GROWS = "grows"
    FIXED = "fixed"
    RATIO = "ratio"
    RAW = "raw"


PARTS = ("tensor_us", "issue_us", "smem_us", "l2_us", "chain_us", "fetch_us", "epilogue_us")
"""What the makespan would be if that were the only resource."""
CORE = ("latency_us", "launch_us", "fill_us", "dram_us", *PARTS)
"""What the calibrated core is made of."""
_GROWING = (
    *CORE,
    "makespan_us",
    "roofline_us",
    "waves",
    "rounds",
    "tiles_per_sm",
    "largest_expert_tiles",
    "num_active",
)
_OF_CONFIG = ("tile_m", "tile_n", "warps_m", "warps_n", "num_stages", "ctas_per_sm", "is_wgmma", "is_along_features")
_OF_SCHEMES = (
    *("num_slots", "weight_bits", "least_weight_bits", "most_weight_bits", "grouped_share", "zero_point_share"),
    *(f"{math.value}_share" for math in Math),
)
_OF_TILE = (
    *("k_tiles", "feature_tiles", "feature_padding", "instructions_per_mma", "smem_bytes_per_mma", "bytes_per_mma"),
    *("mmas_per_k_step_of_a_warp", "stage_bytes", "expert_bytes_per_l2", "num_experts"),
)
_RATIOS = ("tail", "padding", "bytes_per_roofline", "makespan_per_dram", "imbalance")
_RAW = ("num_tokens", "n", "k")
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(_GROWING, Kind.GROWS),
    **dict.fromkeys((*_OF_CONFIG, *_OF_SCHEMES, *_OF_TILE), Kind.FIXED),
    **dict.fromkeys(_RATIOS, Kind.RATIO),
    **dict.fromkeys(_RAW, Kind.RAW),
}
FEATURES: tuple[str, ...] = tuple(KINDS)
"""Columns of the matrix, in order."""
INDEX: Mapping[str, int] = {name: index for index, name in enumerate(FEATURES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """A kernel on a linear: all of a launch but its tokens. `schemes` holds one scheme, or one per expert."""

    n: int
    k: int
    schemes: tuple[QuantScheme, ...]
    config: KernelConfig
    ctas_per_sm: int

    def launch(self, load: TokenLoad) -> Launch:
        """It, run on a load."""
        return Launch(
            shape=GemmShape(m=load.total, n=self.n, k=self.k),
            load=load,
            schemes=self.schemes,
            config=self.config,
            facts=nominal_facts(self.config, self.ctas_per_sm),
        )


def nominal_facts(config: KernelConfig, ctas_per_sm: int | None = None) -> BuildFacts:
    """What the latency model needs of a build when none is at hand: the CTAs per SM that the kernel is built for.

    The space keeps a kernel under the highest number that fits, so this is its occupancy for all but about 2% of the
    configurations (counted over the full space on an RTX 4090), and a lower bound for those.
    """
    return BuildFacts(
        registers_per_thread=0,
        smem_bytes=0,
        stack_bytes=0,
        spill_bytes=0,
        num_threads=config.num_threads,
        ctas_per_sm=config.min_ctas_per_sm if ctas_per_sm is None else ctas_per_sm,
        mma_instructions=(),
        compile_seconds=0.0,
        fingerprint="",
    )


def of_profile(profile: pd.DataFrame, facts: Mapping[str, BuildFacts] | None = None) -> pd.DataFrame:
    """The matrix of a profile's rows (`ProfileStore.records()`), with its index: one float32 column per `FEATURES`.

    `facts` are builds by kernel fingerprint; rows without one take `nominal_facts`.

    Raises:
        DataError: a name that does not parse, or a column that is missing.
    """
    columns = ("gpu", "n", "k", "tokens_per_expert", "schemes", "config")
    missing = [name for name in columns if name not in profile]
    if missing:
        raise DataError(f"no features without the profile's columns {', '.join(missing)}")
    out = np.empty((len(profile), len(FEATURES)), dtype=np.float32, order="F")
    for gpu_name, rows in profile.reset_index(drop=True).groupby("gpu", sort=False):
        uses, loads, use_of, load_of = _factorised(rows, facts or {})
        out[rows.index] = matrix(find_gpu(str(gpu_name)), uses, loads, use_of, load_of)
    return as_frame(out, profile.index)


def of_launches(gpu: GpuSpec, launches: Sequence[Launch]) -> pd.DataFrame:
    """The matrix of launches, in order."""
    uses = [_use(launch) for launch in launches]
    every = np.arange(len(launches))
    return as_frame(matrix(gpu, uses, [launch.load for launch in launches], every, every))


def as_frame(matrix_: Matrix, index: pd.Index | None = None) -> pd.DataFrame:
    """A matrix with the columns' names, which scikit-learn then checks."""
    return pd.DataFrame(matrix_, columns=list(FEATURES), index=index)


def matrix(
    gpu: GpuSpec, uses: Sequence[KernelUse], loads: Sequence[TokenLoad], use_of: Codes, load_of: Codes
) -> Matrix:
    """float32 [R, len(FEATURES)], column-major: row r is kernel `uses[use_of[r]]` on load `loads[load_of[r]]`."""
    return Kernels(gpu, uses).matrix(loads, use_of, load_of)


class Kernels:
    """Kernels on linears, with all of their numbers that do not depend on tokens worked out: a million rows of a few
    thousand kernels take a second, one load under a dozen kernels well under a millisecond.
    """

    def __init__(self, gpu: GpuSpec, uses: Sequence[KernelUse]) -> None:
        self.gpu, self.uses = gpu, tuple(uses)
        self._table = LaunchTable.of([use.launch(_one_token_each(use)) for use in uses])
        self._fixed = np.zeros((len(self.uses), len(FEATURES)), dtype=np.float32, order="F")
        for name, values in _fixed_columns(gpu, uses, self._table).items():
            self._fixed[:, INDEX[name]] = values
        groups: dict[tuple[tuple[QuantScheme, ...], int], int] = {}
        keys = [(use.schemes if len(use.schemes) > 1 else (), use.config.tile.n) for use in uses]
        self._group_of_use = np.asarray([groups.setdefault(key, len(groups)) for key in keys], dtype=np.intp)
        self._groups = list(groups)

    def matrix(self, loads: Sequence[TokenLoad], use_of: Codes, load_of: Codes) -> Matrix:
        """float32 [R, len(FEATURES)], column-major: row r is kernel `use_of[r]` on load `load_of[r]`.

        Raises:
            DataError: a load of another number of experts than a kernel has schemes.
        """
        out = np.empty((len(use_of), len(FEATURES)), dtype=np.float32, order="F")
        splits = self._splits(loads, use_of, load_of)
        num_experts = np.asarray([load.num_experts for load in loads], dtype=np.float64)

        def work(rows: slice) -> None:
            out[rows] = np.take(self._fixed.T, use_of[rows], axis=1).T
            table = self._launches(use_of[rows], num_experts[load_of[rows]], splits, load_of[rows])
            for name, column in _token_columns(self.gpu, table).items():
                out[rows, INDEX[name]] = column

        for_blocks(len(use_of), work)
        return out

    def _splits(self, loads: Sequence[TokenLoad], use_of: Codes, load_of: Codes) -> Array:
        """How each load splits into tiles, by kernels that split alike: [4, groups, loads, slots], see `_SPLIT`."""
        counts = np.zeros((len(_SPLIT), len(self._groups), len(loads), self._table.used.shape[1]))
        for code in np.unique(self._group_of_use[use_of] * len(loads) + load_of):
            group, load = divmod(int(code), len(loads))
            for slot, split in enumerate(_split(*self._groups[group], loads[load])):
                counts[:, group, load, slot] = split
        return counts

    def _launches(self, use_of: Codes, num_experts: Array, splits: Array, load_of: Codes) -> LaunchTable:
        """A kernel's columns, and those that its tokens decide."""
        columns = {field.name: getattr(self._table, field.name)[use_of] for field in _TABLE_FIELDS}
        of_rows = splits[:, self._group_of_use[use_of], load_of]
        columns.update(zip(_SPLIT, of_rows, strict=True))
        columns["num_tiles"] = columns["num_token_tiles"] * columns["num_feature_tiles"][:, None]
        columns["num_experts"] = num_experts
        return LaunchTable(**columns)


_SPLIT = ("num_tokens", "num_active", "num_token_tiles", "max_tokens")
_TABLE_FIELDS = dataclasses.fields(LaunchTable)


def _split(schemes: tuple[QuantScheme, ...], tile_n: int, load: TokenLoad) -> list[tuple[float, ...]]:
    """`_SPLIT` of each slot; no schemes: all experts share one."""
    if schemes and len(schemes) != load.num_experts:
        raise DataError(f"{len(schemes)} schemes for the {load.num_experts} experts of load {load.source!r}")
    by_slot: dict[QuantScheme, list[int]] = {}
    for scheme, count in zip(schemes, load.tokens_per_expert, strict=False):
        by_slot.setdefault(scheme, []).append(count)
    parts = [tuple(tokens) for tokens in by_slot.values()] if schemes else [load.tokens_per_expert]
    found = [split_load(tokens, tile_n) for tokens in parts]
    return [(s.num_tokens, s.num_active_experts, s.num_token_tiles, s.max_tokens) for s in found]


def _token_columns(gpu: GpuSpec, table: LaunchTable) -> dict[str, Array]:
    """The columns that tokens decide."""
    solved = dict(zip(BREAKDOWN_COLUMNS, solve(gpu, table).to_numpy().T, strict=True))
    columns = {name: solved[name] for name in (*CORE, "makespan_us", "roofline_us", "waves")}
    mixed = np.flatnonzero(table.used.sum(axis=1) > 1)
    if len(mixed):
        for name, values in _mixed_parts(gpu, _take(table, mixed)).items():
            columns[name] = columns[name].copy()
            columns[name][mixed] = values
    tiles, tokens = table.num_tiles.sum(axis=1), table.num_tokens.sum(axis=1)
    active = table.num_active.sum(axis=1)
    largest = (table.max_tokens * (table.num_token_tiles > 0)).max(axis=1)
    rounds = np.ceil(columns["waves"])
    mean_tokens = tokens / np.maximum(active, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        tile_fill = np.where(table.num_tiles > 0, table.num_tokens / table.num_token_tiles, 0.0).max(axis=1)
    return {
        **columns,
        "rounds": rounds,
        "tiles_per_sm": np.ceil(tiles / gpu.num_sms),
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


def _mixed_parts(gpu: GpuSpec, table: LaunchTable) -> dict[str, Array]:
    """`PARTS` of launches with several schemes: each resource's makespan with its own slowest tiles first.

    The core orders tiles by their whole time, and then one resource's part may fall when a slot that needs less of it
    gets more tiles; in its own order it cannot. For one scheme both are the same.
    """
    rows, slots = table.used.shape
    resident = gpu.num_sms * table.ctas_per_sm
    total = table.num_tiles.sum(axis=1)
    rounds = np.floor(total / resident)
    rest = total - rounds * resident
    one_round = _each_slot(table, np.broadcast_to(resident[:, None], (rows, slots)))
    last_round = _each_slot(table, np.broadcast_to(np.maximum(rest, 1.0)[:, None], (rows, slots)))
    full, last = solve(gpu, one_round), solve(gpu, last_round)
    found = {}
    for name in PARTS:
        cost = full[name].to_numpy().reshape(rows, slots)
        order = np.argsort(-np.where(table.num_tiles > 0, cost, -1.0), axis=1, kind="stable")
        ends = np.cumsum(np.take_along_axis(table.num_tiles, order, axis=1), axis=1)
        begins = ends - np.take_along_axis(table.num_tiles, order, axis=1)

        def first_of_rounds(edge: Array) -> Array:
            """Rounds whose first tile lies before this edge of the sorted list."""
            return np.asarray(np.minimum(np.ceil(edge / resident[:, None]), rounds[:, None]), dtype=np.float64)

        starts_last = (rounds * resident)[:, None]
        holds_last = (begins <= starts_last) & (starts_last < ends) & (rest > 0)[:, None]
        of_last = np.take_along_axis(last[name].to_numpy().reshape(rows, slots), order, axis=1)
        of_full = np.take_along_axis(cost, order, axis=1)
        found[name] = (of_full * (first_of_rounds(ends) - first_of_rounds(begins)) + of_last * holds_last).sum(axis=1)
    return found


def _each_slot(table: LaunchTable, num_tiles: Array) -> LaunchTable:
    """[R, S] as R * S launches of one slot, each with the given number of tiles."""
    rows, slots = table.used.shape
    columns = {}
    for field in dataclasses.fields(table):
        values = getattr(table, field.name)
        columns[field.name] = values.reshape(-1, 1) if values.ndim == 2 else np.repeat(values, slots)
    # An unused slot has no costs; one k-tile of one MMA keeps its numbers finite, and its zero tiles keep them out.
    columns["num_tiles"] = np.ascontiguousarray(num_tiles).reshape(rows * slots, 1)
    return LaunchTable(**columns)


def _fixed_columns(gpu: GpuSpec, uses: Sequence[KernelUse], table: LaunchTable) -> dict[str, Array]:
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
    mmas = np.where(table.used, table.k_tile_mmas, 1.0)
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
        "num_slots": [len(slots) for slots in by_slot],
        "weight_bits": of_scheme({scheme: scheme.weight_bits for scheme in every}),
        "least_weight_bits": [min(scheme.weight_bits for scheme in slots) for slots in by_slot],
        "most_weight_bits": [max(scheme.weight_bits for scheme in slots) for slots in by_slot],
        "grouped_share": of_scheme({scheme: float(scheme.group_size != -1) for scheme in every}),
        "zero_point_share": of_scheme({scheme: float(not scheme.is_symmetric) for scheme in every}),
        **{f"{math.value}_share": of_scheme({scheme: float(scheme.math is math) for scheme in every}) for math in Math},
        "k_tiles": mean(table.num_k_tiles),
        "feature_tiles": table.num_feature_tiles,
        "feature_padding": table.num_feature_tiles * rows_of_tile / table.n,
        "instructions_per_mma": mean(table.k_tile_instructions / mmas),
        "smem_bytes_per_mma": mean(table.k_tile_smem_bytes / mmas),
        "bytes_per_mma": mean(table.k_tile_bytes / mmas),
        "mmas_per_k_step_of_a_warp": mean(table.mmas_per_k_step_of_a_warp),
        "stage_bytes": table.k_tile_bytes.max(axis=1),
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


def _one_token_each(use: KernelUse) -> TokenLoad:
    return TokenLoad(tokens_per_expert=(1,) * len(use.schemes), source="one token each")


def _use(launch: Launch) -> KernelUse:
    return KernelUse(
        n=launch.shape.n,
        k=launch.shape.k,
        schemes=launch.schemes,
        config=launch.config,
        ctas_per_sm=launch.facts.ctas_per_sm,
    )


def _take(table: LaunchTable, rows: Codes) -> LaunchTable:
    return LaunchTable(**{field.name: getattr(table, field.name)[rows] for field in dataclasses.fields(table)})


def _factorised(
    rows: pd.DataFrame, facts: Mapping[str, BuildFacts]
) -> tuple[list[KernelUse], list[TokenLoad], Codes, Codes]:
    """The distinct kernels and loads of a profile's rows, and which of them each row has."""
    use_index: dict[tuple[object, ...], int] = {}
    load_index: dict[bytes, int] = {}
    uses: list[KernelUse] = []
    loads: list[TokenLoad] = []
    use_of, load_of = np.empty(len(rows), dtype=np.intp), np.empty(len(rows), dtype=np.intp)
    fingerprints = rows["kernel_fingerprint"] if "kernel_fingerprint" in rows else [""] * len(rows)
    columns = (rows["n"], rows["k"], rows["schemes"], rows["config"], fingerprints, rows["tokens_per_expert"])
    for row, (n, k, names, config_name, fingerprint, tokens) in enumerate(zip(*columns, strict=True)):
        built = facts.get(fingerprint)
        key = (n, k, tuple(names), config_name, built.ctas_per_sm if built else None)
        if key not in use_index:
            config = kernels.parse(config_name)
            use_index[key] = len(uses)
            uses.append(
                KernelUse(
                    n=int(n),
                    k=int(k),
                    schemes=tuple(scheme_names.parse(name) for name in names),
                    config=config,
                    ctas_per_sm=built.ctas_per_sm if built else config.min_ctas_per_sm,
                )
            )
        counts = np.asarray(tokens, dtype=np.int64)
        digest = counts.tobytes()
        if digest not in load_index:
            load_index[digest] = len(loads)
            loads.append(TokenLoad(tokens_per_expert=tuple(counts.tolist()), source="profile"))
        use_of[row], load_of[row] = use_index[key], load_index[digest]
    return uses, loads, use_of, load_of
