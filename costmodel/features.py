"""The feature matrix of the latency model: what is known about a launch before it runs, as numbers that mean the same
on every GPU.

Times are what the analytic core says each resource alone would take, so they are already ratios to the card's limits;
the rest are counts per SM, shares and ratios. Every column either never falls when an expert gets more tokens
(`Kind.GROWS`) or does not depend on tokens (`Kind.FIXED`): a model that rises in the first and is free in the second
is non-decreasing in tokens. How rounds of tiles share the growing ones (`Kind.PHASE`) is for the calibrated core, which
is non-decreasing in all of them together. Ratios that may do either (`Kind.RATIO`) and absolute sizes (`Kind.RAW`) are
there to explain errors and for the baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from costmodel.blocks import for_blocks
from costmodel.columns import FEATURES, INDEX
from costmodel.constants import DEFAULT_CONSTANTS
from costmodel.facts import BuildFacts
from costmodel.feature_columns import fixed_columns, token_columns
from costmodel.kernel_use import KernelUse, of_rows, use_of
from costmodel.launches import Launch, LaunchTable
from costmodel.splits import split_all, width_table
from costmodel.tiles import TileCosts, TileTable
from profiles.errors import DataError
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.loads import TokenLoad
from profiles.schemes import QuantScheme

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.intp]


def of_profile(profile: pd.DataFrame, facts: Mapping[str, BuildFacts] | None = None) -> pd.DataFrame:
    """The matrix of a profile's rows (`ProfileStore.records()`), with its index: one float32 column per `FEATURES`.

    `facts` are builds by kernel fingerprint; without one, a row's CTAs per SM are what it says itself that its build
    had, or what its configuration asks for.

    Raises:
        DataError: a name that does not parse, or a column that is missing.
    """
    columns = ("gpu", "n", "k", "tokens_per_expert", "schemes", "config")
    missing = [name for name in columns if name not in profile]
    if missing:
        raise DataError(f"no features without the profile's columns {', '.join(missing)}")
    out = np.empty((len(profile), len(FEATURES)), dtype=np.float32, order="F")
    for gpu_name, rows in profile.reset_index(drop=True).groupby("gpu", sort=False, dropna=False):
        uses, loads, use_of, load_of = of_rows(rows, facts or {})
        out[rows.index] = matrix(find_gpu(str(gpu_name)), uses, loads, use_of, load_of)
    return as_frame(out, profile.index)


def of_launches(gpu: GpuSpec, launches: Sequence[Launch]) -> pd.DataFrame:
    """The matrix of launches, in order."""
    uses = [use_of(launch) for launch in launches]
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
        launches = [use.launch(_one_token_each(use)) for use in uses]
        self._table, self._tiles = LaunchTable.of(launches), TileCosts.of(gpu, launches, DEFAULT_CONSTANTS)
        self._fixed = np.zeros((len(self.uses), len(FEATURES)), dtype=np.float32, order="F")
        for name, values in fixed_columns(gpu, uses, self._table, TileTable.of(launches)).items():
            self._fixed[:, INDEX[name]] = values
        self._group_of_use = np.zeros(len(self.uses), dtype=np.intp)
        self._splitters: list[_Splitter] = []
        num_groups = 0
        for schemes, rows in _by_schemes(self.uses).items():
            widths = list(dict.fromkeys(self.uses[row].config.token_widths for row in rows))
            for row in rows:
                self._group_of_use[row] = num_groups + widths.index(self.uses[row].config.token_widths)
            groups = slice(num_groups, num_groups + len(widths))
            self._splitters.append(_Splitter(groups, _members(schemes), len(schemes), width_table(widths)))
            num_groups = groups.stop
        self._splitter_of_use = np.searchsorted(
            [each.groups.stop for each in self._splitters], self._group_of_use, "right"
        )

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
            for name, column in token_columns(self.gpu, table, self._tiles.take(use_of[rows])).items():
                out[rows, INDEX[name]] = column

        for_blocks(len(use_of), work)
        return out

    def _splits(self, loads: Sequence[TokenLoad], use_of: Codes, load_of: Codes) -> Array:
        """How each load splits into tiles, by kernels that split alike: [5, groups, loads, slots], see `_SPLIT`."""
        counts = np.zeros((len(_SPLIT), self._splitters[-1].groups.stop, len(loads), self._table.used.shape[1]))
        for code in np.unique(self._splitter_of_use[use_of] * len(loads) + load_of):
            splitter, load = divmod(int(code), len(loads))
            self._splitters[splitter].split(loads[load], counts[:, :, load])
        return counts

    def _launches(self, use_of: Codes, num_experts: Array, splits: Array, load_of: Codes) -> LaunchTable:
        """A kernel's columns, and those that its tokens decide."""
        columns = {field.name: getattr(self._table, field.name)[use_of] for field in _TABLE_FIELDS}
        of_rows = splits[:, self._group_of_use[use_of], load_of]
        columns.update(zip(_SPLIT, of_rows, strict=True))
        parts = (columns["num_feature_tiles"] * columns["split_k"])[:, None]
        columns["num_tiles"] = columns["num_token_tiles"] * parts
        columns["num_full_tiles"] = columns["num_full_tiles"] * parts
        columns["num_experts"] = num_experts
        return LaunchTable(**columns)


_SPLIT = ("num_tokens", "num_active", "num_token_tiles", "num_full_tiles", "max_tokens")
"""Columns of a launch that its load decides; `num_full_tiles` of one feature tile."""
_TABLE_FIELDS = dataclasses.fields(LaunchTable)


@dataclass(frozen=True, slots=True)
class _Splitter:
    """Kernels whose experts have the same schemes: their `groups` by token widths, the experts of each slot (None: all
    are of one), how many experts that fixes (0: any number), and a row of widths a group.
    """

    groups: slice
    members: tuple[Codes | None, ...]
    num_experts: int
    widths: Codes

    def split(self, load: TokenLoad, counts: Array) -> None:
        """Writes `_SPLIT` of each group and slot to `counts` [5, groups, slots]. DataError for another number of
        experts.
        """
        if self.num_experts and self.num_experts != load.num_experts:
            raise DataError(f"{self.num_experts} schemes for the {load.num_experts} experts of load {load.source!r}")
        tokens = np.asarray(load.tokens_per_expert, dtype=np.int64)
        for slot, experts in enumerate(self.members):
            counts[:, self.groups, slot] = split_all(tokens if experts is None else tokens[experts], self.widths)


def _by_schemes(uses: Sequence[KernelUse]) -> dict[tuple[QuantScheme, ...], list[int]]:
    """Rows of kernels by their experts' schemes; one for all is one whatever it is."""
    found: dict[tuple[QuantScheme, ...], list[int]] = {}
    for row, use in enumerate(uses):
        found.setdefault(use.schemes if len(use.schemes) > 1 else (), []).append(row)
    return found


def _members(schemes: tuple[QuantScheme, ...]) -> tuple[Codes | None, ...]:
    """The experts of each distinct scheme, in the order of `Launch.slots`."""
    if not schemes:
        return (None,)
    by_slot: dict[QuantScheme, list[int]] = {}
    for expert, scheme in enumerate(schemes):
        by_slot.setdefault(scheme, []).append(expert)
    return tuple(np.asarray(experts, dtype=np.intp) for experts in by_slot.values())


def _one_token_each(use: KernelUse) -> TokenLoad:
    return TokenLoad(tokens_per_expert=(1,) * len(use.schemes), source="one token each")
