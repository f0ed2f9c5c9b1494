"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the place of `path`, durably, if the block ends without an
    exception.

    With an exception, `path` is as it was and the temporary file is gone. Two writers do not meet: the name is
    random.
    """
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
