"""Files that appear whole or not at all, and whether a folder can take them."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from profiles.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the place of `path`, durably, if the block ends without an
    exception.

    With an exception, `path` is as it was and the temporary file is gone. Two writers do not meet: the name is
    random. IsADirectoryError for a path that names no file, such as "." or "/".
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Called before the work whose results go into a folder, which need not exist yet and is not made.

    Raises:
        DataError: it is a file, or nothing can be written there.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise DataError(f"{folder}: nothing can be written there ({error.strerror or error})") from error


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of writers that died; only for one who knows that nobody is writing `path`."""
    for file in path.parent.iterdir():
        if file.name.startswith(_prefix(path)) and file.suffix == ".tmp":
            file.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}."


def sync_folder(folder: Path) -> None:
    """Makes the creation, renaming and removal of files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
