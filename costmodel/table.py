"""CostTable: what each scheme costs for each linear under each load, and with which configuration. The allocator adds
these up; a sweep ends with one.

A row is one (model, linear, scheme, scenario); a scenario is a token load by name. Only launches in which all experts
share one scheme have a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from costmodel.analytic import launch_latencies, model_version
from costmodel.launches import Launch
from profiles import kernels, schemes
from profiles.errors import DataError, SpecError
from profiles.frames import TableKind
from profiles.gpus import GpuSpec
from profiles.gpus import gpu as find_gpu
from profiles.records import Source, Status
from profiles.schemes import QuantScheme

SCHEMA_VERSION = 1
SCHEMA = pa.schema([
    ("gpu", pa.string()),
    ("model_version", pa.string()),
    ("model", pa.string()),
    ("linear", pa.string()),
    ("scheme", pa.string()),
    ("scenario", pa.string()),
    ("tokens_per_expert", pa.float64()),
    ("latency_us", pa.float64()),
    ("std_us", pa.float64()),
    ("config", pa.string()),
    ("source", pa.string()),
    ("schema_version", pa.int32()),
])  # fmt: skip
KEY = ("model", "linear", "scheme", "scenario")
KIND = TableKind(
    name="a cost table",
    schema=SCHEMA,
    version=SCHEMA_VERSION,
    own="std_us",
    key=KEY,
    alike=("gpu", "model_version"),
    nullable=("std_us",),
)
_NORMAL_P20_TO_P80 = 2 * 0.8416212335729143  # in standard deviations
_EQUAL_WITHIN = 1e-3
"""Latencies this close favour neither scheme: with few tokens all of them may sit on the launch floor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedLaunch:
    """A launch and the row that its latency belongs to. All experts share one scheme."""

    model: str
    linear: str
    scenario: str
    launch: Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """Where `many` becomes faster than `few` for one linear, in mean tokens an expert; None: `winner` is faster at
    every load of the table.
    """

    model: str
    linear: str
    few: str
    many: str
    tokens_per_expert: float | None
    winner: str | None


