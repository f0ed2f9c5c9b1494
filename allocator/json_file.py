"""Results kept as JSON files that say of what kind and version they are."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.atomic import replacing
from profiles.errors import DataError


def write_json(
    path: str | os.PathLike[str], content: dict[str, Any], *, indent: int | None = None, allow_nan: bool = True
) -> None:
    """A file, whole or not at all. DataError when it cannot be written."""
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps(content, indent=indent, allow_nan=allow_nan) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonKind:
    """One kind of file.

    Attributes:
        kind, version: what a file of it says.
        name: what messages call the content, such as `a verification`.
        file_name: what they call the file, such as `verification`.
    """

    kind: str
    version: int
    name: str
    file_name: str

    def mark(self, content: dict[str, Any]) -> dict[str, Any]:
        """The file's content."""
        return {"kind": self.kind, "schema_version": self.version, **content}

    def write(self, path: str | os.PathLike[str], content: dict[str, Any]) -> None:
        """Put it in the place of a JSON file, whole or not at all. DataError when it cannot be written."""
        write_json(path, self.mark(content), indent=1, allow_nan=False)

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The content without its mark. DataError: missing, truncated, foreign or of another version."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable {self.file_name} ({error})") from error
        marks = ("kind", "schema_version")
        if not isinstance(content, dict) or tuple(content.pop(mark, None) for mark in marks) != (
            self.kind,
            self.version,
        ):
            raise DataError(f"{path}: not {self.name} of schema version {self.version}")
        return content
