"""The rows that a running sweep has finished, beside the Parquet file, until they are folded into it.

One line per row: eight hex digits of the CRC-32 of the rest, a space, a JSON object, a newline. The first line names
the format and the writer. A line without its newline is a row that was in flight when its writer died; it is dropped.
Any other line that does not match its checksum means a damaged file, which is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
import zlib
from io import FileIO
from pathlib import Path
from typing import Any

from profiles.atomic import sync_folder
from profiles.errors import DataError
from profiles.records import SCHEMA_VERSION


def journal_path(path: Path) -> Path:
    """The journal of a profile's Parquet file. DataError for a path that names no file, such as "." or "/"."""
    if not path.name:
        raise DataError(f"{path}: a folder; give a profile's Parquet file")
    return path.with_name(f"{path.name}.journal")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a journal; none if there is no file.

    Raises:
        DataError: damaged, foreign, or of another schema version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    lines = content.split(b"\n")[:-1]  # what follows the last newline is the row in flight
    rows = [_decode(line, path, number) for number, line in enumerate(lines, start=1)]
    if rows and rows[0].get("bitile_journal") != SCHEMA_VERSION:
        raise DataError(f"{path}: line 1 is not the heading of a journal of schema version {SCHEMA_VERSION}")
    return rows[1:]


def _encode(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise DataError(f"{path}: line {number} is damaged, its checksum differs; restore the file or move it away")
    values = json.loads(text)
    if not isinstance(values, dict):
        raise DataError(f"{path}: line {number} is not a row")
    return values


class Journal:
    """A journal that this process alone writes, until it is closed. The operating system releases the lock of a process
    that dies.

    Raises:
        DataError: another process, or another store of this one, is writing it; or it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_locked(path)
        except BlockingIOError:
            raise DataError(
                f"{path.with_suffix('')}: {_writer(path)} is writing this profile; wait for it or choose another file"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        self._end = 0
        _open_journals.add(self)

    @property
    def closed(self) -> bool:
        """Closed, or the parent's: a forked worker has no part in it."""
        return self._file.closed

    def start(self) -> None:
        """Empties it, once its rows are in the Parquet file.

        Raises:
            DataError: it cannot be written.
        """
        self._end = 0
        self.append({"bitile_journal": SCHEMA_VERSION, "process": os.getpid(), "host": os.uname().nodename})
        sync_folder(self._path.parent)

    def append(self, values: dict[str, Any]) -> None:
        """Adds a row; it is on disk when this returns.

        Raises:
            DataError: it cannot be written; the rows before it are kept, and this one is not.
        """
        line = memoryview(_encode(values))
        try:
            self._file.truncate(self._end)  # what an append that failed or was interrupted left
            written = 0
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], self._end + written)
            os.fsync(self._file.fileno())
        except OSError as error:
            reason = error.strerror
            raise DataError(
                f"{self._path}: the row cannot be written ({reason}); earlier rows are kept, make room and start again"
            ) from error
        self._end += len(line)

    def remove(self) -> None:
        """Deletes it, once its rows are in the Parquet file."""
        self._path.unlink(missing_ok=True)
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Lets others write. A journal that never had a heading leaves no file."""
        _open_journals.discard(self)
        if os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)
        self._file.close()


def _open_locked(path: Path) -> FileIO:
    """The file, locked; the last writer may remove it between the opening and the locking, then it is made anew."""
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _writer(path: Path) -> str:
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError:  # it has just been removed
        line = b""
    if not line.endswith(b"\n"):
        return "another process"
    heading = _decode(line[:-1], path, 1)
    return f"process {heading.get('process')} on {heading.get('host')}"


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked worker shares the lock and would hold it after its parent's death."""
    for journal in list(_open_journals):
        journal._file.close()
    _open_journals.clear()


os.register_at_fork(after_in_child=_release_in_child)
