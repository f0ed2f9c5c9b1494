"""Tables of one kind as pandas frames: their Parquet file, and the rules that hold for each of them. A table that
breaks a rule is refused whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from profiles.atomic import replacing
from profiles.errors import DataError
from profiles.parquet_file import read_verified


@dataclass(frozen=True, slots=True, kw_only=True)
class TableKind:
    """What tables of one kind share. Every row has a `schema_version`.

    Attributes:
        name: "a sensitivity", as sentences call one.
        schema: columns and types.
        version: of the schema.
        own: a column that tables of other kinds do not have; with it, another version is told from another kind.
        key: what no two rows share, in the order of sorting.
        alike: columns with one value in all rows.
        nullable: columns that may be null.
    """

    name: str
    schema: pa.Schema
    version: int
    own: str
    key: tuple[str, ...]
    alike: tuple[str, ...]
    nullable: tuple[str, ...] = ()

    def read(self, path: Path) -> pd.DataFrame:
        """A file's rows, not yet checked. DataError: missing, truncated, foreign, or of another schema version."""
        try:
            table = read_verified(path)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DataError(f"{path}: no such file") from None
            raise
        if {"schema_version", self.own} <= set(table.column_names):
            for version in table.column("schema_version").unique().to_pylist():
                if version != self.version:
                    raise DataError(
                        f"{path}: {self.name} of schema version {version}; this version of bitile reads {self.version}"
                    )
        if sorted(table.column_names) != sorted(self.schema.names):
            raise DataError(f"{path}: not {self.name}; it has the columns {', '.join(table.column_names)}")
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def write(self, frame: pd.DataFrame, path: Path) -> None:
        """Put checked rows in the place of a file, whole or not at all. DataError when it cannot be written."""
        try:
            with replacing(path) as temporary:
                table = pa.Table.from_pandas(frame, schema=self.schema, preserve_index=False)
                pq.write_table(table, temporary, write_page_checksum=True)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror or error}); what was there is unchanged"
            ) from error

    def conformed(self, frame: pd.DataFrame, where: str) -> pd.DataFrame:
        """The rows in the kind's columns and types, sorted by key. DataError: a column or a value is missing, or of
        another type, or a column that is alike in all rows is not.
        """
        missing = [name for name in self.schema.names if name not in frame]
        if missing or frame.empty:
            raise DataError(f"{where}: " + (f"missing columns {', '.join(missing)}" if missing else "it has no rows"))
        try:
            for field in self.schema:
                if not pa.types.is_string(field.type) and pd.api.types.is_string_dtype(frame[field.name]):
                    raise TypeError(f"{field.name} is text")  # which pyarrow would read as numbers
            frame = pa.Table.from_pandas(frame, schema=self.schema, preserve_index=False).to_pandas()
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"{where}: a column is not of the type that {self.name} has ({error})") from error
        for name in self.schema.names:
            if name not in self.nullable and bool(frame[name].isna().any()):
                raise DataError(f"{where}: row {int(frame[name].isna().argmax())} has no {name}; every row needs one")
        for name in self.alike:
            if frame[name].nunique() > 1:
                found = ", ".join(sorted(map(str, frame[name].unique())))
                raise DataError(f"{where}: {self.name} is of one {name}, this has {found}")
        return frame.sort_values(list(self.key), kind="stable").reset_index(drop=True)

    def refuse_twice(self, frame: pd.DataFrame, where: str) -> None:
        """DataError when two rows have one key."""
        twice = frame.duplicated(list(self.key))
        if twice.any():
            row = frame.iloc[int(twice.argmax())]
            raise DataError(f"{where}: two rows for {', '.join(f'{name} {row[name]}' for name in self.key)}")