class CostTable:
    """Latencies of one GPU, checked when made. Immutable: `frame()` gives a copy.

    Columns: gpu, model_version (the latency model that predicted, or the kernels' versions that were measured),
    model, linear, scheme, scenario, tokens_per_expert (mean over all experts), latency_us, std_us (null: unknown),
    config, source, schema_version.
    """

    __slots__ = ("_frame",)

    def __init__(self, frame: pd.DataFrame, *, where: str = "cost table") -> None:
        """Raises DataError for a table that breaks a rule; `where` begins its sentence."""
        self._frame = _checked(frame, where)

    def __len__(self) -> int:
        return len(self._frame)

    @property
    def gpu(self) -> GpuSpec:
        """The GPU whose latencies these are."""
        return find_gpu(str(self._frame["gpu"].iloc[0]))

    @property
    def model_version(self) -> str:
        """What made the numbers."""
        return str(self._frame["model_version"].iloc[0])

    def frame(self) -> pd.DataFrame:
        """All rows, sorted by key."""
        return self._frame.copy()

    @classmethod
    def from_profile(cls, profile: pd.DataFrame, *, model_version: str = "profile") -> CostTable:
        """The fastest configuration of each (model, linear, scheme, scenario) among a profile's finished rows
        (`ProfileStore.records()`).

        Measured rows win over predicted ones. `std_us` is p80 - p20 in normal standard deviations. Rows of mixed
        launches are left out, they are no scheme's cost. DataError when nothing is left or the rows are of several
        GPUs.
        """
        rows = profile[(profile["status"] == Status.OK.value) & profile["schemes"].map(_is_uniform)]
        if rows.empty:
            raise DataError("the profile has no finished launch in which all experts share one scheme")
        frame = pd.DataFrame(
            {
                "gpu": rows["gpu"],
                "model_version": model_version,
                "model": rows["model"],
                "linear": rows["linear"],
                "scheme": rows["schemes"].map(lambda names: names[0]),
                "scenario": rows["load_source"],
                "tokens_per_expert": rows["tokens_per_expert"].map(lambda tokens: float(np.mean(tokens))),
                "latency_us": rows["latency_us"].astype(float),
                "std_us": (rows["p80_us"].astype(float) - rows["p20_us"].astype(float)) / _NORMAL_P20_TO_P80,
                "config": rows["config"],
                "source": rows["source"],
            }
        )
        return cls(fastest(frame))

    @classmethod
    def from_predictions(cls, gpu: GpuSpec, launches: Sequence[PricedLaunch]) -> CostTable:
        """The analytic model's pick for each row among these launches (one a configuration). SpecError for a launch
        of several schemes.
        """
        if not launches:
            raise SpecError("no launches to predict")
        for priced in launches:
            if len(set(priced.launch.schemes)) != 1:
                raise SpecError(
                    f"{priced.model} {priced.linear}: a row of a cost table has one scheme,"
                    f" this launch has {len(set(priced.launch.schemes))}"
                )
        latency = launch_latencies(gpu, [priced.launch for priced in launches])["latency_us"]
        frame = pd.DataFrame(
            {
                "gpu": gpu.name,
                "model_version": model_version(),
                "model": [priced.model for priced in launches],
                "linear": [priced.linear for priced in launches],
                "scheme": [priced.launch.schemes[0].name for priced in launches],
                "scenario": [priced.scenario for priced in launches],
                "tokens_per_expert": [float(np.mean(priced.launch.load.tokens_per_expert)) for priced in launches],
                "latency_us": latency.to_numpy(),
                "std_us": np.nan,
                "config": [priced.launch.config.name for priced in launches],
                "source": Source.PREDICTED.value,
            }
        )
        return cls(fastest(frame))

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, gpu: str | None = None) -> CostTable:
        """A table from Parquet. DataError: truncated, foreign, of another schema version, broken rows, or not of
        `gpu` where that is given.
        """
        return cls(_read(Path(path), gpu), where=str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put the table in the place of a Parquet file, whole or not at all. DataError when it cannot be written."""
        KIND.write(self._frame, Path(path))

    def latency_us(self, *, model: str, linear: str, scheme: QuantScheme, scenario: str) -> float:
        """One entry. SpecError if the table has none."""
        key = (model, linear, scheme.name, scenario)
        rows = self._frame[
            np.logical_and.reduce([self._frame[name] == value for name, value in zip(KEY, key, strict=True)])
        ]
        if rows.empty:
            raise SpecError(f"the cost table of {self.gpu.name} has no entry for {', '.join(key)}")
        return float(rows["latency_us"].iloc[0])

    def best_per_scheme_and_load(self) -> pd.DataFrame:
        """One row a (model, linear, scheme, load) with its latency and configuration, in the order of tokens within a
        scheme.
        """
        columns = ["model", "linear", "scheme", "scenario", "tokens_per_expert", "latency_us", "config", "source"]
        order = ["model", "linear", "scheme", "tokens_per_expert", "scenario"]
        return self._frame.sort_values(order, kind="stable")[columns].reset_index(drop=True)

    def crossovers(self, few: QuantScheme, many: QuantScheme) -> tuple[Crossover, ...]:
        """For each (model, linear) that has both schemes: the load where `many` becomes faster than `few`, see
        `crossover_tokens`.

        Scenarios with the same mean tokens an expert (different skews) are averaged in log latency.
        """
        found = []
        for (model, linear), rows in self._frame.groupby(["model", "linear"], sort=True):
            pair = rows[rows["scheme"].isin([few.name, many.name])]
            logs = pair.assign(log_us=np.log(pair["latency_us"])).pivot_table(
                index="tokens_per_expert", columns="scheme", values="log_us", aggfunc="mean"
            )
            if few.name not in logs or many.name not in logs:
                continue
            ratio = (logs[few.name] - logs[many.name]).dropna().sort_index()
            ratio = ratio[ratio.index > 0]
            if ratio.empty:
                continue
            tokens = crossover_tokens(list(ratio.index), list(ratio))
            winner = None if tokens is not None else (few.name if float(ratio.sum()) < 0 else many.name)
            found.append(
                Crossover(
                    model=str(model),
                    linear=str(linear),
                    few=few.name,
                    many=many.name,
                    tokens_per_expert=tokens,
                    winner=winner,
                )
            )
        return tuple(found)


def crossover_tokens(tokens_per_expert: Sequence[float], log_ratios: Sequence[float]) -> float | None:
    """Where log(latency of the one / latency of the other) turns from negative to positive for good, linear in log
    tokens between the loads beside it.

    `tokens_per_expert` rise and are positive. Ratios within a thousandth of zero count for neither. None: it never
    turns.
    """
    decided = [
        (tokens, ratio)
        for tokens, ratio in zip(tokens_per_expert, log_ratios, strict=True)
        if abs(ratio) > _EQUAL_WITHIN
    ]
    last_few = max((index for index, (_, ratio) in enumerate(decided) if ratio < 0), default=None)
    if last_few is None or last_few + 1 == len(decided):
        return None
    (x0, r0), (x1, r1) = decided[last_few], decided[last_few + 1]
    return math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * -r0 / (r1 - r0))


def _is_uniform(names: Sequence[str]) -> bool:
    return len(names) == 1


def fastest(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a key: measured before predicted, then the lowest latency, then the configuration's name."""
    ranked = frame.assign(_is_predicted=frame["source"] != Source.MEASURED.value)
    ranked = ranked.sort_values([*KEY, "_is_predicted", "latency_us", "config"], kind="stable")
    return ranked.drop_duplicates(list(KEY)).drop(columns="_is_predicted").assign(schema_version=SCHEMA_VERSION)


def _read(path: Path, gpu: str | None) -> pd.DataFrame:
    frame = KIND.read(path)
    found = sorted({str(name) for name in frame["gpu"]})
    if gpu is not None and found not in ([], [gpu]):
        raise DataError(f"{path}: rows of the GPU {', '.join(found)}, where {gpu} is expected")
    return frame


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows in the table's columns, sorted; DataError for the first rule that is broken."""
    frame = KIND.conformed(frame, where)
    readers: dict[str, Callable[[Any], object]] = {
        "gpu": find_gpu,
        "scheme": schemes.parse,
        "config": kernels.parse,
        "source": Source,
    }
    for name, read in readers.items():
        for value in frame[name].unique():
            try:
                read(value)
            except (SpecError, ValueError) as error:
                raise DataError(f"{where}: {error}") from error
    _check_numbers(frame, where)
    KIND.refuse_twice(frame, where)
    return frame


def _check_numbers(frame: pd.DataFrame, where: str) -> None:
    latency, std, tokens = (
        frame[name].to_numpy(dtype=np.float64) for name in ("latency_us", "std_us", "tokens_per_expert")
    )
    rules = (
        ("latency_us", "a positive, finite number is needed", ~(np.isfinite(latency) & (latency > 0))),
        ("std_us", "a finite number that is not negative is needed", ~np.isnan(std) & ~(np.isfinite(std) & (std >= 0))),
        ("tokens_per_expert", "a finite number that is not negative is needed", ~(np.isfinite(tokens) & (tokens >= 0))),
    )
    for name, problem, broken in rules:
        if broken.any():
            row = int(np.argmax(broken))
            raise DataError(f"{where}: row {row} has {name} {frame[name].iloc[row]}; {problem}")
