"""Sensitivity: what each scheme costs in loss for each linear of each expert; a calibration ends with one.

A row is one (layer, expert, linear, scheme). A pair without a row is not offered to the allocator.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from profiles import schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError
from profiles.models import Linear, LinearId
from profiles.schemes import QuantScheme

SCHEMA_VERSION = 1
SCHEMA = pa.schema([
    ("model", pa.string()),
    ("layer", pa.int32()),
    ("expert", pa.int32()),
    ("linear", pa.string()),
    ("scheme", pa.string()),
    ("loss", pa.float64()),
    ("metric", pa.string()),
    ("data", pa.string()),
    ("num_samples", pa.int64()),
    ("seed", pa.int64()),
    ("schema_version", pa.int32()),
])  # fmt: skip
KEY = ("layer", "expert", "linear", "scheme")
PROVENANCE = ("model", "metric", "data", "num_samples", "seed")
SHARED_EXPERT = -1
"""`expert` of the experts that every token goes to; they run as one."""


class Sensitivity:
    """Losses of one model by (LinearId, scheme), checked when made. Immutable: `frame()` gives a copy.

    Columns: model, layer, expert (-1: the shared expert), linear, scheme, loss (finite; it may be negative), and what
    the losses are and where they are from: metric, data, num_samples, seed, the same in every row; schema_version.
    """

    __slots__ = ("_frame",)

    def __init__(self, frame: pd.DataFrame, *, where: str = "sensitivity") -> None:
        """Raises DataError for a table that breaks a rule; `where` begins its sentence."""
        self._frame = _checked(frame, where)

    def __len__(self) -> int:
        return len(self._frame)

    @classmethod
    def from_losses(
        cls,
        losses: dict[tuple[LinearId, QuantScheme], float],
        *,
        model: str,
        metric: str,
        data: str,
        num_samples: int,
        seed: int,
    ) -> Sensitivity:
        """A table of these losses. DataError as for a file."""
        rows = [(i.layer, i.expert, i.linear.value, scheme.name, loss) for (i, scheme), loss in losses.items()]
        frame = pd.DataFrame(rows, columns=[*KEY, "loss"])
        return cls(
            frame.assign(
                model=model, metric=metric, data=data, num_samples=num_samples, seed=seed, schema_version=SCHEMA_VERSION
            )
        )

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self._frame["model"].iloc[0])

    @property
    def metric(self) -> str:
        """What the loss is."""
        return str(self._frame["metric"].iloc[0])

    @property
    def provenance(self) -> dict[str, str | int]:
        """model, metric, data, num_samples, seed."""
        row = self._frame.iloc[0]
        return {name: int(row[name]) if name in ("num_samples", "seed") else str(row[name]) for name in PROVENANCE}

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        """Every scheme that some linear has a loss for, by name."""
        return tuple(schemes.parse(name) for name in sorted(self._frame["scheme"].unique()))

    def frame(self) -> pd.DataFrame:
        """All rows, sorted by key."""
        return self._frame.copy()

    def arrays(
        self,
    ) -> tuple[tuple[LinearId, ...], tuple[QuantScheme, ...], np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
        """Blocks, schemes and losses float64 [blocks, schemes], inf where the table has no row."""
        wide = self._frame.pivot(index=list(KEY[:3]), columns="scheme", values="loss")
        blocks = tuple(
            LinearId(layer=int(layer), expert=int(expert), linear=Linear(linear))
            for layer, expert, linear in wide.index
        )
        values = wide.to_numpy(dtype=np.float64)
        return (
            blocks,
            tuple(schemes.parse(str(name)) for name in wide.columns),
            np.where(np.isnan(values), np.inf, values),
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """A table from Parquet. DataError: missing, truncated, foreign, of another schema version, or broken rows."""
        return cls(_read(Path(path)), where=str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put the table in the place of a Parquet file, whole or not at all. DataError when it cannot be written."""
        target = Path(path)
        try:
            with replacing(target) as temporary:
                table = pa.Table.from_pandas(self._frame, schema=SCHEMA, preserve_index=False)
                pq.write_table(table, temporary, write_page_checksum=True)
        except OSError as error:
            raise DataError(
                f"{target}: cannot be written ({error.strerror or error}); what was there is unchanged"
            ) from error


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable Parquet file, truncated or foreign ({reason})") from error
    if {"schema_version", "loss"} <= set(table.column_names):
        for version in table.column("schema_version").unique().to_pylist():
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{path}: a sensitivity of schema version {version}; this version of bitile reads {SCHEMA_VERSION}"
                )
    if sorted(table.column_names) != sorted(SCHEMA.names):
        raise DataError(f"{path}: not a sensitivity; it has the columns {', '.join(table.column_names)}")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows in the table's columns, sorted; DataError for the first rule that is broken."""
    missing = [name for name in SCHEMA.names if name not in frame]
    if missing or frame.empty:
        raise DataError(f"{where}: " + (f"missing columns {', '.join(missing)}" if missing else "it has no rows"))
    try:
        frame = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False).to_pandas()
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{where}: a column is not of a sensitivity's type ({error})") from error
    for name in SCHEMA.names:
        if bool(frame[name].isna().any()):
            raise DataError(f"{where}: row {int(frame[name].isna().argmax())} has no {name}; every row needs one")
    frame = frame.sort_values(list(KEY), kind="stable").reset_index(drop=True)
    for name in PROVENANCE:
        if frame[name].nunique() > 1:
            raise DataError(
                f"{where}: a sensitivity is of one {name}, this has {', '.join(sorted(map(str, frame[name].unique())))}"
            )
    _check_values(frame, where)
    twice = frame.duplicated(list(KEY))
    if twice.any():
        row = frame.iloc[int(twice.argmax())]
        raise DataError(f"{where}: two rows for {', '.join(f'{name} {row[name]}' for name in KEY)}")
    return frame


def _check_values(frame: pd.DataFrame, where: str) -> None:
    for value in frame["scheme"].unique():
        try:
            schemes.parse(value)
        except SpecError as error:
            raise DataError(f"{where}: {error}") from error
    known = [linear.value for linear in Linear]
    rules = (
        ("linear", f"one of {', '.join(known)} is needed", ~frame["linear"].isin(known)),
        ("layer", "a number of at least 0 is needed", frame["layer"] < 0),
        ("expert", "a number of at least 0 is needed, or -1 for the shared expert", frame["expert"] < SHARED_EXPERT),
        ("loss", "a finite number is needed", ~np.isfinite(frame["loss"])),
        ("num_samples", "a number of at least 1 is needed", frame["num_samples"] < 1),
    )
    for name, problem, broken in rules:
        if broken.any():
            row = frame.iloc[int(broken.argmax())]
            at = ", ".join(f"{key} {row[key]}" for key in KEY if key != name)
            raise DataError(f"{where}: {name} {row[name]} at {at}; {problem}")
