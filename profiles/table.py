"""The table of profile records: its columns, the rules of a row, and the Parquet file. A table that breaks a rule is
refused whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from profiles import kernels, schemes
from profiles.atomic import replacing
from profiles.errors import DataError, SpecError
from profiles.gpus import gpu as find_gpu
from profiles.parquet_file import read_verified
from profiles.records import SCHEMA_VERSION, SEPARATOR, Source, Status, candidate_digest

SCHEMA = pa.schema(
    [
        ("gpu", pa.string()),
        ("model", pa.string()),
        ("linear", pa.string()),
        ("n", pa.int32()),
        ("k", pa.int32()),
        ("num_experts", pa.int32()),
        ("tokens_per_expert", pa.list_(pa.int32())),
        ("load_source", pa.string()),
        ("num_tokens", pa.int32()),
        ("schemes", pa.list_(pa.string())),
        ("config", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("latency_us", pa.float64()),
        ("p20_us", pa.float64()),
        ("p80_us", pa.float64()),
        ("num_samples", pa.int32()),
        ("sm_clock_mhz", pa.float64()),
        ("source", pa.string()),
        ("kernel_fingerprint", pa.string()),
        ("versions", pa.map_(pa.string(), pa.string())),
        ("timestamp", pa.string()),
        ("schema_version", pa.int32()),
    ]
)
_MAY_BE_ABSENT = ("latency_us", "p20_us", "p80_us", "sm_clock_mhz")
NULLABLE = {*_MAY_BE_ABSENT, "num_tokens"}
OUTCOME = ("status", "latency_us", "p20_us", "p80_us")  # what two rows of one candidate must agree in

Mask = npt.NDArray[np.bool_]


def from_rows(rows: Iterable[dict[str, Any]], where: str) -> pa.Table:
    """A table of `ProfileRecord.to_row` rows.

    Raises:
        DataError: a column is missing or of another type.
    """
    try:
        return pa.Table.from_pylist(list(rows), schema=SCHEMA)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise DataError(f"{where}: a row does not have the columns of a profile ({error})") from error


def read_parquet(path: Path) -> pa.Table:
    """The rows of a profile's Parquet file, whose columns are checked and whose rows are not yet.

    Raises:
        DataError: unreadable, truncated, foreign, or of another schema version.
    """
    table = read_verified(path)
    names = table.column_names
    if "schema_version" in names:
        for version in table.column("schema_version").unique().to_pylist():
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{path}: its schema version is {version}; this version of bitile reads {SCHEMA_VERSION}"
                )
    missing = [name for name in SCHEMA.names if name not in names and name != "num_tokens"]
    extra = [name for name in names if name not in SCHEMA.names]
    if missing or extra:
        raise DataError(f"{path}: not a profile (missing columns: {_listed(missing)}; unknown: {_listed(extra)})")
    try:
        return _with_num_tokens(table).select(SCHEMA.names).cast(SCHEMA).replace_schema_metadata(None)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{path}: a column is not of a profile's type ({error})") from error


def _with_num_tokens(table: pa.Table) -> pa.Table:
    """A file from before the column has its numbers in the texts of generated loads: "zipf, 512 tokens, ..."."""
    if "num_tokens" in table.column_names:
        return table
    named = pc.extract_regex(table.column("load_source").cast(pa.string()), r"(?:^|, )(?P<n>[0-9]{1,9}) tokens(?:,|$)")
    return table.append_column("num_tokens", pc.struct_field(named, "n").cast(pa.int32()))


def write_parquet(table: pa.Table, path: Path) -> None:
    """Puts a table in the place of a Parquet file, whole or not at all.

    Raises:
        DataError: it cannot be written; what was there is unchanged.
    """
    try:
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{path}: cannot be written ({reason}); what was there is unchanged") from error


def check(table: pa.Table, where: str, expected_gpu: str | None = None) -> None:
    """Checks every row.

    Raises:
        DataError: the first rule that is broken, with the row and the value.
    """
    for name in SCHEMA.names:
        if name not in NULLABLE and table.column(name).null_count:
            row = int(np.argmax(table.column(name).is_null().to_numpy()))
            raise DataError(f"{where}: row {row} has no {name}")
    _check_names(table, where, expected_gpu)
    for name, problem, broken in _rules(table):
        if broken.any():
            row = int(np.argmax(broken))
            value = table.column(name)[row].as_py()
            raise DataError(f"{where}: row {row} has {name} {value}; {problem}")


def _check_names(table: pa.Table, where: str, expected_gpu: str | None) -> None:
    readers: dict[str, Callable[[str], object]] = {
        "gpu": find_gpu,
        "schemes": schemes.parse,
        "config": kernels.parse,
        "status": Status,
        "source": Source,
        "timestamp": _utc,
    }
    for name, read in readers.items():
        column = table.column(name)
        values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        for value in values.unique().to_pylist():
            if value is None:
                raise DataError(f"{where}: an absent name among the {name}")
            try:
                read(value)
            except SpecError as error:
                raise DataError(f"{where}: {error}") from error
            except ValueError as error:
                raise DataError(f"{where}: unknown {name} {value!r}") from error
            if name == "gpu" and expected_gpu is not None and value != expected_gpu:
                raise DataError(f"{where}: rows of the GPU {value}, where {expected_gpu} is expected")


def _utc(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.utcoffset() != timedelta(0):
        raise ValueError(text)
    return time


def _rules(table: pa.Table) -> Iterator[tuple[str, str, Mask]]:
    """(column to show, what is required, rows that break it), cheapest first."""

    def numbers(name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = table.column(name).to_numpy()
        return values

    def absent(name: str) -> Mask:
        nulls: Mask = table.column(name).is_null().to_numpy()
        return nulls

    ok = pc.equal(table.column("status"), Status.OK.value).to_numpy()
    measured = pc.equal(table.column("source"), Source.MEASURED.value).to_numpy()
    for name in ("n", "k", "num_experts"):
        yield name, "at least 1 is needed", numbers(name) < 1
    yield "num_samples", "a measured latency has at least 1", (numbers("num_samples") < np.where(ok & measured, 1, 0))
    yield "latency_us", "a finished candidate has a latency", ok & absent("latency_us")
    for name in ("latency_us", "p20_us", "p80_us"):
        yield name, "a candidate that failed has none", ~ok & ~absent(name)
    yield "num_tokens", "a number of at least 0 is needed", ~absent("num_tokens") & (numbers("num_tokens") < 0)
    for name in _MAY_BE_ABSENT:
        value = numbers(name)
        with np.errstate(invalid="ignore"):
            yield name, "a positive, finite number is needed", ~absent(name) & ~((value > 0) & np.isfinite(value))
    latency, p20, p80 = numbers("latency_us"), numbers("p20_us"), numbers("p80_us")
    yield "p20_us", "it must not exceed the median", ~absent("p20_us") & (p20 > latency)
    yield "p80_us", "it must not be below the median", ~absent("p80_us") & (p80 < latency)
    no_error = pc.equal(table.column("error"), "").to_numpy()
    yield "error", "a finished candidate has none, and one that failed has one", ok != no_error
    lengths = pc.list_value_length(table.column("tokens_per_expert")).to_numpy()
    yield "tokens_per_expert", "one number per expert is needed", lengths != numbers("num_experts")
    negative = _any_in_list(table, "tokens_per_expert", lambda flat: pc.less(flat, 0))
    yield "tokens_per_expert", "numbers of at least 0 are needed", negative
    scheme_lengths = pc.list_value_length(table.column("schemes")).to_numpy()
    yield "schemes", "one, or one per expert, is needed", (scheme_lengths != 1) & (scheme_lengths != lengths)


def _any_in_list(table: pa.Table, name: str, test: Callable[[pa.Array], pa.Array]) -> Mask:
    """Rows whose list holds a null or a value that a test finds."""
    column = table.column(name)
    bad = pc.fill_null(test(pc.list_flatten(column)), True)
    broken = np.zeros(table.num_rows, dtype=np.bool_)
    if pc.any(bad).as_py():
        broken[pc.list_parent_indices(column).to_numpy()[bad.to_numpy()]] = True
    return broken


def keys(table: pa.Table) -> list[str]:
    """`ProfileRecord.key` of every row."""
    names = ("gpu", "model", "linear", "n", "k", "config", "source", "kernel_fingerprint")
    texts = [table.column(name).cast(pa.string()) for name in names]
    joined = pc.binary_join_element_wise(*texts, pc.binary_join(table.column("schemes"), SEPARATOR), SEPARATOR)
    tokens = table.column("tokens_per_expert").combine_chunks()
    values = memoryview(tokens.flatten().to_numpy().astype("<i4", copy=False)).cast("B")
    ends = (4 * np.cumsum(tokens.value_lengths().to_numpy())).tolist()
    starts = [0, *ends][: len(ends)]
    return [
        candidate_digest(text, values[start:end])
        for text, start, end in zip(joined.cast(pa.binary()).to_pylist(), starts, ends, strict=True)
    ]


def outcomes(table: pa.Table) -> list[tuple[Any, ...]]:
    """What two rows of one candidate must agree in."""
    return list(zip(*(table.column(name).to_pylist() for name in OUTCOME), strict=True))


def without_duplicates(table: pa.Table, row_names: Callable[[int], str]) -> tuple[pa.Table, list[str]]:
    """The table with one row per candidate, the first, and the key of each row.

    Args:
        table: rows that have been checked.
        row_names: where a row is from, for the message.

    Raises:
        DataError: two rows of one candidate disagree.
    """
    all_keys = keys(table)
    first: dict[str, int] = {}
    for row, key in enumerate(all_keys):
        first.setdefault(key, row)
    if len(first) == len(all_keys):
        return table, all_keys
    outcome = outcomes(table)
    for row, key in enumerate(all_keys):
        earlier = first[key]
        if outcome[earlier] != outcome[row]:
            said = disagreement(row_of(table, row), outcome[row], outcome[earlier])
            raise DataError(f"{row_names(row)}: {said} in {row_names(earlier)}")
    return table.take(list(first.values())), list(first)


def row_of(table: pa.Table, row: int) -> dict[str, Any]:
    """A row's columns as plain values."""
    values: dict[str, Any] = table.slice(row, 1).to_pylist(maps_as_pydicts="strict")[0]
    return values


def disagreement(row: dict[str, Any], new: tuple[Any, ...], old: tuple[Any, ...]) -> str:
    """What a row says of a candidate, and what an earlier row says."""
    what = f"{row['gpu']} {row['model']} {row['linear']} {'+'.join(sorted(set(row['schemes'])))} {row['config']}"
    said = [f"{outcome[0]}" if outcome[1] is None else f"{outcome[1]:.6g} us" for outcome in (new, old)]
    quantiles = " with other quantiles" if said[0] == said[1] else ""
    return f"{what} ({row['load_source']}) is {said[0]}{quantiles}, but {said[1]}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
