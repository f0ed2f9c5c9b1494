"""The profile store: a Parquet table of records that survives whatever ends a sweep.

While a sweep runs, each finished row goes to a journal beside the Parquet file (`x.parquet.journal`), durably, in
milliseconds. The journal is folded into the Parquet file, which is replaced whole, when the store is closed, or when it
is next opened if its writer died. Whoever reads the store sees both. One process writes at a time; any number read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from profiles import table as tables
from profiles.atomic import remove_leftovers
from profiles.errors import DataError, SpecError
from profiles.journal import Journal, journal_path, read_journal
from profiles.kernels import KernelConfig
from profiles.records import ProfileRecord, Status
from profiles.schemes import QuantScheme

NOT_FILTERED = ("tokens_per_expert", "versions")


class ProfileStore:
    """A profile on disk, which need not exist yet.

    Reading needs nothing more. `append` makes this process the file's one writer until `close`; `with
    ProfileStore(path) as store:` does so from the start, and folds the journal into the Parquet file at the end.

    Args:
        path: the Parquet file.
        gpu: refuse a table, or a record, of another GPU.
    """

    def __init__(self, path: str | os.PathLike[str], *, gpu: str | None = None) -> None:
        self.path = Path(path)
        self.gpu = gpu
        self._journal: Journal | None = None
        self._outcomes: dict[str, tuple[Any, ...]] = {}

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Makes this process the writer, and folds in what a writer that died left.

        Raises:
            DataError: another process is writing, or the table is refused.
        """
        if self._journal is not None:
            return
        journal = Journal(journal_path(self.path))
        try:
            table, keys = self._read()
            remove_leftovers(self.path)
            if read_journal(journal_path(self.path)):
                tables.write_parquet(table, self.path)
            journal.start()
        except BaseException:
            journal.close()
            raise
        self._journal = journal
        self._outcomes = dict(zip(keys, tables.outcomes(table), strict=True))

    def append(self, record: ProfileRecord) -> bool:
        """Adds a record; it is on disk when this returns.

        Returns:
            False if the same candidate with the same outcome was there already, and nothing was added.

        Raises:
            DataError: the record breaks a rule of `profiles.table`, disagrees with the candidate's earlier row, or
                cannot be written.
        """
        self.open()
        assert self._journal is not None
        table = tables.from_rows([record.to_row()], f"{self.path}")
        tables.check(table, f"{self.path}: the new record", self.gpu)
        row = tables.row_of(table, 0)
        key, outcome = record.key, tables.outcomes(table)[0]
        earlier = self._outcomes.get(key)
        if earlier is not None:
            if earlier != outcome:
                raise DataError(f"{self.path}: {tables.disagreement(row, outcome, earlier)} in an earlier row")
            return False
        self._journal.append(row)
        self._outcomes[key] = outcome
        return True

    def close(self) -> None:
        """Folds the journal into the Parquet file and lets others write. Nothing happens unless this store is the
        writer.

        Raises:
            DataError: the Parquet file cannot be written; the rows stay in the journal, which is read with it.
        """
        if self._journal is None:
            return
        journal, self._journal = self._journal, None
        if journal.closed:
            return
        try:
            if read_journal(journal_path(self.path)):
                tables.write_parquet(self._read()[0], self.path)
            journal.remove()
        finally:
            journal.close()

    def records(self, **filters: object) -> pd.DataFrame:
        """The rows whose columns equal the filters, as a DataFrame with the columns of `profiles.table.SCHEMA`.

        Args:
            **filters: column=value, or column=(values) for any of them; enums, schemes and configurations stand for
                their names. `schemes="w4a16_g128_sym"` finds the launches where every expert has that scheme.

        Raises:
            SpecError: there is no such column, or it cannot be filtered by.
            DataError: the table is refused.
        """
        frame: pd.DataFrame = self._filtered(filters).to_pandas(maps_as_pydicts="strict")
        return frame

    def load(self, **filters: object) -> list[ProfileRecord]:
        """The same rows as `records`, as objects.

        Raises:
            SpecError, DataError: as `records`.
        """
        return [ProfileRecord.from_row(row) for row in self._filtered(filters).to_pylist(maps_as_pydicts="strict")]

    def _filtered(self, filters: Mapping[str, object]) -> pa.Table:
        table, _ = self._read()
        for name, wanted in filters.items():
            table = table.filter(_mask(table, name, wanted))
        return table

    def keys(self, *statuses: Status) -> set[str]:
        """`ProfileRecord.key` of the rows with one of some statuses, or of all rows: what a sweep need not do again.

        Raises:
            DataError: the table is refused.
        """
        table, keys = self._read()
        if not statuses:
            return set(keys)
        wanted = _mask(table, "status", statuses).to_pylist()
        return {key for key, is_wanted in zip(keys, wanted, strict=True) if is_wanted}

    def _read(self) -> tuple[pa.Table, list[str]]:
        """All rows, checked, and their keys. The journal is read first: were it folded in meanwhile, its rows would
        be seen twice rather than never.
        """
        journal = journal_path(self.path)
        parts = [tables.from_rows(read_journal(journal), str(journal))]
        if self.path.exists():
            parts.insert(0, tables.read_parquet(self.path))
        table = pa.concat_tables(parts)
        tables.check(table, str(self.path), self.gpu)
        return tables.without_duplicates(table, lambda row: f"{self.path} row {row}")


def merge(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> int:
    """Puts the rows of several profiles, say of several machines, into one; rows that `out` has already are kept.

    Returns:
        The number of rows in `out`.

    Raises:
        DataError: a table is refused or absent, or two disagree about a candidate; `out` is unchanged.
    """
    missing = [str(path) for path in paths if not Path(path).exists() and not journal_path(Path(path)).exists()]
    if missing:
        raise DataError(f"{missing[0]}: no such profile")
    target = ProfileStore(out)
    with target:
        parts = [(str(out), target._read()[0])]
        parts += [
            (str(path), ProfileStore(path)._read()[0]) for path in paths if Path(path).resolve() != Path(out).resolve()
        ]
        starts = np.cumsum([0, *(part.num_rows for _, part in parts)])

        def name_of(row: int) -> str:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            return f"{parts[part][0]} row {row - starts[part]}"

        merged, _ = tables.without_duplicates(pa.concat_tables([part for _, part in parts]), name_of)
        tables.write_parquet(merged, target.path)
    return int(merged.num_rows)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return value.name if isinstance(value, QuantScheme | KernelConfig) else value


def _mask(table: pa.Table, name: str, wanted: object) -> pa.ChunkedArray:
    """Rows whose column equals a value, or one of several."""
    if name not in tables.SCHEMA.names or name in NOT_FILTERED:
        columns = ", ".join(name for name in tables.SCHEMA.names if name not in NOT_FILTERED)
        raise SpecError(f"profiles cannot be filtered by {name!r}, only by {columns}")
    several = isinstance(wanted, Iterable) and not isinstance(wanted, str)
    values = [_plain(value) for value in wanted] if several else [_plain(wanted)]  # type: ignore[attr-defined]
    column = table.column(name)
    if name == "schemes":
        column = pc.if_else(pc.equal(pc.list_value_length(column), 1), pc.list_element(column, 0), "")
    try:
        return pc.is_in(column, pa.array(values, column.type))
    except (pa.ArrowException, TypeError) as error:
        raise SpecError(f"profiles cannot be filtered by {name}={wanted!r}: {error}") from error
