"""Sensitivity: what each scheme costs in loss for each linear of each expert; a calibration ends with one.

A row is one (layer, expert, linear, scheme). A pair without a row is not offered to the allocator.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from profiles import schemes
from profiles.errors import DataError, SpecError
from profiles.frames import TableKind
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
KIND = TableKind(name="a sensitivity", schema=SCHEMA, version=SCHEMA_VERSION, own="loss", key=KEY, alike=PROVENANCE)
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
        return cls(KIND.read(Path(path)), where=str(path))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Put the table in the place of a Parquet file, whole or not at all. DataError when it cannot be written."""
        KIND.write(self._frame, Path(path))


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The rows in the table's columns, sorted; DataError for the first rule that is broken."""
    frame = KIND.conformed(frame, where)
    _check_values(frame, where)
    KIND.refuse_twice(frame, where)
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
