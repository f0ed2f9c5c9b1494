"""Parquet files as they are read here: checksums verified, every value valid, nothing of the writer's metadata."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from profiles.errors import DataError


def read_verified(path: Path) -> pa.Table:
    """A file's rows, whatever its columns are.

    Raises:
        DataError: missing, truncated, damaged or foreign.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read().replace_schema_metadata(None)  # pandas' notes in it may be damaged
        table.validate(full=True)
        _ = table.column_names  # which may be no text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable Parquet file, truncated or foreign ({reason})") from error
    return table
