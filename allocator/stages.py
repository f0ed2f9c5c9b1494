"""Stages of a long run, each cached by the content of what it reads: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles.atomic import replacing
from profiles.errors import DataError

_VERSION = 1


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. DataError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def checkpoint_digest(folder: Path) -> str:
    """Of a checkpoint folder: small files by content, safetensors by size and time, being large."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
        elif file.suffix == ".safetensors":
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(slots=True, kw_only=True)
class Stages:
    """A folder of stages' results. `done`: in this run, whether each stage was made or found.

    A stage's key is of its settings and of the bytes that it reads. It is written, by itself, when all outputs are, and
    holds their digests: an output that is missing, changed, or of another key is made again.
    """

    folder: Path
    say: Callable[[str], None]
    done: dict[str, str] = field(default_factory=dict)

    def ensure(
        self,
        name: str,
        make: Callable[[], None],
        *,
        reads: Sequence[Path] = (),
        settings: Mapping[str, Any],
        writes: Sequence[Path],
    ) -> None:
        """Have a stage's outputs. `make` writes each of `writes`, whole or not at all. DataError when the folder cannot
        be written.
        """
        content = [_VERSION, name, dict(settings), [[path.name, file_digest(path)] for path in reads]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        if self._is_there(name, key, writes):
            self.done[name] = "found"
            self.say(f"{name}: found, made from the same inputs")
            return
        self.say(f"{name} ...")
        make()
        record = {"key": key, "outputs": {path.name: file_digest(path) for path in writes}}
        try:
            with replacing(self._record(name)) as temporary:
                temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self._record(name)}: cannot be written ({error.strerror or error})") from error
        self.done[name] = "made"

    def _record(self, name: str) -> Path:
        return self.folder / f".{name}.stage.json"

    def _is_there(self, name: str, key: str, writes: Sequence[Path]) -> bool:
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            return bool(record["key"] == key) and all(
                path.is_file() and file_digest(path) == record["outputs"].get(path.name) for path in writes
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False  # no record, or not one: the stage is made again
